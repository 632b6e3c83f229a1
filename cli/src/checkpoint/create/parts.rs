//! The parts of a checkpoint, written into the content store or into a file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use ferry_oci::criu::DumpRecord;
use prost::Message as _;

use super::Source;
use crate::checkpoint::export::{self, Export};
use crate::checkpoint::format::{self, Index, Part, Platform, Statistics, Summary};
use crate::checkpoint::{archive, blobs};
use crate::containerd::{CheckpointOptions, Descriptor};
use crate::describe::host::Machine;

impl Source {
    /// Writes the unfinished file.
    pub(super) async fn write(
        &self,
        export: &Export,
        summary: &Summary,
        layer: Option<&Descriptor>,
    ) -> Result<()> {
        let (images, work) = (self.place.folder("images")?, self.place.folder("work")?);
        let contents = export::Contents {
            namespace: &self.options.containerd.namespace,
            record: &self.record,
            config: &self.config,
            summary,
            images: &images,
            work: &work,
            room: &self.place.folder("export")?,
        };
        let layer = match layer {
            Some(layer) => Some(self.store.containerd().read_blob(&layer.digest, 0).await?),
            None => None,
        };
        export.write(contents, layer).await
    }

    /// Makes the image `name`. Its digest.
    pub(super) async fn name(
        &self,
        name: &str,
        images: &Path,
        layer: Option<Descriptor>,
        summary: &Summary,
    ) -> Result<String> {
        let index = self.index(images, layer, summary).await?;
        let bytes = serde_json::to_vec(&index).context("write the index")?;
        let labels = index.manifests.iter().enumerate().map(|(number, part)| {
            (format!("containerd.io/gc.ref.content.{number}"), part.blob.digest.clone())
        });
        let target = self.put(format::INDEX, &bytes, labels.collect()).await?;
        let (key, value) = format::LABEL;
        let labels = [(key.to_owned(), value.to_owned())].into();
        self.store.create_checkpoint(name, &target, &labels).await?;
        Ok(target.digest)
    }

    pub(super) fn summary(&self, images: &Path, statistics: Statistics) -> Result<Summary> {
        let record = DumpRecord::read(images).context("read the record of the dump")?;
        let record = record.context("the dump has left no record")?;
        let Machine { hostname, kernel, arch, cpu_flags } = Machine::this();
        Ok(Summary {
            version: format::VERSION,
            ferry: env!("CARGO_PKG_VERSION").to_owned(),
            criu: record.criu,
            runc: record.runc,
            kernel,
            hostname,
            arch,
            cpu_flags,
            container: self.record.id.clone(),
            created: crate::containerd::rfc3339(std::time::SystemTime::now()),
            exit: self.options.exit,
            chain: self.chain.clone(),
            options: record.options,
            statistics,
        })
    }

    /// Stores all parts, and lists them.
    async fn index(
        &self,
        images: &Path,
        layer: Option<Descriptor>,
        summary: &Summary,
    ) -> Result<Index> {
        let dumped = &summary.options;
        let options = CheckpointOptions {
            exit: self.options.exit,
            open_tcp: dumped.tcp_established,
            external_unix_sockets: dumped.ext_unix_sk,
            terminal: dumped.shell_job,
            file_locks: dumped.file_locks,
            ..Default::default()
        };
        let spec = prost_types::Any::from(self.record.spec.clone()).encode_to_vec();
        let mut parts = vec![self.image.target.clone(), self.put_images(images).await?];
        parts.push(self.put(format::SPEC, &spec, Default::default()).await?);
        let options = options.to_any().encode_to_vec();
        parts.push(self.put(format::OPTIONS, &options, Default::default()).await?);
        if let Some(options) = self.record.runtime_options.clone() {
            let options = prost_types::Any::from(options).encode_to_vec();
            parts.push(self.put(format::RUNTIME_OPTIONS, &options, Default::default()).await?);
        }
        parts.extend(layer);
        let summary = serde_json::to_vec(summary).context("write the summary")?;
        parts.push(self.put(format::SUMMARY, &summary, Default::default()).await?);
        let platform = Platform {
            architecture: crate::containerd::architecture().to_owned(),
            os: "linux".to_owned(),
        };
        let annotations = [
            (format::IMAGE_NAME, &self.record.image),
            (format::IMAGE_NAME_OLD, &self.record.image),
            (format::RUNTIME_NAME, &self.record.runtime),
            (format::SNAPSHOTTER, &self.record.snapshotter),
        ];
        let part = |blob| Part { blob, platform: Some(platform.clone()) };
        Ok(Index {
            schema_version: 2,
            media_type: format::INDEX.to_owned(),
            manifests: parts.into_iter().map(part).collect(),
            annotations: annotations.map(|(k, v)| (k.to_owned(), v.clone())).into(),
        })
    }

    /// Stores CRIU's images.
    async fn put_images(&self, images: &Path) -> Result<Descriptor> {
        let from = images.to_owned();
        blobs::stream(&self.store, format::IMAGES, move |out| archive::pack(&from, out)).await
    }

    /// Stores a small blob.
    async fn put(
        &self,
        media_type: &str,
        bytes: &[u8],
        labels: BTreeMap<String, String>,
    ) -> Result<Descriptor> {
        blobs::put(&self.store, media_type, bytes, labels).await
    }
}
