//! Snapshots: the container's root file system as its snapshotter has it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UpdateSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::types;
use prost_types::FieldMask;
use serde::{Deserialize, Serialize};

use super::client::{Containerd, Destination, MAX_MESSAGE, QUICK};
use super::error::{Doing, Error, Found, Result};
use super::{ContainerRecord, LABEL};

/// Label of what the collector is to leave alone.
const GC_ROOT: &str = "containerd.io/gc.root";

/// A mount that makes (part of) a root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// Type of file system, as `overlay` or `bind`.
    pub(crate) kind: String,
    /// What is mounted.
    pub(crate) source: String,
    /// Where below the root file system; empty for the root file system itself.
    pub(crate) target: String,
    /// Options as in fstab.
    pub(crate) options: Vec<String>,
}

/// What a snapshot is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SnapshotKind {
    /// Can be written.
    Active,
    /// Can only be read.
    View,
    /// Finished; others are based on it.
    Committed,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotInfo {
    /// Its key.
    pub(crate) key: String,
    /// Key of the snapshot it is based on; empty for none.
    pub(crate) parent: String,
    /// What it is for.
    pub(crate) kind: SnapshotKind,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
}

/// Where a container writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WritableLayer {
    /// The upper directory of its overlay; `None` when its root file system is read-only.
    pub(crate) upperdir: Option<PathBuf>,
    /// Its snapshot.
    pub(crate) snapshot: SnapshotInfo,
}

impl Containerd {
    /// The snapshot `key`, if there is one.
    ///
    /// # Errors
    /// [`Error::Call`], also for a snapshotter that this containerd does not have.
    pub(crate) async fn snapshot(
        &self,
        snapshotter: &str,
        key: &str,
    ) -> Result<Option<SnapshotInfo>> {
        let request =
            StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.snapshots().stat(self.request(request, QUICK)).await;
        let answer = answer.doing(|| format!("read snapshot {snapshotter}/{key}")).found()?;
        Ok(answer.and_then(|a| a.into_inner().info).map(SnapshotInfo::from))
    }

    /// The mounts that make the file system of an active or view snapshot.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn snapshot_mounts(&self, snapshotter: &str, key: &str) -> Result<Vec<Mount>> {
        let request = MountsRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.snapshots().mounts(self.request(request, QUICK)).await;
        let answer = answer.doing(|| format!("read the mounts of snapshot {snapshotter}/{key}"))?;
        Ok(answer.into_inner().mounts.into_iter().map(Mount::from).collect())
    }

    /// Where the container writes, after a check that the rest of its root file system is the image whose
    /// layers make the snapshot `chain_id`.
    ///
    /// # Errors
    /// [`Error::RootFs`] for a container without a snapshot and for a snapshotter that does not make an
    /// overlay, [`Error::NotBasedOnImage`], [`Error::Call`].
    pub(crate) async fn writable_layer(
        &self,
        container: &ContainerRecord,
        chain_id: &str,
    ) -> Result<WritableLayer> {
        let (snapshotter, key) = (&container.snapshotter, &container.snapshot_key);
        if key.is_empty() || snapshotter.is_empty() {
            let why = "it is a plain directory (--rootfs), not a snapshot; run the container from an image";
            return Err(Error::RootFs(why.into()));
        }
        let snapshot = self.snapshot(snapshotter, key).await?.ok_or_else(|| {
            Error::RootFs(format!("containerd has lost its snapshot {snapshotter}/{key}"))
        })?;
        if snapshot.parent != chain_id {
            let found = match snapshot.parent.as_str() {
                "" => "nothing".to_owned(),
                parent => parent.to_owned(),
            };
            let expected = chain_id.to_owned();
            return Err(Error::NotBasedOnImage { key: key.clone(), found, expected });
        }
        let upperdir = match snapshot.kind {
            SnapshotKind::View => None,
            _ => Some(upperdir(snapshotter, &self.snapshot_mounts(snapshotter, key).await?)?),
        };
        Ok(WritableLayer { upperdir, snapshot })
    }

    /// Removes a snapshot; one that is not there is fine.
    ///
    /// # Errors
    /// [`Error::Call`]; FAILED_PRECONDITION when others are based on it.
    pub(crate) async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<()> {
        let request =
            RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.snapshots().remove(self.request(request, QUICK)).await;
        answer.doing(|| format!("remove snapshot {snapshotter}/{key}")).found().map(drop)
    }

    /// Keeps the collector from a snapshot that nothing refers to for a while, until
    /// [`Self::release_snapshot`].
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn hold_snapshot(&self, snapshotter: &str, key: &str) -> Result<()> {
        let labels = [(GC_ROOT.to_owned(), "ferry".to_owned())].into();
        let request = UpdateSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            info: Some(Info { name: key.to_owned(), labels, ..Default::default() }),
            update_mask: Some(FieldMask { paths: vec![format!("labels.{GC_ROOT}")] }),
        };
        let answer = self.snapshots().update(self.request(request, QUICK)).await;
        answer.doing(|| format!("hold snapshot {snapshotter}/{key}")).map(drop)
    }

    /// Undoes [`Self::hold_snapshot`]; a snapshot that is not there is fine.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn release_snapshot(&self, snapshotter: &str, key: &str) -> Result<()> {
        self.unlabel_snapshot(snapshotter, key, GC_ROOT).await.found().map(drop)
    }

    /// The snapshots that carry `label` with `value`.
    pub(super) async fn labelled_snapshots(
        &self,
        snapshotter: &str,
        (label, value): (&str, &str),
    ) -> Result<Vec<SnapshotInfo>> {
        let doing = || format!("list snapshots of {snapshotter}");
        let request = ListSnapshotsRequest {
            snapshotter: snapshotter.to_owned(),
            filters: vec![format!("labels.{label:?}=={value:?}")],
        };
        let answer = self.snapshots().list(self.request(request, QUICK)).await;
        let mut stream = answer.doing(doing)?.into_inner();
        let mut found = Vec::new();
        while let Some(message) = stream.message().await.doing(doing)? {
            found.extend(message.info.into_iter().map(SnapshotInfo::from));
        }
        Ok(found)
    }

    pub(super) async fn unlabel_snapshot(
        &self,
        snapshotter: &str,
        key: &str,
        label: &str,
    ) -> Result<()> {
        let request = UpdateSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            info: Some(Info { name: key.to_owned(), ..Default::default() }),
            update_mask: Some(FieldMask { paths: vec![format!("labels.{label}")] }),
        };
        let answer = self.snapshots().update(self.request(request, QUICK)).await;
        answer.doing(|| format!("remove label {label} of snapshot {snapshotter}/{key}")).map(drop)
    }

    pub(super) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

