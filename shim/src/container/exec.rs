//! Further processes in a container.

use super::{Container, read_pid};
use crate::error::{Context as _, Error, Result};
use crate::io::{self, ProcessIo, Setup, Stdio};
use crate::reaper::{Child, Exit};
use crate::service::timestamp;
use crate::state::{Op, Status};
use containerd_shim::protos::events::task::{TaskExecAdded, TaskExecStarted, TaskExit};
use ferry_oci::runc;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

const SIGKILL: u32 = 9;

/// What Exec is given.
pub(crate) struct ExecRequest {
    pub(crate) exec_id: String,
    pub(crate) stdio: Stdio,
    /// The OCI `process` object as JSON.
    pub(crate) process: Vec<u8>,
}

/// One exec, from Exec to Delete.
pub(crate) struct Exec {
    id: String,
    stdio: Stdio,
    process: Vec<u8>,
    /// Held by whatever changes the state.
    op: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
    exited: watch::Sender<Option<Exit>>,
}

struct Inner {
    status: Status,
    pid: u32,
    io: Option<ProcessIo>,
    /// Its client has closed stdin, perhaps before the start.
    stdin_closed: bool,
}

impl Exec {
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn stdio(&self) -> &Stdio {
        &self.stdio
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Status, pid and exit.
    pub(crate) fn snapshot(&self) -> super::Snapshot {
        let inner = self.inner();
        super::Snapshot { status: inner.status, pid: inner.pid, exit: *self.exited.borrow() }
    }

    pub(super) fn is_running(&self) -> bool {
        self.snapshot().status == Status::Running
    }

    /// Waits until its exit has been published.
    pub(crate) async fn wait(&self) -> Exit {
        super::wait(&self.exited).await
    }

    /// Lets stdin end.
    pub(crate) fn close_stdin(&self) {
        let mut inner = self.inner();
        inner.stdin_closed = true;
        if let Some(io) = &mut inner.io {
            io.close_stdin();
        }
    }

    /// Sets the size of its terminal, if it has one.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let inner = self.inner();
        match &inner.io {
            _ if inner.status == Status::Stopped => {
                Err(Error::failed_precondition("cannot resize an exec that is stopped"))
            }
            Some(io) => io.resize(columns, rows),
            None => Ok(()),
        }
    }

    async fn drain(&self) {
        let pending = self.inner().io.as_ref().map(ProcessIo::pending);
        io::drained(pending.unwrap_or_default(), super::exit::STALL).await;
    }

    fn record_exit(&self, exit: Exit) {
        self.inner().status = Status::Stopped;
        self.exited.send_replace(Some(exit));
    }
}

