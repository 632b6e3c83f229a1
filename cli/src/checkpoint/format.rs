//! What a checkpoint image consists of: an OCI index whose parts are told by their media types.
//!
//! ```text
//!   index ─┬─ the container's image
//!          ├─ CRIU's images, a tar                     containerd's media types and annotations
//!          ├─ the runtime spec, options of the dump,
//!          │  options of the runtime: protobuf Any
//!          ├─ the writable layer, tar+gzip
//!          └─ summary: JSON                            ours
//! ```

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use ferry_oci::criu::DumpOptions;
use serde::{Deserialize, Serialize};

use crate::containerd::{Containerd, Descriptor, Image};

/// The index itself.
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// CRIU's images.
pub(crate) const IMAGES: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
/// The runtime spec.
pub(crate) const SPEC: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";
/// The Task API's options of the dump.
pub(super) const OPTIONS: &str = "application/vnd.containerd.container.checkpoint.options.v1+proto";
/// Options of the container's runtime.
pub(super) const RUNTIME_OPTIONS: &str =
    "application/vnd.containerd.container.checkpoint.runtime.options+proto";
/// A layer that is not compressed.
pub(super) const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// The writable layer.
pub(super) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Our [`Summary`].
pub(crate) const SUMMARY: &str = "application/vnd.ferry.checkpoint.v1+json";

/// Annotations of the index, and a label of the image, as containerd's clients know them.
pub(super) const IMAGE_NAME: &str = "org.opencontainers.image.ref.name";
pub(super) const IMAGE_NAME_OLD: &str = "image.name";
pub(super) const RUNTIME_NAME: &str = "io.containerd.checkpoint.runtime";
pub(super) const SNAPSHOTTER: &str = "io.containerd.checkpoint.snapshotter";
pub(super) const LABEL: (&str, &str) = ("containerd.io/checkpoint", "true");

/// Version of the summary.
pub(super) const VERSION: u32 = 1;
/// An index or a summary is not larger; a summary names every connection.
const MAX_JSON: usize = 16 << 20;
/// Nor is a spec.
const MAX_PROTO: usize = 4 << 20;

/// The index of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    pub(super) schema_version: u32,
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) manifests: Vec<Part>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

/// One part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    #[serde(flatten)]
    pub(super) blob: Descriptor,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) platform: Option<Platform>,
}

/// Without one, containerd's clients leave a part out when they look for those of their platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Platform {
    pub(super) architecture: String,
    pub(super) os: String,
}

/// What containerd's parts do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Summary {
    /// [`VERSION`].
    pub(super) version: u32,
    pub(super) ferry: String,
    pub(super) criu: String,
    pub(super) runc: String,
    pub(super) kernel: String,
    /// The host's name.
    #[serde(default)]
    pub(super) hostname: String,
    /// Its architecture.
    #[serde(default)]
    pub(super) arch: String,
    /// What its processor can do.
    #[serde(default)]
    pub(super) cpu_flags: BTreeSet<String>,
    /// The container's id.
    pub(super) container: String,
    /// RFC 3339.
    pub(super) created: String,
    /// The container ended with it.
    pub(super) exit: bool,
    /// Chain id of the image, which the writable layer is made against.
    pub(super) chain: String,
    /// Those of the dump, which a restore replays.
    pub(super) options: DumpOptions,
    pub(super) statistics: Statistics,
}

/// What it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Statistics {
    /// How long the container stood still, microseconds; 0 if it ended.
    pub(super) frozen_us: u64,
    /// CRIU's part of that.
    pub(super) dump_us: u64,
    /// Bytes of memory in the images.
    pub(super) memory_bytes: u64,
}

/// A checkpoint in the content store.
#[derive(Clone, Debug)]
pub(super) struct Checkpoint {
    pub(super) index: Index,
}

impl Index {
    /// The part of a media type.
    pub(super) fn part(&self, media_type: &str) -> Option<&Descriptor> {
        self.manifests.iter().map(|part| &part.blob).find(|blob| blob.media_type == media_type)
    }

    /// The name of the container's image.
    pub(super) fn image_name(&self) -> Option<&str> {
        let names = [IMAGE_NAME, IMAGE_NAME_OLD];
        names.iter().find_map(|name| self.annotations.get(*name)).map(String::as_str)
    }
}

