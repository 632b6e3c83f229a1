//! The folder in which a checkpoint is put together or taken apart. On a disk: it holds all the memory.
//!
//! A command that was killed leaves its folder, and what it had begun in containerd. Whoever comes next
//! settles that: what is not complete goes, and a container that runs stays.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use ferry_oci::paths::{CHECKPOINT_STARTED as STARTED, CHECKPOINTS as PLACES};
use serde::{Deserialize, Serialize};

use crate::agent::cleanup;
use crate::containerd::{Containerd, Destination as Store, TaskStatus};
use crate::lock::{self, Lock};
use crate::network::address::Cidr;

/// What a restore changes, in its folder.
const PLAN: &str = "restore.json";
/// Name of a file elsewhere that goes with it.
const COVERED: &str = "covered";

/// A folder that goes with its owner.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    leave: bool,
    _lock: Lock,
}

/// What a restore changes of what is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The container.
    pub(super) container: String,
    /// The snapshot that it had, if it was there before: snapshotter and key.
    pub(super) snapshot: Option<(String, String)>,
    /// Key of the one that it gets.
    pub(super) own: String,
    /// The address that is to come.
    pub(super) ip: Option<Cidr>,
}

impl Place {
    /// Makes the folder `id`, and settles what commands have left that were killed.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) async fn make(containerd: &Containerd, namespace: &str, id: &str) -> Result<Self> {
        sweep(containerd, namespace).await;
        let lock = lock::take(&name(id), Duration::ZERO).await?;
        let path = Path::new(PLACES).join(format!("{namespace}.{id}"));
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("make {}", path.display()))?;
        Ok(Self { path, leave: false, _lock: lock })
    }

    /// The folder `name` in it, made if missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// Should this command be killed, the next one removes `file`, which is unfinished then.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub(super) fn covers(&self, file: &Path) -> Result<()> {
        let written = fs::write(self.path.join(COVERED), file.as_os_str().as_bytes());
        written.context("write down what is unfinished")
    }

    /// Writes down what a restore is about to change.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn plan(&self, plan: &Plan) -> Result<()> {
        let bytes = serde_json::to_vec(plan).context("write down what is to change")?;
        fs::write(self.path.join(PLAN), bytes).context("write down what is to change")
    }

    /// From now on the restored container is nothing to undo, whatever becomes of it.
    pub(super) fn started(&self) {
        if let Err(error) = fs::write(self.path.join(STARTED), "") {
            log::warn!("write down that the container has started: {error}");
        }
    }

    /// Leaves the folder to the next command, which settles what could not be undone.
    pub(super) fn leave(&mut self) {
        self.leave = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.leave {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            log::warn!("remove {}: {error}", self.path.display());
        }
    }
}

fn name(id: &str) -> String {
    format!("checkpoint-{id}")
}

async fn sweep(containerd: &Containerd, namespace: &str) {
    let Ok(entries) = fs::read_dir(PLACES) else { return };
    for entry in entries.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let Some((_, id)) = file.rsplit_once('.').filter(|(there, _)| *there == namespace) else {
            continue;
        };
        let Ok(_lock) = lock::take(&name(id), Duration::ZERO).await else { continue };
        let settled = settle(containerd, id, &entry.path()).await;
        if let Err(error) = settled {
            log::warn!("settle what a command has left in {}: {error:#}", entry.path().display());
        }
    }
}

async fn settle(containerd: &Containerd, id: &str, folder: &Path) -> Result<()> {
    let store = containerd.destination(id)?;
    let plan = match fs::read(folder.join(PLAN)) {
        Ok(bytes) => Some(serde_json::from_slice::<Plan>(&bytes).context("decode its plan")?),
        Err(_) => None,
    };
    match plan {
        None => cleanup::remove(&store, None).await?,
        Some(plan) => {
            let task = containerd.task(&plan.container).await?;
            let lives = task.is_some_and(|task| {
                !matches!(task.status, TaskStatus::Created | TaskStatus::Stopped)
            });
            if lives || folder.join(STARTED).exists() {
                keep(containerd, &store, &plan).await?;
            } else {
                undo(containerd, &plan).await?;
                cleanup::remove(&store, plan.ip).await?;
            }
        }
    }
    if let Ok(file) = fs::read(folder.join(COVERED)) {
        match fs::remove_file(Path::new(OsStr::from_bytes(&file))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).context("remove what is unfinished");
            }
            _ => {}
        }
    }
    fs::remove_dir_all(folder).context("remove it")
}

/// Makes permanent what a restore has made; the snapshot that its container had before goes.
///
/// # Errors
/// When containerd refuses.
pub(super) async fn keep(containerd: &Containerd, store: &Store, plan: &Plan) -> Result<()> {
    cleanup::keep(store).await?;
    let Some((snapshotter, key)) = &plan.snapshot else { return Ok(()) };
    match containerd.container(&plan.container).await? {
        Some(container) if container.snapshot_key == *key => Ok(()),
        _ => Ok(containerd.remove_snapshot(snapshotter, key).await?),
    }
}

/// Gives a container that was there before its snapshot back, if it has lost it.
///
/// # Errors
/// When its new task does not end, or containerd refuses.
pub(super) async fn undo(containerd: &Containerd, plan: &Plan) -> Result<()> {
    /// How long processes may take to end.
    const PATIENCE: Duration = Duration::from_secs(20);
    let Some((snapshotter, key)) = &plan.snapshot else { return Ok(()) };
    let container = &plan.container;
    if containerd.container(container).await?.is_some_and(|c| c.snapshot_key == plan.own) {
        containerd.end_task(container, PATIENCE).await?;
        containerd.set_snapshot(container, key).await?;
    }
    Ok(containerd.release_snapshot(snapshotter, key).await?)
}
