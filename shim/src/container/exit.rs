//! The end of a task.

use super::Container;
use crate::reaper::{Child, Exit};
use crate::service::timestamp;
use crate::state::Status;
use containerd_shim::protos::events::task::TaskExit;
use ferry_oci::runc::Kill;
use log::{debug, warn};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// How long an exit waits for output that nobody reads.
pub(super) const STALL: Duration = Duration::from_secs(1);
/// How long the exit of init waits for the exits of execs, which the kernel has killed.
const EXECS: Duration = Duration::from_secs(10);

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