impl Container {
    /// Adds an exec; ALREADY_EXISTS if the id is taken.
    pub(crate) async fn exec(&self, request: ExecRequest) -> Result<()> {
        // The id becomes part of file names.
        if request.exec_id.is_empty() || request.exec_id.contains('/') {
            let text = format!("{:?} is not an exec id", request.exec_id);
            return Err(Error::invalid_argument(text));
        }
        let _op = self.op.read().await;
        self.admit(Op::Exec)?;
        let exec = Exec {
            id: request.exec_id.clone(),
            process: process(&request.process, request.stdio.terminal)?,
            stdio: request.stdio,
            op: tokio::sync::Mutex::new(()),
            inner: Mutex::new(Inner {
                status: Status::Created,
                pid: 0,
                io: None,
                stdin_closed: false,
            }),
            exited: watch::Sender::new(None),
        };
        {
            let mut inner = self.inner();
            if inner.execs.contains_key(&exec.id) {
                let text = format!("exec {:?} already exists", exec.id);
                return Err(Error::already_exists(text));
            }
            inner.execs.insert(exec.id.clone(), Arc::new(exec));
        }
        self.events.send(TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: request.exec_id,
            ..Default::default()
        });
        Ok(())
    }

    /// The exec `id`; NOT_FOUND if there is none.
    pub(crate) fn get_exec(&self, id: &str) -> Result<Arc<Exec>> {
        self.inner().execs.get(id).cloned().ok_or_else(|| not_found(id))
    }

    /// All execs that have not been deleted.
    pub(crate) fn execs(&self) -> Vec<Arc<Exec>> {
        self.inner().execs.values().cloned().collect()
    }

    /// Runs the process of an exec; returns its pid.
    pub(crate) async fn start_exec(self: &Arc<Self>, id: &str) -> Result<u32> {
        // Many execs start at the same time, and init's exit waits for them.
        let _op = self.op.start_exec().await;
        self.admit(Op::Exec)?;
        let exec = self.get_exec(id)?;
        let exec_op = exec.op.lock().await;
        match exec.snapshot().status {
            Status::Created => {}
            // Meanwhile.
            Status::Deleted => return Err(not_found(id)),
            status => {
                let text = format!("cannot start an exec that is {status}");
                return Err(Error::failed_precondition(text));
            }
        }
        let child = match self.run_exec(&exec).await {
            Ok(child) => child,
            Err(err) => {
                exec.record_exit(Exit::now(255));
                return Err(err);
            }
        };
        let pid = child.pid() as u32;
        {
            let mut inner = exec.inner();
            inner.status = Status::Running;
            inner.pid = pid;
            let closed = inner.stdin_closed;
            if let Some(io) = &mut inner.io {
                io.started();
                if closed {
                    io.close_stdin();
                }
            }
        }
        self.events.send(TaskExecStarted {
            container_id: self.id.clone(),
            exec_id: id.to_string(),
            pid,
            ..Default::default()
        });
        drop(exec_op);
        let container = self.clone();
        tokio::spawn(async move { container.supervise_exec(exec, child).await });
        Ok(pid)
    }

    async fn run_exec(&self, exec: &Exec) -> Result<Child> {
        // Init has files there too, and an exec may be called so.
        let file = |ending: &str| TempFile(self.bundle.join(format!("exec-{}.{ending}", exec.id)));
        let process = file("process.json");
        let pid_file = file("pid");
        std::fs::write(&process.0, &exec.process).context("write the exec's process")?;
        let owner = (self.options.io_uid, self.options.io_gid);
        let (id, namespace, reaper) = (&exec.id, &self.namespace, &self.runtime.reaper);
        let setup = Setup { id, namespace, owner, restored: false, reaper };
        let (mut io, child_io) = ProcessIo::open(&exec.stdio, &setup).await?;
        let console_socket = io.console_socket();
        let verb = runc::Exec {
            id: &self.id,
            process: &process.0,
            pid_file: &pid_file.0,
            console_socket: console_socket.as_deref(),
        };
        let window = reaper.window();
        self.runtime.spawn(&verb, child_io).await?;
        let child = window.adopt(read_pid(&pid_file.0)?);
        if let Err(err) = io.connect_terminal().await {
            let _ = reaper.signal(child.pid(), SIGKILL);
            return Err(err);
        }
        exec.inner().io = Some(io);
        Ok(child)
    }

    async fn supervise_exec(&self, exec: Arc<Exec>, mut child: Child) {
        let exit = child.wait().await;
        exec.drain().await;
        let _op = exec.op.lock().await;
        self.tell_oom();
        self.events.send(TaskExit {
            container_id: self.id.clone(),
            id: exec.id.clone(),
            pid: child.pid() as u32,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        });
        exec.record_exit(exit);
    }

    /// Sends a signal to an exec's process.
    pub(crate) async fn kill_exec(&self, id: &str, signal: u32) -> Result<()> {
        let exec = self.get_exec(id)?;
        let snapshot = exec.snapshot();
        match snapshot.status {
            Status::Created => Err(Error::failed_precondition("process not started")),
            Status::Running => self.runtime.reaper.signal(snapshot.pid as i32, signal),
            _ => Err(Error::not_found("process already finished")),
        }
    }

    /// Forgets an exec that does not run.
    pub(crate) async fn delete_exec(&self, id: &str) -> Result<super::Snapshot> {
        let exec = self.get_exec(id)?;
        let _op = exec.op.lock().await;
        let mut snapshot = exec.snapshot();
        match snapshot.status {
            Status::Running => {
                return Err(Error::failed_precondition("cannot delete an exec that is running"));
            }
            Status::Deleted => return Err(not_found(id)),
            _ => {}
        }
        exec.drain().await;
        self.inner().execs.remove(id);
        let io = {
            let mut inner = exec.inner();
            // Somebody may have found it before, and wait to start it.
            inner.status = Status::Deleted;
            inner.io.take()
        };
        if let Some(io) = io {
            io.close().await;
        }
        snapshot.exit.get_or_insert_with(|| Exit::now(0));
        Ok(snapshot)
    }
}

