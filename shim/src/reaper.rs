//! The one place where children are waited for.
//!
//! The shim is a subreaper: runc's `create`, `exec --detach` and `restore --detach` leave their
//! container process to it. All exits are collected here by waitpid(-1), and handed to whoever has
//! registered the pid. Nothing is lost:
//! - a child of ours is registered under the lock that its spawn and every reap take;
//! - a container process is known only once runc has written its pid, and may be dead by then. A
//!   [`Window`] opened before runc is started keeps the exits that nobody has claimed yet.
//!
//! Nobody else in this process may wait for a child: neither tokio's process driver nor
//! `std::process::Command::output`. [`Reaper::run`] takes their place.

use crate::error::{Context as _, Error, Result};
use log::{debug, warn};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 and the signal's number.
    pub(crate) status: u32,
    /// When it was reaped.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An exit with `status`, now.
    pub(crate) fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub(crate) struct Output {
    /// As in [`Exit`].
    pub(crate) status: u32,
    /// Standard output.
    pub(crate) stdout: Vec<u8>,
    /// Standard error.
    pub(crate) stderr: Vec<u8>,
}

#[derive(Default)]
struct State {
    watched: HashMap<i32, (u64, oneshot::Sender<Exit>)>,
    /// Exits nobody had registered, with their place in the order of events.
    strays: Vec<(u64, i32, Exit)>,
    windows: usize,
    clock: u64,
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn watch(&mut self, pid: i32) -> (u64, oneshot::Receiver<Exit>) {
        let token = self.tick();
        let (sender, receiver) = oneshot::channel();
        self.watched.insert(pid, (token, sender));
        (token, receiver)
    }

    fn exited(&mut self, pid: i32, exit: Exit) {
        let now = self.tick();
        match self.watched.remove(&pid) {
            Some((_, sender)) => drop(sender.send(exit)),
            None if self.windows > 0 => self.strays.push((now, pid, exit)),
            None => debug!("reaped {pid}, which nobody waits for"),
        }
    }
}

/// Collects the exits of all children.
#[derive(Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
}

impl Reaper {
    /// Starts collecting. Needs a tokio runtime.
    pub(crate) fn start() -> Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child()).context("listen for SIGCHLD")?;
        let collector = reaper.clone();
        tokio::spawn(async move {
            loop {
                collector.collect();
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(reaper)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect(&self) {
        let mut state = self.lock();
        loop {
            let (pid, status) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code as u32),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as u32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(err) => return warn!("waitpid: {err}"),
            };
            state.exited(pid.as_raw(), Exit::now(status));
        }
    }

    /// Starts `command` in a process group of its own.
    pub(crate) fn spawn(self: &Arc<Self>, mut command: Command) -> Result<Child> {
        command.process_group(0);
        let mut state = self.lock();
        let child = command.spawn().context(format!("run {:?}", command.get_program()))?;
        let pid = child.id() as i32;
        let (token, exit) = state.watch(pid);
        Ok(Child { reaper: self.clone(), pid, token, exit, done: None })
    }

    /// Runs `command` to its end and collects what it prints. When `deadline` has passed, its whole
    /// process group is killed.
    pub(crate) async fn run(
        self: &Arc<Self>,
        command: Command,
        deadline: Duration,
    ) -> Result<Output> {
        self.run_fed(command, Stdio::null(), deadline).await
    }

    /// [`Reaper::run`] with an input.
    pub(crate) async fn run_fed(
        self: &Arc<Self>,
        mut command: Command,
        stdin: Stdio,
        deadline: Duration,
    ) -> Result<Output> {
        let (out, stdout) = capture()?;
        let (err, stderr) = capture()?;
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        let name = format!("{:?}", command.get_program());
        let mut child = self.spawn(command)?;
        let done = async { tokio::join!(child.wait(), read(out), read(err)) };
        match tokio::time::timeout(deadline, done).await {
            Ok((exit, stdout, stderr)) => Ok(Output { status: exit.status, stdout, stderr }),
            Err(_) => {
                child.kill_group();
                Err(Error::deadline_exceeded(format!("{name} took longer than {deadline:?}")))
            }
        }
    }

    /// Keeps the exits of yet unknown processes until the window is dropped.
    pub(crate) fn window(self: &Arc<Self>) -> Window {
        let mut state = self.lock();
        state.windows += 1;
        Window { reaper: self.clone(), since: state.tick() }
    }

    /// Sends `signal` to a process that is registered here. It cannot hit another process that got
    /// the same pid: a pid is free only after it has been reaped.
    pub(crate) fn signal(&self, pid: i32, signal: u32) -> Result<()> {
        let signal = i32::try_from(signal).unwrap_or(-1);
        let state = self.lock();
        if pid <= 0 || !state.watched.contains_key(&pid) {
            return Err(Error::not_found("process already finished"));
        }
        // Not nix's Signal: it has no real-time signals.
        match raw_kill(pid, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(Error::not_found("process already finished")),
            Err(Errno::EINVAL) => Err(Error::invalid_argument(format!("{signal} is not a signal"))),
            Err(err) => Err(err).context(format!("send signal {signal}")),
        }
    }
}

