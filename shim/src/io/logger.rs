//! Log programs: `binary://` and `binary-v2://`.
//!
//! ```text
//!   stdout ── pipe ──> 3 ┐
//!   stderr ── pipe ──> 4 │ log program
//!   shim  <── pipe ─── 5 ┘ closed when it is ready; binary-v2 writes a byte before
//! ```
//! What the process writes does not pass the shim. The shim keeps the writing ends until the
//! process has exited and the program has taken everything: then its input ends, and so does it.

use super::pipes;
use super::uri::Program;
use crate::error::{Context as _, Error, Result};
use crate::reaper::{Child, Reaper};
use command_fds::{CommandFdExt, FdMapping};
use log::{debug, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// How long it may take to be ready.
const READY: Duration = Duration::from_secs(30);
/// How long it may take to end, once its input has ended.
const END: Duration = Duration::from_secs(5);
/// How long it may take to end, once it has been sent SIGTERM.
const TERMINATE: Duration = Duration::from_secs(10);
/// How much of its messages is kept of one that does not become ready.
const MESSAGES: u64 = 4096;
/// How long the last of them are waited for: a process that it has left may hold the pipe.
const LAST: Duration = Duration::from_millis(500);

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;
/// Of the kernel's flags of a process: it is ending.
const PF_EXITING: u64 = 0x4;

/// Whose output it logs.
pub(super) struct Subject<'a> {
    /// Container, or exec.
    pub(super) id: &'a str,
    /// containerd namespace.
    pub(super) namespace: &'a str,
    /// Who may reopen the pipes through /proc.
    pub(super) owner: (u32, u32),
}

/// A log program that runs.
pub(super) struct Logger {
    pid: i32,
    reaper: Arc<Reaper>,
    pipes: Arc<Pipes>,
    ended: watch::Receiver<bool>,
}

/// The writing ends of its pipes, until the process has exited.
pub(super) struct Pipes(Mutex<Option<[OwnedFd; 2]>>);

impl Logger {
    /// Starts `program` and waits until it is ready.
    pub(super) async fn start(
        program: &Program,
        subject: &Subject<'_>,
        reaper: &Arc<Reaper>,
    ) -> Result<Self> {
        let name = program.path.display();
        let (stdout, stdout_end) = pipes::make(subject.owner)?;
        let (stderr, stderr_end) = pipes::make(subject.owner)?;
        let (ready, ready_end) = pipes::make((0, 0))?;
        let (messages, messages_end) = pipes::make((0, 0))?;
        let mut command = Command::new(&program.path);
        command.args(&program.args).env_clear();
        command.env("CONTAINER_ID", subject.id).env("CONTAINER_NAMESPACE", subject.namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages_end);
        let fds = [stdout, stderr, ready_end];
        let fds = (3..).zip(fds).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(fds.collect()).context("hand pipes to the log program")?;
        let mut child = reaper.spawn(command).map_err(|err| err.context("log program"))?;

        let mut ready = pipe::Receiver::from_owned_fd(ready).context("use a pipe")?;
        let mut messages = pipe::Receiver::from_owned_fd(messages).context("use a pipe")?;
        let mut byte = [0];
        let failed = match timeout(READY, ready.read(&mut byte)).await {
            Ok(Ok(1)) => None,
            // Those that know nothing of the byte only close it.
            Ok(Ok(_)) if !program.strict && !is_ending(child.pid()) => None,
            Ok(Ok(_)) => Some("has ended before it was ready".to_string()),
            Ok(Err(err)) => Some(format!("cannot be waited for: {err}")),
            Err(_) => Some(format!("is not ready after {READY:?}")),
        };
        if let Some(failed) = failed {
            child.kill_group();
            let status = child.wait().await.status;
            let mut said = Vec::new();
            let _ = timeout(LAST, (&mut messages).take(MESSAGES).read_to_end(&mut said)).await;
            let said = match String::from_utf8_lossy(&said).trim() {
                "" => format!("exit status {status}"),
                said => said.to_string(),
            };
            return Err(Error::internal(format!("the log program {name} {failed}: {said}")));
        }
        let pid = child.pid();
        let pipes = Arc::new(Pipes(Mutex::new(Some([stdout_end, stderr_end]))));
        let (sender, ended) = watch::channel(false);
        let task = watch_over(child, messages, name.to_string(), pipes.clone(), sender);
        tokio::spawn(task);
        Ok(Self { pid, reaper: reaper.clone(), pipes, ended })
    }

