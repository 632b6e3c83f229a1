//! Layers become snapshots.

use containerd_client::services::v1::snapshots::{CommitSnapshotRequest, PrepareSnapshotRequest};
use containerd_client::types;

use super::LABEL;
use super::client::{Destination, QUICK};
use super::content::Descriptor;
use super::error::{Doing, Error, Result};
use super::manifests::Layer;

/// Tells a snapshotter that can fetch layers by itself which one is about to be made.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// Tells other clients what a layer's blob contains.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

impl Destination {
    /// Makes the snapshots of an image whose blobs are all here, unless they are here too, and gives
    /// the name of the topmost: the parent for the container's snapshot. `chain_id` is that name as the
    /// source has it, used to choose where an index offers several manifests.
    ///
    /// # Errors
    /// Those of [`super::Containerd::image_content`]; [`Error::Invalid`] for a layer that is not what the
    /// config says; [`Error::Call`].
    pub(crate) async fn unpack(
        &self,
        target: &Descriptor,
        snapshotter: &str,
        chain_id: Option<&str>,
    ) -> Result<String> {
        let content = self.plain.image_content(target, chain_id).await?;
        let mut parent = String::new();
        for layer in &content.layers {
            self.unpack_layer(snapshotter, &parent, layer).await?;
            parent.clone_from(&layer.chain_id);
        }
        self.refer(&content.config.digest, snapshotter, &parent).await?;
        Ok(parent)
    }

    async fn unpack_layer(&self, snapshotter: &str, parent: &str, layer: &Layer) -> Result<()> {
        let chain_id = &layer.chain_id;
        if self.have(snapshotter, chain_id).await? {
            return Ok(());
        }
        let key = format!("extract-{}-{chain_id}", self.lease);
        // What an agent left that was killed here is of unknown completeness.
        self.plain.remove_snapshot(snapshotter, &key).await?;
        let labels = [
            (SNAPSHOT_REF.to_owned(), chain_id.clone()),
            (LABEL.to_owned(), self.migration.clone()),
        ];
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.clone(),
            parent: parent.to_owned(),
            labels: labels.into(),
        };
        let answer = self.leased.snapshots().prepare(self.leased.request(request, QUICK)).await;
        let mounts = match answer.doing(|| format!("prepare snapshot {snapshotter}/{key}")) {
            Ok(answer) => answer.into_inner().mounts,
            // A snapshotter that fetches layers by itself answers that it has this one.
            Err(e) if e.is_already_exists() && self.have(snapshotter, chain_id).await? => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let made = self.extract(snapshotter, &key, layer, mounts).await;
        if made.is_err() {
            // The error that is known says more than one about what it left; cleanup finds that too.
            let _ = self.plain.remove_snapshot(snapshotter, &key).await;
        }
        match made {
            Err(e) if e.is_already_exists() && self.have(snapshotter, chain_id).await? => Ok(()),
            other => other,
        }
    }

    async fn extract(
        &self,
        snapshotter: &str,
        key: &str,
        layer: &Layer,
        mounts: Vec<types::Mount>,
    ) -> Result<()> {
        let digest = self.apply(&layer.blob, mounts).await?;
        if digest != layer.diff_id {
            let why = format!("contains {digest}, not {} as the image says", layer.diff_id);
            return Err(Error::invalid(format!("layer {}", layer.blob.digest), why));
        }
        // Without this migration's label: others may build on it from here on, and the collector owns it.
        let request = CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: layer.chain_id.clone(),
            key: key.to_owned(),
            labels: [(SNAPSHOT_REF.to_owned(), layer.chain_id.clone())].into(),
        };
        let answer = self.leased.snapshots().commit(self.leased.request(request, QUICK)).await;
        answer.doing(|| format!("commit snapshot {snapshotter}/{}", layer.chain_id))?;
        let label = (UNCOMPRESSED.to_owned(), layer.diff_id.clone());
        self.plain.label_blob(&layer.blob.digest, [label]).await
    }

    /// Whether the snapshot is there; then it is also covered by the lease.
    async fn have(&self, snapshotter: &str, chain_id: &str) -> Result<bool> {
        let kind = format!("snapshots/{snapshotter}");
        if self.plain.snapshot(snapshotter, chain_id).await?.is_none() {
            return Ok(false);
        }
        self.cover(&kind, chain_id).await?;
        // It could have been collected before it was covered.
        Ok(self.plain.snapshot(snapshotter, chain_id).await?.is_some())
    }

    /// Makes the image's config keep the snapshots alive, as containerd's own client does, and marks that as
    /// this migration's doing, unless it was so before.
    async fn refer(&self, config: &str, snapshotter: &str, chain_id: &str) -> Result<()> {
        let reference = reference(snapshotter);
        let info = self.plain.blob_info(config).await?.unwrap_or_default();
        if info.labels.get(&reference).is_some_and(|there| there == chain_id) || chain_id.is_empty()
        {
            return Ok(());
        }
        let labels = [(reference, chain_id.to_owned()), (LABEL.to_owned(), self.migration.clone())];
        self.plain.label_blob(config, labels).await
    }
}

/// Label by which a blob keeps a snapshot alive.
pub(super) const GC_REF_SNAPSHOT: &str = "containerd.io/gc.ref.snapshot.";

fn reference(snapshotter: &str) -> String {
    format!("{GC_REF_SNAPSHOT}{snapshotter}")
}
