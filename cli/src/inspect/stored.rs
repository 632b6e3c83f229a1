//! Checkpoints that are images in containerd: an index whose blobs are the archive of CRIU's images, the
//! spec, the writable layer, and what else belongs to the container.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};

use anyhow::{Context, Result, bail};
use prost::Message as _;
use serde::Deserialize;
use tokio::runtime::Handle;

use super::archive::{Archive, Open};
use super::record::{Recorded, Spec};
use super::report::{Part, Report, set};
use crate::checkpoint::{IMAGES, SPEC, SUMMARY};
use crate::containerd::{BlobReader, Containerd, Descriptor};
use crate::untar;

/// What all media types of checkpoints begin with.
const CHECKPOINT: &str = "application/vnd.containerd.container.";
/// What annotations of checkpoints begin with.
const NOTED: &str = "io.containerd.checkpoint.";
/// Annotation of images that are made of a kubelet's archives.
const CRI_NAME: &str = "org.criu.checkpoint.container.name";

/// The longest index, manifest, spec or record, bytes.
const LONGEST: usize = 16 << 20;

/// An index, or a manifest.
#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Listed>,
    #[serde(default)]
    layers: Vec<Listed>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Listed {
    #[serde(flatten)]
    blob: Descriptor,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Reads the checkpoint that is the image `name`.
///
/// # Errors
/// When there is no such image, it is no checkpoint, or it cannot be read.
pub(super) async fn read(containerd: &Containerd, name: &str) -> Result<Report> {
    let Some(image) = containerd.image(name).await? else {
        bail!(
            "there is no image {name}, nor a file or folder of that name: ctr images ls lists \
             checkpoints too"
        );
    };
    let mut report = Report::new("image", name.to_owned());
    let index: Index = json(containerd, &image.target.digest).await?;
    if let Some(container) = index.annotations.get(CRI_NAME) {
        report.container = Some(container.clone());
        set(
            &mut report.image,
            annotation(&index, "org.criu.checkpoint.rootfs.image.user.requested"),
        );
        set(&mut report.image, annotation(&index, "org.criu.checkpoint.rootfs.image.name"));
        let layer = index.layers.first().with_context(|| format!("{name} has no layer"))?;
        report.parts = index.layers.iter().map(part).collect();
        return images(containerd, report, &layer.blob, true).await;
    }
    // One without a task may be nothing but the container's image, and says so there.
    let is_noted = index.annotations.keys().any(|key| key.starts_with(NOTED));
    let has_part = |part: &Listed| part.blob.media_type.starts_with(CHECKPOINT);
    if !is_noted && !index.manifests.iter().any(has_part) {
        bail!("{name} is an image, but not of a checkpoint");
    }
    report.parts = index.manifests.iter().map(part).collect();
    for part in &index.manifests {
        match part.blob.media_type.as_str() {
            SUMMARY => report.recorded(json::<Recorded>(containerd, &part.blob.digest).await?),
            SPEC => {
                let bytes = containerd.read_small_blob(&part.blob.digest, LONGEST).await?;
                let packed = prost_types::Any::decode(bytes.as_slice());
                let packed = packed.context("the spec in the checkpoint is not readable")?;
                let spec = serde_json::from_slice::<Spec>(&packed.value);
                let spec = spec.context("the spec in the checkpoint is not readable")?;
                set(&mut report.command, spec.command());
            }
            _ => {}
        }
    }
    let everywhere = |key: &str| {
        let parts = index.manifests.iter().map(|part| &part.annotations);
        let mut all = parts.chain([&index.annotations]);
        all.find_map(|annotations| annotations.get(key)).filter(|text| !text.is_empty()).cloned()
    };
    set(&mut report.image, everywhere("image.name"));
    set(&mut report.image, annotation(&index, "org.opencontainers.image.ref.name"));
    set(&mut report.runtime, everywhere("io.containerd.checkpoint.runtime"));
    set(&mut report.snapshotter, everywhere("io.containerd.checkpoint.snapshotter"));
    match index.manifests.iter().find(|part| part.blob.media_type == IMAGES) {
        Some(part) => images(containerd, report, &part.blob, false).await,
        None => Ok(report),
    }
}

fn annotation(index: &Index, key: &str) -> Option<String> {
    index.annotations.get(key).filter(|text| !text.is_empty()).cloned()
}

fn part(listed: &Listed) -> Part {
    Part {
        media_type: listed.blob.media_type.clone(),
        digest: listed.blob.digest.clone(),
        size: listed.blob.size,
    }
}

async fn json<T: serde::de::DeserializeOwned>(containerd: &Containerd, digest: &str) -> Result<T> {
    let bytes = containerd.read_small_blob(digest, LONGEST).await?;
    serde_json::from_slice(&bytes).with_context(|| format!("the blob {digest} is not readable"))
}

/// Completes `report` with what the archive `blob` has.
async fn images(
    containerd: &Containerd,
    mut report: Report,
    blob: &Descriptor,
    is_export: bool,
) -> Result<Report> {
    let file = Blob {
        containerd: containerd.clone(),
        runtime: Handle::current(),
        digest: blob.digest.clone(),
        size: blob.size,
        at: 0,
        chunk: Vec::new(),
        chunk_at: 0,
        reader: None,
    };
    let open: Open = Box::new(move || untar::uncompressed(file.again()));
    let read = move || {
        let named = || format!("the archive in {}", report.name);
        let mut archive = Archive::read(open).with_context(named)?;
        report.take_records(&mut archive)?;
        if is_export {
            archive.enter("checkpoint/");
            report.take_records(&mut archive)?;
        }
        report.contents = Some(super::contents(&mut archive, &report.name)?);
        Ok(report)
    };
    tokio::task::spawn_blocking(read).await?
}

/// A blob as a file, of which only what is looked at comes here.
struct Blob {
    containerd: Containerd,
    runtime: Handle,
    digest: String,
    size: u64,
    at: u64,
    chunk: Vec<u8>,
    /// Where `chunk` begins.
    chunk_at: u64,
    /// Gives the chunk after it.
    reader: Option<BlobReader>,
}

impl Blob {
    /// The same from its beginning.
    fn again(&self) -> Self {
        Self {
            containerd: self.containerd.clone(),
            runtime: self.runtime.clone(),
            digest: self.digest.clone(),
            size: self.size,
            at: 0,
            chunk: Vec::new(),
            chunk_at: 0,
            reader: None,
        }
    }

    /// What of the chunk is at the place that is read.
    fn here(&self) -> &[u8] {
        let at = self.at.checked_sub(self.chunk_at).and_then(|at| usize::try_from(at).ok());
        at.and_then(|at| self.chunk.get(at..)).unwrap_or_default()
    }

    fn fetch(&mut self) -> crate::containerd::Result<()> {
        let next = self.chunk_at + self.chunk.len() as u64;
        let reader = match self.reader.take() {
            Some(reader) if next == self.at => reader,
            _ => self.runtime.block_on(self.containerd.read_blob(&self.digest, self.at))?,
        };
        let reader = self.reader.insert(reader);
        self.chunk = self.runtime.block_on(reader.chunk())?.unwrap_or_default();
        self.chunk_at = self.at;
        Ok(())
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.size {
            return Ok(0);
        }
        if self.here().is_empty() {
            self.fetch().map_err(io::Error::other)?;
        }
        let here = self.here();
        let length = here.len().min(buffer.len());
        buffer[..length].copy_from_slice(&here[..length]);
        self.at += length as u64;
        Ok(length)
    }
}

impl Seek for Blob {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}