    /// The ends for a process's stdout and stderr.
    pub(super) fn ends(&self) -> Result<[OwnedFd; 2]> {
        let pipes = self.pipes.lock();
        let [stdout, stderr] = pipes.as_ref().ok_or_else(|| Error::internal("pipes are closed"))?;
        let copy = |end: &OwnedFd| end.try_clone().context("duplicate a pipe");
        Ok([copy(stdout)?, copy(stderr)?])
    }

    pub(super) fn pipes(&self) -> Arc<Pipes> {
        self.pipes.clone()
    }

    /// Waits for its end, which no more input brings about; or else signals do.
    pub(super) async fn end(&self) {
        end(self.pid, &self.reaper, &self.pipes, self.ended.clone()).await;
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.pipes.close();
        if !*self.ended.borrow()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (pid, reaper, pipes) = (self.pid, self.reaper.clone(), self.pipes.clone());
            let ended = self.ended.clone();
            runtime.spawn(async move { end(pid, &reaper, &pipes, ended).await });
        }
    }
}

impl Pipes {
    fn lock(&self) -> MutexGuard<'_, Option<[OwnedFd; 2]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        *self.lock() = None;
    }

    /// Bytes that the program has yet to take.
    fn held(&self) -> u64 {
        let pipes = self.lock();
        let read_by_some = |end: &&OwnedFd| {
            let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
            let ready = poll(&mut fds, PollTimeout::ZERO).ok().and(fds[0].revents());
            !ready.is_some_and(|ready| ready.contains(PollFlags::POLLERR))
        };
        let ends = pipes.iter().flatten().filter(read_by_some);
        ends.map(|end| rustix::io::ioctl_fionread(end).unwrap_or_default()).sum()
    }

    /// The process has exited. Waits until the program has taken all that was written, or has taken
    /// nothing for `stall`; then its input ends.
    pub(super) async fn drained(&self, stall: Duration) {
        let (mut held, mut since) = (self.held(), Instant::now());
        // What is taken, if others that have the pipe do not write meanwhile.
        let mut rest = held;
        while held > 0 && rest > 0 {
            sleep(Duration::from_millis(1)).await;
            let now = self.held();
            if now < held {
                rest = rest.saturating_sub(held - now);
                since = Instant::now();
            } else if since.elapsed() > stall {
                debug!("the log program takes no output, the exit is reported without it");
                break;
            }
            held = now;
        }
        self.close();
    }
}

/// Passes its messages on to the shim's log, and says when it has ended.
async fn watch_over(
    mut child: Child,
    messages: pipe::Receiver,
    name: String,
    pipes: Arc<Pipes>,
    ended: watch::Sender<bool>,
) {
    let exit = loop {
        let more = tokio::select! {
            exit = child.wait() => break exit,
            ready = messages.readable() => ready.is_ok() && pass_on(&messages, &name),
        };
        if !more {
            break child.wait().await;
        }
    };
    pass_on(&messages, &name);
    if pipes.lock().is_some() {
        warn!("{name} has ended with status {} before its container", exit.status);
    }
    ended.send_replace(true);
}

/// False when there will be no more.
fn pass_on(messages: &pipe::Receiver, name: &str) -> bool {
    let mut buffer = [0; MESSAGES as usize];
    match messages.try_read(&mut buffer) {
        Ok(0) => false,
        Ok(count) => {
            let said = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default());
            said.lines().for_each(|line| warn!("{name}: {line}"));
            true
        }
        Err(err) => err.kind() == std::io::ErrorKind::WouldBlock,
    }
}

async fn end(pid: i32, reaper: &Reaper, pipes: &Pipes, mut ended: watch::Receiver<bool>) {
    pipes.close();
    if timeout(END, ended.wait_for(|ended| *ended)).await.is_ok() {
        return;
    }
    let _ = reaper.signal(pid, SIGTERM);
    if timeout(TERMINATE, ended.wait_for(|ended| *ended)).await.is_err() {
        warn!("the log program {pid} does not end: killing it");
        let _ = reaper.signal(pid, SIGKILL);
    }
}