// One call, which takes numbers only.
#[allow(unsafe_code)]
fn raw_kill(pid: i32, signal: i32) -> nix::Result<()> {
    // SAFETY: kill(2) takes two integers and touches no memory.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// A process that is registered.
pub(crate) struct Child {
    reaper: Arc<Reaper>,
    pid: i32,
    token: u64,
    exit: oneshot::Receiver<Exit>,
    done: Option<Exit>,
}

impl Child {
    /// Its pid.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for its end. May be called again, and may be cancelled.
    pub(crate) async fn wait(&mut self) -> Exit {
        if let Some(exit) = self.done {
            return exit;
        }
        // The sender lives in the registry until the exit is sent.
        let exit = (&mut self.exit).await.unwrap_or_else(|_| Exit::now(255));
        self.done = Some(exit);
        exit
    }

    /// Kills the process and its group. Only for children that were spawned here: those lead a
    /// group of their own.
    pub(crate) fn kill_group(&self) {
        if self.done.is_none()
            && let Err(err) = kill(Pid::from_raw(-self.pid), Signal::SIGKILL)
            && err != Errno::ESRCH
        {
            warn!("kill process group {}: {err}", self.pid);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let mut state = self.reaper.lock();
        if state.watched.get(&self.pid).is_some_and(|(token, _)| *token == self.token) {
            state.watched.remove(&self.pid);
        }
    }
}

/// Keeps unclaimed exits, see [`Reaper::window`].
pub(crate) struct Window {
    reaper: Arc<Reaper>,
    since: u64,
}

impl Window {
    /// Registers `pid`, which may have exited since the window was opened.
    pub(crate) fn adopt(&self, pid: i32) -> Child {
        let mut state = self.reaper.lock();
        let stray = state.strays.iter().position(|(at, p, _)| *at > self.since && *p == pid);
        let done = stray.map(|at| state.strays.remove(at).2);
        let (token, exit) = match done {
            Some(_) => (0, oneshot::channel().1),
            None => state.watch(pid),
        };
        drop(state);
        Child { reaper: self.reaper.clone(), pid, token, exit, done }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let mut state = self.reaper.lock();
        state.windows -= 1;
        if state.windows == 0 {
            state.strays.clear();
        }
    }
}

fn capture() -> Result<(pipe::Receiver, Stdio)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make a pipe")?;
    let read = pipe::Receiver::from_owned_fd(read).context("make a pipe")?;
    Ok((read, write.into()))
}

async fn read(mut from: pipe::Receiver) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Err(err) = from.read_to_end(&mut bytes).await {
        warn!("read a command's output: {err}");
    }
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    // Exits are collected for the whole process, so all tests share one reaper and one runtime.
    pub(crate) fn with_reaper<F: Future<Output = ()>>(test: impl FnOnce(Arc<Reaper>) -> F) {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let limit = Duration::from_secs(120);
        runtime
            .block_on(async { tokio::time::timeout(limit, test(Reaper::start().unwrap())).await })
            .expect("an exit was lost");
    }

    fn sh(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn exits_signals_and_output_arrive() {
        with_reaper(|reaper| async move {
            let limit = Duration::from_secs(20);
            let output = reaper.run(sh("echo out; echo err >&2; exit 7"), limit).await.unwrap();
            assert_eq!((output.status, &output.stdout[..]), (7, &b"out\n"[..]));
            assert_eq!(output.stderr, b"err\n");
            assert_eq!(reaper.run(sh("kill -9 $$"), limit).await.unwrap().status, 137);
            assert!(reaper.run(Command::new("/nonexistent"), limit).await.is_err());
            let err = reaper.run(sh("sleep 100"), Duration::from_millis(50)).await.unwrap_err();
            assert_eq!(err.code(), containerd_shim::protos::ttrpc::Code::DEADLINE_EXCEEDED);
        });
    }

    #[test]
    fn no_exit_of_many_short_children_is_lost() {
        with_reaper(|reaper| async move {
            let mut children: Vec<_> =
                (0..200).map(|_| reaper.spawn(Command::new("/bin/true")).unwrap()).collect();
            for child in &mut children {
                let exit = tokio::time::timeout(Duration::from_secs(20), child.wait()).await;
                assert_eq!(exit.unwrap().status, 0);
            }
        });
    }

    #[test]
    fn a_window_keeps_the_exit_of_a_process_not_yet_known() {
        with_reaper(|reaper| async move {
            let window = reaper.window();
            let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
            let mut command = sh("read line; exit 3");
            command.stdin(read);
            let child = reaper.spawn(command).unwrap();
            let pid = child.pid();
            drop(child); // unregistered: like a container's init that runc has left to us
            drop(write); // not before, or it might have ended while it was registered
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!(window.adopt(pid).wait().await.status, 3);
            assert!(reaper.signal(pid, 0).is_err());
        });
    }
}