fn not_found(id: &str) -> Error {
    Error::not_found(format!("exec {id:?} not found"))
}

/// The process with its terminal as the request wants it, whatever it says itself.
fn process(json: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let invalid = |err| Error::invalid_argument(format!("read the exec's process: {err}"));
    let mut process: serde_json::Map<_, _> = serde_json::from_slice(json).map_err(invalid)?;
    process.insert("terminal".to_string(), terminal.into());
    serde_json::to_vec(&process).context("write the exec's process")
}

struct TempFile(PathBuf);

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::fake;
    use containerd_shim::protos::ttrpc::Code;
    use std::time::Duration;
    use tokio::time::{sleep, timeout};

    const A_MOMENT: Duration = Duration::from_millis(50);

    #[test]
    fn a_kill_does_not_wait_for_an_exec_that_is_being_started() {
        fake::with(|fake| async move {
            let container = fake.with_exec("t", "e").await;
            fake.stop_at("exec");
            let starting = container.clone();
            let start = tokio::spawn(async move { starting.start_exec("e").await });
            fake.until_stopped("exec").await;
            // It would change the state, and has to wait for the start.
            let waiting = container.clone();
            let delete = tokio::spawn(async move { waiting.delete().await });
            sleep(A_MOMENT).await;
            let killed = timeout(Duration::from_secs(5), container.kill(9, false)).await;
            assert!(!delete.is_finished() && !start.is_finished());
            killed.expect("the kill waits").unwrap();
            fake.go_on("exec", "succeed");
            start.await.unwrap().unwrap();
            let err = delete.await.unwrap().unwrap_err();
            assert_eq!(err.code(), Code::FAILED_PRECONDITION);
        });
    }

    #[test]
    fn an_exec_that_is_deleted_before_its_start_does_not_run() {
        fake::with(|fake| async move {
            let container = fake.with_exec("t", "e").await;
            let exec = container.get_exec("e").unwrap();
            let op = exec.op.lock().await;
            let (first, second, third) = (container.clone(), container.clone(), container.clone());
            let delete = tokio::spawn(async move { first.delete_exec("e").await });
            sleep(A_MOMENT).await;
            let start = tokio::spawn(async move { second.start_exec("e").await });
            let again = tokio::spawn(async move { third.delete_exec("e").await });
            sleep(A_MOMENT).await;
            drop(op);
            delete.await.unwrap().unwrap();
            assert_eq!(start.await.unwrap().unwrap_err().code(), Code::NOT_FOUND);
            assert_eq!(again.await.unwrap().unwrap_err().code(), Code::NOT_FOUND);
            assert_eq!(exec.snapshot().pid, 0);
        });
    }

    #[test]
    fn an_exec_called_init_leaves_the_files_of_init_alone() {
        fake::with(|fake| async move {
            let container = fake.with_exec("t", "init").await;
            let pid = container.start_exec("init").await.unwrap();
            let init = read_pid(&container.init_pid_file()).unwrap();
            assert_eq!(init.cast_unsigned(), container.snapshot().pid);
            assert_ne!(init.cast_unsigned(), pid);
        });
    }

    #[test]
    fn the_request_decides_whether_there_is_a_terminal() {
        let of = |json: &str, terminal| {
            let process = process(json.as_bytes(), terminal).unwrap();
            serde_json::from_slice::<serde_json::Value>(&process).unwrap()
        };
        let made = of(r#"{"args":["sh"],"terminal":true}"#, false);
        assert_eq!(made, serde_json::json!({"args": ["sh"], "terminal": false}));
        assert_eq!(of("{}", true)["terminal"], true);
        assert_eq!(process(b"", true).unwrap_err().code(), Code::INVALID_ARGUMENT);
        assert_eq!(process(b"[]", true).unwrap_err().code(), Code::INVALID_ARGUMENT);
    }
}
