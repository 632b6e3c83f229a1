//! Start, kill, pause, resume and delete of a task.

use super::{Container, Snapshot};
use crate::cleanup;
use crate::error::{Context as _, Error, Result};
use crate::io;
use crate::mounts;
use crate::reaper::Exit;
use crate::state::{Op, Status, admit};
use containerd_shim::protos::events::task::{TaskDelete, TaskPaused, TaskResumed, TaskStart};
use ferry_oci::freezer::Freezer;
use ferry_oci::paths;
use ferry_oci::runc::{Kill, Pause, Resume, Start};
use log::{debug, warn};
use std::sync::Arc;
use std::time::Duration;

/// A signal that a frozen process only gets once it is thawed; runc sees to that, crun does not.
const SIGKILL: u32 = 9;
/// How long a freezer may take to thaw.
const FREEZER: Duration = Duration::from_secs(5);
/// How often runc may try to freeze a container.
const FREEZES: u32 = 3;
/// How long vforks may take to end; what has not ended then is left to the dump.
const VFORKS: Duration = Duration::from_secs(1);
/// What it says when it could not.
const UNFROZEN: &str = "unable to freeze";

impl Container {
    /// Runs the process of a created task, or restores one created from a checkpoint. Returns the
    /// pid of init.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<u32> {
        if self.snapshot().status == Status::Pending {
            self.admit(Op::Restore)?;
            return self.restore_checkpoint().await;
        }
        let _op = self.op.write().await;
        self.admit(Op::Start)?;
        self.runtime.call(&Start { id: &self.id }).await?;
        Ok(self.started())
    }

    /// The task runs: says so. The caller holds `op`.
    pub(super) fn started(&self) -> u32 {
        let pid = {
            let mut inner = self.inner();
            inner.status = Status::Running;
            if let Some(io) = &mut inner.io {
                io.started();
            }
            inner.pid
        };
        let container_id = self.id.clone();
        self.events.send(TaskStart { container_id, pid, ..Default::default() });
        pid
    }

    /// Sends a signal to init, or to all processes.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        let _op = self.op.read().await;
        self.admit(Op::Kill)?;
        match self.runtime.call(&Kill { id: &self.id, signal, all }).await {
            Ok(_) if signal == SIGKILL => {
                self.thaw_the_killed().await;
                Ok(())
            }
            Ok(_) => Ok(()),
            // runc finds init dead before its exit has been reported here.
            Err(_) if !self.is_alive() => Err(Error::not_found("process already finished")),
            Err(err) => Err(err),
        }
    }

    /// crun leaves a paused container frozen, which then does not end.
    async fn thaw_the_killed(&self) {
        let snapshot = self.snapshot();
        if snapshot.status != Status::Paused {
            return;
        }
        let thaw = move || Freezer::of(snapshot.pid)?.thaw(FREEZER);
        // With runc it has been thawed, and may have ended.
        if let Ok(Err(err)) = tokio::task::spawn_blocking(thaw).await {
            debug!("thaw a killed container: {err}");
        }
    }

    /// Kills every process, whatever the state and whoever has reserved the container. For
    /// shim/src/ferry; the exit is published as always.
    pub(super) async fn kill_all(&self) -> Result<()> {
        admit(self.snapshot().status, Op::Kill)?;
        let kill = Kill { id: &self.id, signal: SIGKILL, all: true };
        match self.runtime.call(&kill).await {
            Err(err) if self.is_alive() => Err(err),
            _ => Ok(()),
        }
    }

    fn is_alive(&self) -> bool {
        let pid = self.snapshot().pid as i32;
        self.runtime.reaper.signal(pid, 0).is_ok() && !is_zombie(pid)
    }

    /// Freezes all processes.
    pub(crate) async fn pause(&self) -> Result<()> {
        let _op = self.op.write().await;
        self.admit(Op::Pause)?;
        self.set_status(Status::Pausing);
        if let Err(err) = self.freeze_by_runc().await {
            self.set_status(Status::Running);
            return Err(err);
        }
        self.set_status(Status::Paused);
        let container_id = self.id.clone();
        self.events.send(TaskPaused { container_id, ..Default::default() });
        Ok(())
    }

    /// Freezes all processes; nobody hears of it. A freezer of cgroup v1 may not get hold of all
    /// processes of a busy machine in the time that runc gives it. runc has thawed them then.
    pub(crate) async fn freeze_by_runc(&self) -> Result<()> {
        let mut attempts = FREEZES;
        loop {
            attempts -= 1;
            match self.runtime.call(&Pause { id: &self.id }).await {
                Err(err) if attempts > 0 && err.to_string().contains(UNFROZEN) => debug!("{err}"),
                done => {
                    done?;
                    return self.finish_vforks().await;
                }
            }
        }
    }

    /// runc may stop a program in the middle of a vfork, where it can never be dumped.
    async fn finish_vforks(&self) -> Result<()> {
        let Ok(freezer) = Freezer::of(self.snapshot().pid) else { return Ok(()) };
        let frozen = tokio::task::spawn_blocking(move || freezer.freeze(VFORKS)).await;
        frozen.context("freeze")?.context("freeze").map(drop)
    }

    /// Thaws all processes.
    pub(crate) async fn resume(&self) -> Result<()> {
        let _op = self.op.write().await;
        self.admit(Op::Resume)?;
        self.runtime.call(&Resume { id: &self.id }).await?;
        self.set_status(Status::Running);
        let container_id = self.id.clone();
        self.events.send(TaskResumed { container_id, ..Default::default() });
        Ok(())
    }

    /// Removes the task: runc's state, the streams, the root file system. When that fails the task stays as
    /// it was, stopped at the latest, and may be deleted again.
    pub(crate) async fn delete(&self) -> Result<Snapshot> {
        let _op = self.op.write().await;
        self.admit(Op::Delete)?;
        self.drain().await;
        // A created container has a process that still waits to be started.
        let created = self.snapshot().status == Status::Created;
        self.runtime.delete(&self.id, created).await?;
        if created {
            // Its exit handler waits for `op`: the exit is then published after the delete.
            self.record_exit(Exit::now(128 + SIGKILL));
        }
        let (io, child_io) = {
            let mut inner = self.inner();
            (inner.io.take(), inner.child_io.take())
        };
        drop(child_io);
        self.end_pre_dumps().await;
        if let Some(io) = io {
            io.close().await;
        }
        if let Err(err) = cleanup::remove(&paths::terminal(&self.namespace, &self.id)) {
            warn!("the FIFOs of a terminal stay: {err}");
        }
        // Somebody may be in it.
        mounts::umount_async(self.rootfs()).await?;
        let execs = {
            let mut inner = self.inner();
            inner.status = Status::Deleted;
            std::mem::take(&mut inner.execs)
        };
        drop(execs);
        let mut snapshot = self.snapshot();
        let exit = *snapshot.exit.get_or_insert_with(|| Exit::now(0));
        self.events.send(TaskDelete {
            container_id: self.id.clone(),
            pid: snapshot.pid,
            exit_status: exit.status,
            exited_at: crate::service::timestamp(exit.at),
            ..Default::default()
        });
        Ok(snapshot)
    }

    /// Hands on what the process has written, as far as somebody reads it.
    pub(super) async fn drain(&self) {
        let pending = self.inner().io.as_ref().map(io::ProcessIo::pending);
        io::drained(pending.unwrap_or_default(), super::exit::STALL).await;
    }

    /// Sets the size of init's terminal, if it has one.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.inner().io.as_ref().map_or(Ok(()), |io| io.resize(columns, rows))
    }

    /// Lets stdin end.
    pub(crate) fn close_stdin(&self) {
        if let Some(io) = &mut self.inner().io {
            io.close_stdin();
        }
    }
}

fn is_zombie(pid: i32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(err) => {
            warn!("read the state of {pid}: {err}");
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::fake;
    use containerd_shim::protos::ttrpc::Code;

    #[test]
    fn a_task_whose_removal_fails_stays_stopped_and_can_be_deleted_again() {
        fake::with(|fake| async move {
            let container = fake.containers.create(fake.request("t")).await.unwrap();
            // What cannot be found cannot be unmounted.
            std::os::unix::fs::symlink("rootfs", container.rootfs()).unwrap();
            let failed = fake.containers.delete("t").await.unwrap_err();
            assert!(failed.to_string().contains("unmount"), "{failed}");
            let left = container.snapshot();
            assert_eq!(left.status, Status::Stopped);
            std::fs::remove_file(container.rootfs()).unwrap();
            let deleted = fake.containers.delete("t").await.unwrap();
            assert_eq!((left.exit, left.pid), (deleted.exit, deleted.pid));
            assert_eq!(container.delete().await.unwrap_err().code(), Code::NOT_FOUND);
        });
    }
}
