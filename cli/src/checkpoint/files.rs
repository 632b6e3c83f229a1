//! The writable layer of a container that is checkpointed: as it is while the container stands still,
//! without that it stands still for longer than it takes to see what has changed last.
//!
//! ```text
//!   runs     look(Live)      the upper directory, into a file
//!   frozen   look(Frozen)    what has changed since, into another
//!   runs     layer           both into a snapshot of our own, of which containerd makes a layer
//! ```

use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use ferry_oci::layer::{self, Manifest, Pass};
use ferry_oci::overlay;
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};

use crate::containerd::{
    ContainerRecord, Descriptor, Destination, Error, Mount, SnapshotKind, WritableLayer,
};

/// How the container's files are to be had.
pub(super) enum Files {
    /// It cannot write any.
    ReadOnly,
    /// Below its overlay.
    Overlay {
        /// The upper directory.
        upper: PathBuf,
        /// As it was at the last look.
        seen: Manifest,
        /// What each look has found.
        looks: Vec<PathBuf>,
    },
    /// Only through its snapshotter, while it stands still.
    Snapshot,
}

impl Files {
    /// From what containerd says of the layer.
    ///
    /// # Errors
    /// When the container has no snapshot based on its image.
    pub(super) fn of(
        layer: Result<WritableLayer, Error>,
        record: &ContainerRecord,
    ) -> Result<Self> {
        match layer {
            Ok(WritableLayer { upperdir: None, .. }) => Ok(Self::ReadOnly),
            Ok(WritableLayer { upperdir: Some(upper), .. }) => {
                Ok(Self::Overlay { upper, seen: Manifest::default(), looks: Vec::new() })
            }
            Err(Error::RootFs(why)) if !record.snapshot_key.is_empty() => {
                log::debug!("{why}");
                Ok(Self::Snapshot)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a layer can only be made while the container stands still.
    pub(super) fn stand_still(&self) -> bool {
        matches!(self, Self::Snapshot)
    }

    /// Writes down in `folder` what has changed since the last look.
    ///
    /// # Errors
    /// When the layer cannot be read or the folder has no room.
    pub(super) async fn look(&mut self, pass: Pass, folder: &Path) -> Result<()> {
        let Self::Overlay { upper, seen, looks } = self else { return Ok(()) };
        let to = folder.join(looks.len().to_string());
        let (from, path, before) = (upper.clone(), to.clone(), std::mem::take(seen));
        let looked = tokio::task::spawn_blocking(move || {
            let live = matches!(pass, Pass::Live);
            let mut now = if live { layer::scan(&from)? } else { layer::rescan(&from, &before)? };
            let changes = layer::delta(&before, &now);
            let mut out = BufWriter::with_capacity(1 << 20, File::create(&path)?);
            let encoded = layer::encode(&from, &changes, pass, &mut out)?;
            out.flush()?;
            now.forget(&encoded.unsettled);
            anyhow::Ok(now)
        });
        *seen = looked.await?.context("read the writable layer")?;
        looks.push(to);
        Ok(())
    }

    /// Makes a layer of the files as they were at the last look. With a snapshot, of those it has now.
    ///
    /// # Errors
    /// When containerd cannot.
    pub(super) async fn layer(
        self,
        store: &Destination,
        record: &ContainerRecord,
        chain: &str,
        folder: &Path,
    ) -> Result<Option<Descriptor>> {
        let (snapshotter, name) = (&record.snapshotter, store.migration());
        let view = format!("ferry-{name}-view");
        match self {
            Self::ReadOnly => Ok(None),
            Self::Snapshot => {
                let mounts =
                    store.containerd().snapshot_mounts(snapshotter, &record.snapshot_key).await?;
                Ok(Some(store.diff(snapshotter, chain, &view, mounts).await?))
            }
            Self::Overlay { looks, .. } => {
                let key = format!("ferry-{name}");
                let kind = SnapshotKind::Active;
                let mounts = store.prepare_snapshot(snapshotter, &key, chain, kind).await?;
                let (overlay, at) = (mounts.clone(), folder.join("root"));
                std::fs::create_dir_all(&at).context("make a folder for the files")?;
                // A thread of its own: it sees mounts that nobody else does, and they end with it.
                let write = move || std::thread::spawn(move || write(&overlay, &looks, &at)).join();
                let written = tokio::task::spawn_blocking(write).await?;
                written.map_err(|_| anyhow!("the thread that writes the files has panicked"))??;
                let layer = store.diff(snapshotter, chain, &view, mounts).await?;
                store.containerd().remove_snapshot(snapshotter, &key).await?;
                Ok(Some(layer))
            }
        }
    }
}

/// Writes what was found into the overlay of `mounts`. Leaves this thread in a mount namespace of its own.
fn write(mounts: &[Mount], looks: &[PathBuf], at: &Path) -> Result<()> {
    let [overlay] = mounts else {
        return Err(anyhow!("the snapshotter gives {} mounts, not one overlay", mounts.len()));
    };
    ensure!(overlay.kind == "overlay", "the snapshotter gives a {} mount", overlay.kind);
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).context("a mount namespace")?;
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("keep mounts to this thread")?;
    let mut options = overlay.options.clone();
    if let Some(folder) = overlay::shorten(&mut options) {
        nix::unistd::chdir(&folder).context("enter the folder of the layers")?;
    }
    let (kind, options) = (Some("overlay"), options.join(","));
    mount(kind, at, kind, MsFlags::empty(), Some(options.as_str())).context("mount the overlay")?;
    let written = looks.iter().try_for_each(|look| {
        let file = File::open(look).context("open what was read of the writable layer")?;
        layer::apply(BufReader::with_capacity(1 << 20, file), at).context("write the files")?;
        Ok(())
    });
    umount(at).context("take the overlay down")?;
    written
}
