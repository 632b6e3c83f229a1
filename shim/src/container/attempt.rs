//! A restore under way, and what becomes of one that fails.

use super::Container;
use super::checkpoint::explain;
use super::silent::blocking;
use crate::error::Error;
use crate::reaper::{Child, Exit, Window};
use crate::runtime::Running;
use crate::strays;
use log::warn;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::timeout;

/// How long a refused restore may take to undo itself.
const UNDO: Duration = Duration::from_secs(20);
/// How long CRIU may take to end its tasks in good order.
const ORDERLY: Duration = Duration::from_millis(500);
/// Exit code of a task that was never restored.
const NEVER_RAN: u32 = 128 + 9;

/// A restore under way: runc, and what is needed to take over the process it makes.
pub(super) struct Attempt {
    pub(super) runc: Running,
    pub(super) window: Window,
    /// CRIU's log, which ends with the task.
    pub(super) log: PathBuf,
    /// Where it is kept if the restore fails.
    pub(super) logs: PathBuf,
}

impl Attempt {
    /// Says what CRIU said, and keeps its log.
    pub(super) fn failed(&self, err: Error) -> Error {
        let err = explain(err, "restore", &self.log);
        let kept = self.logs.join("criu-restore.log");
        let copied = std::fs::create_dir_all(&self.logs);
        match copied.and_then(|()| std::fs::copy(&self.log, &kept)) {
            Ok(_) => err.also(format!("CRIU's log is {}", kept.display())),
            Err(error) => {
                warn!("keep CRIU's log: {error}");
                err
            }
        }
    }
}

impl Container {
    /// The restore has failed or was refused: nothing of it is left and the task is stopped.
    /// Holds `op`.
    pub(super) async fn never_ran(&self, attempt: &mut Attempt, init: Option<&Child>) {
        if let Some(init) = init {
            let _ = self.runtime.reaper.signal(init.pid(), 9);
        }
        // CRIU ends its tasks itself, unless it was killed.
        if timeout(ORDERLY, attempt.runc.child.wait()).await.is_err() {
            self.kill_tasks();
        }
        if let Err(err) = attempt.runc.wait(UNDO).await {
            log::debug!("the restore of {} has ended: {err}", self.id);
        }
        if let Err(err) = self.runtime.delete(&self.id, true).await {
            warn!("remove a failed restore of {}: {err}", self.id);
        }
        let bundle = self.bundle.clone();
        let removed = blocking(move || strays::remove_cgroups(&bundle)).await;
        if let Err(err) = removed.and_then(|removed| removed) {
            warn!("remove the cgroups of {}: {err}", self.id);
        }
        strays::give_up_claim(&self.bundle);
        self.record_exit(Exit::now(NEVER_RAN));
    }

    /// Kills whatever a restore has made that has come to no good: runc would wait 10 s for it, and leave
    /// it alive.
    pub(super) fn kill_tasks(&self) {
        if let Err(err) = strays::kill_members(&self.bundle) {
            warn!("kill the tasks of {}: {err}", self.id);
        }
    }
}