impl Checkpoint {
    /// Reads what image `name` is.
    ///
    /// # Errors
    /// When there is no such image, or it is no checkpoint.
    pub(super) async fn open(containerd: &Containerd, name: &str) -> Result<Self> {
        let image = containerd.image(name).await?;
        let image = image.with_context(|| format!("there is no checkpoint {name}"))?;
        let found = Self::find(containerd, &image).await?;
        found.with_context(|| format!("the image {name} is no checkpoint"))
    }

    /// The checkpoint that `image` is, if it is one.
    ///
    /// # Errors
    /// When its index cannot be read.
    pub(super) async fn find(containerd: &Containerd, image: &Image) -> Result<Option<Self>> {
        if image.target.media_type != INDEX {
            return Ok(None);
        }
        let bytes = containerd.read_small_blob(&image.target.digest, MAX_JSON).await?;
        let index: Index = serde_json::from_slice(&bytes)
            .with_context(|| format!("decode the index of {}", image.name))?;
        Ok(Some(Self { index }).filter(|checkpoint| checkpoint.index.part(IMAGES).is_some()))
    }

    /// Our summary, if it has one.
    ///
    /// # Errors
    /// When it is of a newer ferry, or is none.
    pub(super) async fn summary(&self, containerd: &Containerd) -> Result<Option<Summary>> {
        let Some(blob) = self.index.part(SUMMARY) else { return Ok(None) };
        let bytes = containerd.read_small_blob(&blob.digest, MAX_JSON).await?;
        summary(&bytes).map(Some)
    }

    /// A part that is a protobuf message in an `Any`: name of its type and its bytes.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) async fn any(
        &self,
        containerd: &Containerd,
        media_type: &str,
    ) -> Result<Option<prost_types::Any>> {
        let Some(blob) = self.index.part(media_type) else { return Ok(None) };
        let bytes = containerd.read_small_blob(&blob.digest, MAX_PROTO).await?;
        let any = prost::Message::decode(bytes.as_slice());
        any.with_context(|| format!("decode the {media_type} of the checkpoint")).map(Some)
    }
}

/// Whether a part is the container's image.
pub(super) fn is_image(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
            | "application/vnd.docker.distribution.manifest.v2+json"
    )
}

/// Decodes a summary.
///
/// # Errors
/// When it is of a newer ferry, or is none.
pub(super) fn summary(bytes: &[u8]) -> Result<Summary> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    // The version first: a newer one may not parse as this one.
    let Version { version } =
        serde_json::from_slice(bytes).context("decode the summary of the checkpoint")?;
    if version == 0 || version > VERSION {
        bail!("the checkpoint has version {version}, this ferry reads up to {VERSION}");
    }
    serde_json::from_slice(bytes).context("decode the summary of the checkpoint")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_written_as_the_image_spec_says() {
        let blob = Descriptor {
            media_type: IMAGES.into(),
            digest: format!("sha256:{}", "0a".repeat(32)),
            size: 7,
        };
        let index = Index {
            schema_version: 2,
            media_type: INDEX.into(),
            manifests: vec![Part { blob: blob.clone(), platform: None }],
            annotations: [(IMAGE_NAME.to_owned(), "redis".to_owned())].into(),
        };
        let json = serde_json::to_value(&index).unwrap();
        assert_eq!(json["schemaVersion"], 2);
        assert_eq!(json["manifests"][0]["mediaType"], IMAGES);
        assert_eq!(json["manifests"][0]["size"], 7);
        assert_eq!(serde_json::from_value::<Index>(json).unwrap(), index);
        assert_eq!(index.part(IMAGES), Some(&blob));
        assert_eq!((index.part(SPEC), index.image_name()), (None, Some("redis")));
    }

    #[test]
    fn a_summary_of_a_newer_version_is_refused_by_number() {
        let error = summary(br#"{"version":2,"options":"of another shape"}"#).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error:#}");
        assert!(summary(b"{}").is_err() && summary(b"").is_err());
        let own = Summary { version: VERSION, ..Default::default() };
        assert_eq!(summary(&serde_json::to_vec(&own).unwrap()).unwrap(), own);
    }
}
