//! Writable layers as blobs: what a snapshot has that its parent has not.

use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::{ApplyRequest, DiffRequest};
use containerd_client::types;

use super::client::{Destination, SLOW};
use super::content::Descriptor;
use super::error::{Doing, Error, Result};
use super::snapshots::{Mount, SnapshotKind};

/// What a layer is made as.
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

impl Destination {
    /// Makes a blob of the changes that the snapshot behind `mounts` has against `parent`. A snapshot of
    /// the name `view` is there meanwhile.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn diff(
        &self,
        snapshotter: &str,
        parent: &str,
        view: &str,
        mounts: Vec<Mount>,
    ) -> Result<Descriptor> {
        let left = self.prepare_snapshot(snapshotter, view, parent, SnapshotKind::View).await?;
        let request = DiffRequest {
            left: left.into_iter().map(Into::into).collect(),
            right: mounts.into_iter().map(Into::into).collect(),
            media_type: LAYER.to_owned(),
            r#ref: format!("{}-layer", self.lease),
            labels: Default::default(),
            source_date_epoch: None,
        };
        let mut client = DiffClient::new(self.leased.channel());
        let answer = client.diff(self.leased.request(request, SLOW)).await;
        let answer = answer.doing(|| "make a layer of the changed files".into());
        self.plain.remove_snapshot(snapshotter, view).await?;
        let made = answer?.into_inner().diff;
        let made = made.ok_or_else(|| Error::invalid("the layer of the changed files", "none"))?;
        let size = u64::try_from(made.size).map_err(|e| Error::invalid("size of a layer", e))?;
        Ok(Descriptor { media_type: made.media_type, digest: made.digest, size })
    }

    /// Writes the changes in `layer` into the snapshot behind `mounts`. Digest of the layer, uncompressed.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn apply(
        &self,
        layer: &Descriptor,
        mounts: Vec<types::Mount>,
    ) -> Result<String> {
        let request = ApplyRequest {
            diff: Some(layer.clone().into()),
            mounts,
            payloads: Default::default(),
            sync_fs: false,
        };
        let mut client = DiffClient::new(self.leased.channel());
        let answer = client.apply(self.leased.request(request, SLOW)).await;
        let applied = answer.doing(|| format!("unpack layer {}", layer.digest))?.into_inner();
        Ok(applied.applied.unwrap_or_default().digest)
    }
}