impl Destination {
    /// Makes the snapshot `key` for the container on `parent` (a chain id), marked as this migration's:
    /// a writable one, or a view where the source's was one.
    ///
    /// # Errors
    /// [`Error::Call`]; ALREADY_EXISTS when the key is taken.
    pub(crate) async fn prepare_snapshot(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        kind: SnapshotKind,
    ) -> Result<Vec<Mount>> {
        let labels = [(LABEL.to_owned(), self.migration.clone())].into();
        let (snapshotter, key, parent) =
            (snapshotter.to_owned(), key.to_owned(), parent.to_owned());
        let doing = format!("prepare snapshot {snapshotter}/{key}");
        let mut client = self.leased.snapshots();
        let mounts = if kind == SnapshotKind::View {
            let request = ViewSnapshotRequest { snapshotter, key, parent, labels };
            let answer = client.view(self.leased.request(request, QUICK)).await;
            answer.doing(|| doing)?.into_inner().mounts
        } else {
            let request = PrepareSnapshotRequest { snapshotter, key, parent, labels };
            let answer = client.prepare(self.leased.request(request, QUICK)).await;
            answer.doing(|| doing)?.into_inner().mounts
        };
        Ok(mounts.into_iter().map(Mount::from).collect())
    }
}

/// The upper directory of the overlay that `mounts` make.
///
/// # Errors
/// [`Error::RootFs`] when they make none.
fn upperdir(snapshotter: &str, mounts: &[Mount]) -> Result<PathBuf> {
    let overlay = match mounts {
        [mount] if mount.kind == "overlay" => mount,
        _ => {
            let why = format!("snapshotter {snapshotter} does not make one overlay; use overlayfs");
            return Err(Error::RootFs(why));
        }
    };
    if overlay.options.iter().any(|o| o == "userxattr") {
        let why = "its overlay keeps its marks in user xattrs (rootless containerd)";
        return Err(Error::RootFs(why.into()));
    }
    let upper = overlay.options.iter().find_map(|o| o.strip_prefix("upperdir="));
    upper
        .map(PathBuf::from)
        .ok_or_else(|| Error::RootFs("its overlay has no upper directory".into()))
}

impl From<types::Mount> for Mount {
    fn from(m: types::Mount) -> Self {
        Self { kind: m.r#type, source: m.source, target: m.target, options: m.options }
    }
}

impl From<Mount> for types::Mount {
    fn from(m: Mount) -> Self {
        Self { r#type: m.kind, source: m.source, target: m.target, options: m.options }
    }
}

impl From<Info> for SnapshotInfo {
    fn from(info: Info) -> Self {
        let kind = match info.kind() {
            Kind::Active | Kind::Unknown => SnapshotKind::Active,
            Kind::View => SnapshotKind::View,
            Kind::Committed => SnapshotKind::Committed,
        };
        let labels = info.labels.into_iter().collect();
        Self { key: info.name, parent: info.parent, kind, labels }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        Mount { kind: kind.into(), source: kind.into(), target: String::new(), options }
    }

    #[test]
    fn the_upper_directory_is_found_in_an_overlay_and_nowhere_else() {
        let good = mount("overlay", &["index=off", "workdir=/w", "upperdir=/u/fs", "lowerdir=/l"]);
        assert_eq!(
            upperdir("overlayfs", std::slice::from_ref(&good)).unwrap(),
            PathBuf::from("/u/fs")
        );
        for bad in [
            vec![],
            vec![mount("bind", &["rw", "rbind"])],
            vec![good.clone(), good.clone()],
            vec![mount("overlay", &["lowerdir=/l"])],
            vec![mount("overlay", &["upperdir=/u", "userxattr"])],
        ] {
            assert!(matches!(upperdir("x", &bad), Err(Error::RootFs(_))), "{bad:?}");
        }
    }
}