/// Whether process `pid` has begun to end: its descriptors close before it can be waited for.
fn is_ending(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    flags(&stat).is_none_or(|flags| flags & PF_EXITING != 0)
}

/// The flags in the text of /proc/PID/stat.
fn flags(stat: &str) -> Option<u64> {
    // The name before the parenthesis may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::tests::with_reaper;
    use std::io::Write;
    use std::path::Path;

    const STALL: Duration = Duration::from_millis(500);

    fn program(dir: &Path, script: &str, strict: bool) -> Program {
        let args = ["-c", script, "sh", dir.to_str().unwrap()].map(Into::into).to_vec();
        Program { path: "/bin/sh".into(), args, strict }
    }

    fn subject() -> Subject<'static> {
        Subject { id: "box", namespace: "ns", owner: (0, 0) }
    }

    /// Copies its input to files. Its programs are named by path: it has no environment.
    const COPY: &str = "exec 5>&-; /bin/cat <&3 >$1/out & /bin/cat <&4 >$1/err; wait; \
                        echo $CONTAINER_ID $CONTAINER_NAMESPACE $HOME >$1/end";

    #[test]
    fn a_program_takes_everything_and_ends_with_the_process() {
        with_reaper(|reaper| async move {
            let dir = tempfile::tempdir().unwrap();
            let program = program(dir.path(), COPY, false);
            let logger = Logger::start(&program, &subject(), &reaper).await.unwrap();
            let [stdout, stderr] = logger.ends().unwrap().map(std::fs::File::from);
            let writer = std::thread::spawn(move || {
                (&stdout).write_all(&[b'x'; 300_000]).unwrap();
                (&stderr).write_all(b"error").unwrap();
            });
            writer.join().unwrap();
            logger.pipes().drained(STALL).await;
            logger.end().await;
            let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
            assert_eq!((read("out").len(), read("err").as_str()), (300_000, "error"));
            assert_eq!(read("end"), "box ns\n");
        });
    }

    #[test]
    fn a_program_that_is_not_ready_fails_with_what_it_said() {
        with_reaper(|reaper| async move {
            let dir = tempfile::tempdir().unwrap();
            let start = async |script: &str, strict: bool| {
                let program = program(dir.path(), script, strict);
                let err = Logger::start(&program, &subject(), &reaper).await.err();
                err.map(|err| err.to_string()).unwrap_or_default()
            };
            let early = start("echo no disk >&2; exit 3", false).await;
            assert!(early.contains("no disk"), "{early}");
            let silent = start("exit 3", false).await;
            assert!(silent.contains("exit status"), "{silent}");
            assert_eq!(start("exec 5>&-; read _ <&3", false).await, "");
            let strict = start("exec 5>&-; read _ <&3", true).await;
            assert!(strict.contains("before it was ready"), "{strict}");
            assert_eq!(start("printf x >&5; exec 5>&-; read _ <&3", true).await, "");
            let missing = Program { path: "/no/logger".into(), args: vec![], strict: false };
            let err = Logger::start(&missing, &subject(), &reaper).await.err().unwrap();
            assert!(err.to_string().contains("/no/logger"), "{err}");
        });
    }

    #[test]
    fn a_program_that_reads_nothing_or_has_ended_does_not_hang_the_exit() {
        with_reaper(|reaper| async move {
            let dir = tempfile::tempdir().unwrap();
            for script in ["exec 5>&-; exec /bin/sleep 100", "exec 5>&-; read _ <&3"] {
                let program = program(dir.path(), script, false);
                let logger = Logger::start(&program, &subject(), &reaper).await.unwrap();
                let [stdout, _] = logger.ends().unwrap().map(std::fs::File::from);
                (&stdout).write_all(b"line\nanother\n").unwrap();
                let drained = logger.pipes();
                let drained = drained.drained(STALL);
                timeout(Duration::from_secs(20), drained).await.unwrap();
                let _ = reaper.signal(logger.pid, SIGKILL);
                logger.end().await;
            }
        });
    }

    #[test]
    fn the_flags_of_a_process_are_found_behind_any_name() {
        assert_eq!(flags("7 (a) b (c)) S 1 7 7 0 -1 4194560 0 0"), Some(4194560));
        assert_eq!(flags(""), None);
        assert!(!is_ending(std::process::id() as i32) && is_ending(i32::MAX));
    }
}
