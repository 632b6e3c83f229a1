//! One container: its task, its execs, and the lock under which they change.
//!
//! Two locks, so that a dump of seconds does not hide the task from `State`:
//! - `op` orders the slow work. Whatever changes the task's state takes it for writing; what only
//!   needs the state to stay (exec, kill) takes it for reading, and a kill does not wait for an exec that
//!   is being started. Events are sent while it is held, which is why a task's exit is never reported
//!   before its start.
//! - `inner` guards the few fields, for moments only, never across an await.

mod arrival;
mod attempt;
mod checkpoint;
mod create;
mod exec;
mod exit;
#[cfg(test)]
pub(crate) mod fake;
mod lifecycle;
mod network;
mod op;
mod pages;
mod part;
mod predump;
mod prepared;
mod relay;
mod resources;
mod restore;
mod silent;
mod unfinished;

pub(crate) use checkpoint::CheckpointParams;
pub(crate) use create::CreateRequest;
pub(crate) use exec::{Exec, ExecRequest};
pub(crate) use exit::noted as noted_exit;
pub(crate) use network::Network;
pub(crate) use prepared::{Extras, PreparedDump, PreparedRestore};
pub(crate) use restore::{Held, HoldParams, RestoreParams};
pub(crate) use silent::Silent;

use crate::cgroup::{Cgroup, oom};
use crate::error::{Context as _, Error, Result};
use crate::events::{Events, Heard};
use crate::io::{ChildStdio, ProcessIo, Stdio};
use crate::options::TaskOptions;
use crate::reaper::Exit;
use crate::runtime::Runtime;
use crate::state::{Op, Status, admit};
use oci_spec::runtime::Spec;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A container and its task.
pub(crate) struct Container {
    id: String,
    namespace: String,
    bundle: PathBuf,
    stdio: Stdio,
    options: TaskOptions,
    runtime: Runtime,
    events: Arc<Events>,
    /// The container has no pid namespace of its own: its processes outlive init.
    shares_pids: bool,
    op: op::Ops,
    /// The pre-dumps that a dump may build on.
    pre_dumps: predump::PreDumps,
    stream: pages::Stream,
    inner: Mutex<Inner>,
    exited: watch::Sender<Option<Exit>>,
}

struct Inner {
    status: Status,
    pid: u32,
    io: Option<ProcessIo>,
    /// The process's ends of the pipes, until a restore takes them.
    child_io: Option<ChildStdio>,
    /// Images to restore from, of a task created from a checkpoint.
    checkpoint: Option<PathBuf>,
    execs: HashMap<String, Arc<Exec>>,
    /// Once there is a process, until the task is deleted.
    cgroup: Option<Arc<Cgroup>>,
    /// Until the exit of init.
    oom: Option<oom::Watch>,
    /// Of the exit of init.
    heard: Option<Heard>,
    reserved: Option<String>,
}

/// Where a task is at this moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Snapshot {
    pub(crate) status: Status,
    /// Pid of init in the shim's pid namespace; 0 before there is one. Kept after the exit.
    pub(crate) pid: u32,
    pub(crate) exit: Option<Exit>,
}

/// Keeps the Task API from changing the container, see [`Container::reserve`].
pub(crate) struct Reservation(Arc<Container>);

impl Drop for Reservation {
    fn drop(&mut self) {
        self.0.inner().reserved = None;
    }
}

impl Container {
    /// Its id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Its containerd namespace.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Absolute path of its bundle.
    pub(crate) fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Streams as given to Create, and whether there is a terminal.
    pub(crate) fn stdio(&self) -> &Stdio {
        &self.stdio
    }

