//! The end of a task.

use super::Container;
use crate::reaper::{Child, Exit};
use crate::service::timestamp;
use crate::state::Status;
use containerd_shim::protos::events::task::TaskExit;
use ferry_oci::runc::Kill;
use log::{debug, warn};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};
use tokio::time::timeout;

/// How long an exit waits for output that nobody reads.
pub(super) const STALL: Duration = Duration::from_secs(1);
/// How long the exit of init waits for the exits of execs, which the kernel has killed.
const EXECS: Duration = Duration::from_secs(10);

/// File in the bundle that says how its container ended: the shim may end before anybody has asked.
const NOTE: &str = "ferry-exit";

fn note(bundle: &Path, exit: Exit) -> std::io::Result<()> {
    let since = exit.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = format!("{} {} {}", exit.status, since.as_secs(), since.subsec_nanos());
    std::fs::write(bundle.join(NOTE), text)
}

/// How the container of a bundle ended, if its shim has heard of it.
pub(crate) fn noted(bundle: &Path) -> Option<Exit> {
    let text = std::fs::read_to_string(bundle.join(NOTE)).ok()?;
    let mut fields = text.split(' ');
    let status = fields.next()?.parse().ok()?;
    let since = Duration::new(fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(Exit { status, at: UNIX_EPOCH + since })
}

impl Container {
    /// Waits for the end of init and reports it.
    pub(super) fn supervise(self: &Arc<Self>, mut init: Child) {
        let container = self.clone();
        tokio::spawn(async move {
            let exit = init.wait().await;
            container.init_exited(init.pid(), exit).await;
        });
    }

    /// The exit of init is the last one of the container that is published, and it is published
    /// after all output has been handed on.
    async fn init_exited(&self, pid: i32, exit: Exit) {
        let _op = self.op.write().await;
        if self.shares_pids {
            let kill = Kill { id: &self.id, signal: 9, all: true };
            if let Err(err) = self.runtime.call(&kill).await {
                debug!("kill what init has left: {err}");
            }
        }
        let execs: Vec<_> = self.inner().execs.values().cloned().collect();
        for exec in execs.iter().filter(|exec| exec.is_running()) {
            if timeout(EXECS, exec.wait()).await.is_err() {
                warn!("exec {} outlives init {pid}", exec.id());
            }
        }
        self.drain().await;
        self.record_exit(exit);
        self.no_more_pre_dumps().await;
    }

    /// Publishes the end of the task, once. The caller holds `op`.
    pub(super) fn record_exit(&self, exit: Exit) {
        self.tell_oom();
        if self.exited.borrow().is_none()
            && let Err(err) = note(&self.bundle, exit)
        {
            warn!("note the exit of {}: {err}", self.id);
        }
        let pid = {
            let mut inner = self.inner();
            if self.exited.borrow().is_some() {
                return;
            }
            inner.status = Status::Stopped;
            inner.oom = None;
            inner.pid
        };
        let heard = self.events.send(TaskExit {
            container_id: self.id.clone(),
            id: self.id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        });
        self.inner().heard = Some(heard);
        self.exited.send_replace(Some(exit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_read_as_it_was_noted_and_nothing_else_is_one() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(noted(bundle.path()), None);
        let exit = Exit::now(42);
        note(bundle.path(), exit).unwrap();
        assert_eq!(noted(bundle.path()), Some(exit));
        std::fs::write(bundle.path().join(NOTE), "42 x").unwrap();
        assert_eq!(noted(bundle.path()), None);
    }
}
