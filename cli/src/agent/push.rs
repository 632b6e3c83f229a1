//! An image on its way here, with no container. What has come stays for another attempt, under a lease.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::paths;

use super::cleanup;
use super::incoming::Incoming;
use crate::containerd::{BlobWriter, Containerd, Destination as Store};
use crate::lock::{self, Lock};
use crate::wire::messages::{NewImage, Reply, Request};

/// How long the agent of an attempt that was given up may take to end.
const EARLIER: Duration = Duration::from_secs(5);

/// An image on its way.
pub(super) struct Push {
    store: Store,
    writer: Option<BlobWriter>,
    named: bool,
    _lock: Lock,
}

impl Push {
    pub(super) async fn begin(containerd: &Containerd, push: &str) -> Result<Self> {
        ensure!(paths::is_migration_id(push), "{push:?} is no id of a push");
        let lock = lock::take(push, EARLIER).await?;
        let store = containerd.destination(push)?;
        store.create_lease().await?;
        Ok(Self { store, writer: None, named: false, _lock: lock })
    }

    pub(super) async fn answer(&mut self, input: &mut Incoming, request: Request) -> Result<Reply> {
        match request {
            Request::MissingBlobs(blobs) => Ok(Reply::Missing(self.store.missing(&blobs).await?)),
            Request::OpenBlob(blob) => {
                self.writer = self.store.write_blob(&blob).await?;
                let at = self.writer.as_ref().map(BlobWriter::offset);
                Ok(at.map_or(Reply::Done, |offset| Reply::BlobAt { offset }))
            }
            Request::BlobRest => {
                let mut writer = self.writer.take().context("no blob is open")?;
                while let Some(chunk) = input.chunk().await? {
                    writer.write(&chunk).await?;
                }
                writer.commit().await?;
                Ok(Reply::Done)
            }
            Request::NameImage(image) => {
                self.name(&image).await?;
                self.named = true;
                Ok(Reply::Done)
            }
            other => bail!("{other:?} is out of order"),
        }
    }

    async fn name(&self, image: &NewImage) -> Result<()> {
        let made = self.store.create_checkpoint(&image.name, &image.target, &image.labels).await;
        match made {
            Err(error) if error.is_already_exists() => {
                let there = self.store.containerd().image(&image.name).await?;
                let same = there.is_some_and(|there| there.target.digest == image.target.digest);
                let name = &image.name;
                ensure!(same, "there is another image {name}: remove it (ferry discard {name})");
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Whether this is `push`.
    pub(super) fn is(&self, push: &str) -> bool {
        self.store.migration() == push
    }

    /// Makes the image permanent.
    pub(super) async fn finish(self) -> Result<()> {
        ensure!(self.named, "the image has no name yet");
        cleanup::keep(&self.store).await
    }
}