    /// runc: binary, root, and how to run its commands.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Status, pid and exit.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let inner = self.inner();
        Snapshot { status: inner.status, pid: inner.pid, exit: *self.exited.borrow() }
    }

    /// The images a task that is not restored yet was created from.
    pub(crate) fn checkpoint_path(&self) -> Option<PathBuf> {
        self.inner().checkpoint.clone()
    }

    /// Ids of the execs that have not been deleted.
    pub(crate) fn exec_ids(&self) -> Vec<String> {
        let mut ids: Vec<_> = self.inner().execs.keys().cloned().collect();
        ids.sort();
        ids
    }

    /// Pids of all processes, in the shim's pid namespace; none before the start and after the
    /// exit.
    pub(crate) async fn pids(&self) -> Result<Vec<u32>> {
        match self.snapshot().status {
            Status::Created | Status::Running | Status::Pausing | Status::Paused => {
                self.runtime.pids(&self.id).await
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The pid of an init whose exit containerd has not heard of. Until it has, such a process is
    /// one that has not been waited for; and a containerd that comes back deletes, with the exit
    /// code, what says that it has no process.
    pub(crate) fn unheard_exit(&self) -> Option<u32> {
        let inner = self.inner();
        let unheard = inner.heard.as_ref().is_some_and(|heard| !heard.yet());
        (inner.status == Status::Stopped && unheard && inner.pid != 0).then_some(inner.pid)
    }

    /// Waits until the exit of init has been published.
    pub(crate) async fn wait(&self) -> Exit {
        wait(&self.exited).await
    }

    /// [`Container::wait`] for at most `limit`; DEADLINE_EXCEEDED after it.
    pub(crate) async fn wait_exited(&self, limit: Duration) -> Result<Exit> {
        tokio::time::timeout(limit, self.wait()).await.map_err(|_| {
            Error::deadline_exceeded(format!("task {} has not exited in {limit:?}", self.id))
        })
    }

    /// Refuses everything that the Task API could change of the container (start, exec, kill,
    /// pause, resume, checkpoint, delete) with FAILED_PRECONDITION, until the reservation is
    /// dropped. `reason` completes "the container ...". One at a time. The internal API
    /// ([`Container::checkpoint`], [`Container::restore_held`], ...) is not affected.
    pub(crate) fn reserve(self: &Arc<Self>, reason: &str) -> Result<Reservation> {
        let mut inner = self.inner();
        if let Some(reason) = &inner.reserved {
            return Err(Error::failed_precondition(format!("the container {reason}")));
        }
        inner.reserved = Some(reason.to_string());
        Ok(Reservation(self.clone()))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the Task API may do `op` now.
    fn admit(&self, op: Op) -> Result<()> {
        let inner = self.inner();
        match &inner.reserved {
            Some(reason) => {
                Err(Error::failed_precondition(format!("cannot {op}: the container {reason}")))
            }
            None => admit(inner.status, op),
        }
    }

    fn set_status(&self, status: Status) {
        self.inner().status = status;
    }

    /// Folder for CRIU's logs, made if missing.
    fn work_dir(&self) -> PathBuf {
        match self.options.criu_work_path.as_str() {
            "" => self.bundle.join("work"),
            path => path.into(),
        }
    }

    /// The bundle's spec.
    fn spec(&self) -> Result<Spec> {
        let config = std::fs::read(self.bundle.join("config.json"));
        let config = config.context("read the bundle's spec")?;
        serde_json::from_slice(&config).context("read the bundle's spec")
    }

    fn init_pid_file(&self) -> PathBuf {
        self.bundle.join("init.pid")
    }

    fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }
}

async fn wait(exited: &watch::Sender<Option<Exit>>) -> Exit {
    let mut receiver = exited.subscribe();
    match receiver.wait_for(Option::is_some).await {
        Ok(exit) => exit.unwrap_or_else(|| Exit::now(255)),
        // The sender is borrowed: it cannot be gone.
        Err(_) => Exit::now(255),
    }
}

/// Reads a pid that runc has written.
fn read_pid(path: &Path) -> Result<i32> {
    let text = std::fs::read_to_string(path)
        .map_err(|err| Error::internal(format!("read {}: {err}", path.display())))?;
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(Error::internal(format!("{} holds {text:?} instead of a pid", path.display()))),
    }
}
