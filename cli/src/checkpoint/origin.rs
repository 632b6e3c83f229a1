//! What a container is restored from: a checkpoint that is an image in containerd, or one that is a file.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use ferry_oci::paths::CHECKPOINT_IMAGES;

use super::archive;
use super::blobs;
use super::format::{self, Checkpoint, Summary};
use super::import::Import;
use super::place::Place;
use crate::containerd::{Containerd, Descriptor, Destination, Image, TypedBytes};
use crate::inspect::{Found, find};
use crate::wire::messages::ContainerdAddress;
use crate::wire::stream;

/// Type of a spec, as containerd's clients write it.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// Where it comes from.
pub(super) enum Origin {
    /// An image.
    Image(Checkpoint),
    /// A file, unpacked.
    Archive(Arc<Import>),
}

/// The image of the container.
pub(super) struct Base {
    /// What it is called.
    pub(super) name: String,
    /// What it is; `None` if only its name is known.
    pub(super) target: Option<Descriptor>,
}

impl Origin {
    /// Finds the checkpoint `name`: a file of that name comes first, as for `ferry inspect`. The file is
    /// unpacked into `place`.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub(super) async fn open(containerd: &Containerd, name: &str, place: &Place) -> Result<Self> {
        let Found::File(file) = find(name)? else {
            return Checkpoint::open(containerd, name).await.map(Self::Image);
        };
        let (images, folder) = (place.folder(CHECKPOINT_IMAGES)?, place.folder("archive")?);
        let unpack = move || Import::unpack(&file, &images, &folder);
        let import = tokio::task::spawn_blocking(unpack).await??;
        Ok(Self::Archive(Arc::new(import)))
    }

    /// Our summary, if it has one.
    ///
    /// # Errors
    /// When it is of a newer ferry, or is none.
    pub(super) async fn summary(&self, containerd: &Containerd) -> Result<Option<Summary>> {
        match self {
            Self::Image(checkpoint) => checkpoint.summary(containerd).await,
            Self::Archive(import) => Ok(import.summary.clone()),
        }
    }

    /// The id that its container had, if that is known.
    pub(super) fn id(&self, summary: Option<&Summary>) -> Option<String> {
        match self {
            Self::Image(_) => summary.map(|summary| summary.container.clone()),
            Self::Archive(import) => import.id(),
        }
    }

    /// Has CRIU's images in `folder`.
    ///
    /// # Errors
    /// When they cannot be read or written.
    pub(super) async fn images(&self, containerd: &Containerd, folder: &Path) -> Result<()> {
        let Self::Image(checkpoint) = self else { return Ok(()) };
        let blob = checkpoint.index.part(format::IMAGES).context("no images of CRIU")?;
        let mut reader = containerd.read_blob(&blob.digest, 0).await?;
        let (to, from) = stream::reader();
        let folder = folder.to_owned();
        let unpack = tokio::task::spawn_blocking(move || archive::unpack(from, &folder));
        while let Some(chunk) = reader.chunk().await? {
            // It has ended and says why.
            if to.send(chunk).await.is_err() {
                break;
            }
        }
        drop(to);
        unpack.await?.context("unpack the checkpoint")
    }

    /// The spec of the container, if it has one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) async fn spec(&self, containerd: &Containerd) -> Result<Option<TypedBytes>> {
        match self {
            Self::Image(checkpoint) => {
                let any = checkpoint.any(containerd, format::SPEC).await?;
                Ok(any.map(|any| TypedBytes { type_url: any.type_url, value: any.value }))
            }
            Self::Archive(import) => {
                let value = serde_json::to_vec(&import.spec).context("write the spec")?;
                Ok(Some(TypedBytes { type_url: SPEC_TYPE.to_owned(), value }))
            }
        }
    }

    /// The image of the container, as far as it is known.
    ///
    /// # Errors
    /// When a file's is not here.
    pub(super) async fn base(
        &self,
        containerd: &Containerd,
        at: &ContainerdAddress,
    ) -> Result<Base> {
        match self {
            Self::Image(checkpoint) => {
                let mut parts = checkpoint.index.manifests.iter().map(|part| &part.blob);
                Ok(Base {
                    name: checkpoint.index.image_name().unwrap_or_default().to_owned(),
                    target: parts.find(|blob| format::is_image(&blob.media_type)).cloned(),
                })
            }
            Self::Archive(import) => {
                let Image { name, target, .. } = import.base(containerd, &at.namespace).await?;
                Ok(Base { name, target: Some(target) })
            }
        }
    }

    /// The snapshotter that the container had, if that is known.
    pub(super) fn snapshotter(&self) -> Option<&String> {
        match self {
            Self::Image(checkpoint) => checkpoint.index.annotations.get(format::SNAPSHOTTER),
            Self::Archive(_) => None,
        }
    }

    /// The layer of what the container has changed, in the content store; `None` if it has none.
    ///
    /// # Errors
    /// When it cannot be brought there.
    pub(super) async fn layer(&self, store: &Destination) -> Result<Option<Descriptor>> {
        match self {
            Self::Image(checkpoint) => Ok(checkpoint.index.part(format::LAYER).cloned()),
            Self::Archive(import) => {
                let import = import.clone();
                let write = move |out: &mut dyn std::io::Write| import.write_layer(out);
                blobs::stream(store, format::PLAIN_LAYER, write).await.map(Some)
            }
        }
    }
}
