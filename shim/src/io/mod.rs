//! Standard streams of a container's process.
//!
//! The process always gets pipes (CRIU can dump those) or /dev/null; the shim copies between the
//! pipes and what the client named: a FIFO, a file, or nothing.
//!
//! ```text
//!   client ── FIFO ──> shim ── pipe ──> stdin
//!   client <── FIFO ── shim <── pipe ── stdout, stderr
//!   file:// <───────── shim <── pipe ── stdout, stderr
//! ```
//! The shim holds output FIFOs open for reading too: a client that is missing, or that comes and
//! goes, neither blocks Create nor breaks the pipe.

mod copy;
mod uri;

use crate::error::{Context as _, Error, Result};
use copy::{Copy, Sink};
use nix::fcntl::OFlag;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use uri::Target;

/// Where a client wants the streams of a process. Empty is nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    /// FIFO, or empty.
    pub(crate) stdin: String,
    /// FIFO, URI, or empty.
    pub(crate) stdout: String,
    /// FIFO, URI, or empty.
    pub(crate) stderr: String,
    /// Whether a terminal was asked for.
    pub(crate) terminal: bool,
}

/// The ends of the pipes that a process inherits.
pub(crate) struct ChildStdio {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl ChildStdio {
    /// Gives them to `command`. The shim's copies close with it.
    pub(crate) fn attach(self, command: &mut Command) {
        command.stdin(self.stdin).stdout(self.stdout).stderr(self.stderr);
    }
}

/// The shim's side. Dropping it ends all copying.
pub(crate) struct ProcessIo {
    outputs: Vec<Copy>,
    input: Input,
}

/// Standard input. It is opened when the process starts, not before: opening lets the client's
/// copying begin, and a client whose input is short (`ctr`) sees its end before it has learnt that
/// there is a task whose stdin is to be closed.
enum Input {
    /// None, or closed by the client.
    Closed,
    /// The process has not started.
    Waiting { path: PathBuf, to: pipe::Sender },
    /// Being copied.
    Open {
        task: JoinHandle<()>,
        /// Keeps the reader from seeing EOF before CloseIO.
        keep: Option<pipe::Sender>,
    },
}

impl ProcessIo {
    /// Opens everything that `stdio` names and starts copying. `owner` is who may reopen the
    /// pipes through /proc. Waits for no client.
    pub(crate) fn open(stdio: &Stdio, owner: (u32, u32)) -> Result<(Self, ChildStdio)> {
        if stdio.terminal {
            return Err(Error::unimplemented("a terminal (terminal=true) is not supported"));
        }
        let mut outputs = Vec::new();
        let stdout = output(&stdio.stdout, owner, &mut outputs).map_err(|e| e.context("stdout"))?;
        let stderr = output(&stdio.stderr, owner, &mut outputs).map_err(|e| e.context("stderr"))?;
        let (stdin, input) = match uri::parse(&stdio.stdin)? {
            Target::Null => (null()?, Input::Closed),
            Target::Path(path) => {
                let what = || format!("stdin: open {}", path.display());
                if !std::fs::metadata(&path).context(what())?.file_type().is_fifo() {
                    let text = format!("stdin: {} is not a FIFO", path.display());
                    return Err(Error::invalid_argument(text));
                }
                let (read, write) = make_pipe(owner)?;
                let to = pipe::Sender::from_owned_fd(write).context("use a pipe")?;
                (read, Input::Waiting { path, to })
            }
            Target::File(_) => {
                return Err(Error::invalid_argument("stdin cannot be a file:// URI"));
            }
        };
        Ok((Self { outputs, input }, ChildStdio { stdin, stdout, stderr }))
    }

    /// The process has started: its input may begin.
    pub(crate) fn started(&mut self) {
        let Input::Waiting { path, to } = std::mem::replace(&mut self.input, Input::Closed) else {
            return;
        };
        match open_stdin(&path) {
            Ok((from, keep)) => {
                let task = tokio::spawn(copy::input(from, to));
                self.input = Input::Open { task, keep: Some(keep) };
            }
            Err(err) => log::warn!("stdin: {err}; the process gets none"),
        }
    }

    /// Lets stdin end as soon as its client has closed it too.
    pub(crate) fn close_stdin(&mut self) {
        match &mut self.input {
            Input::Open { keep, .. } => *keep = None,
            input => *input = Input::Closed,
        }
    }

    /// What [`drained`] needs, detached from this object's lock.
    pub(crate) fn pending(&self) -> Vec<copy::Progress> {
        self.outputs.iter().map(Copy::progress).collect()
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        if let Input::Open { task, .. } = &self.input {
            task.abort();
        }
    }
}

/// Waits until all that the process has written, before its exit, has been handed on. Ends early
/// when a stream makes no progress for `stall` (nobody reads it). A process that inherited the
/// stream and lives on does not matter.
pub(crate) async fn drained(pending: Vec<copy::Progress>, stall: Duration) {
    for progress in pending {
        progress.drained(stall).await;
    }
}

fn output(name: &str, owner: (u32, u32), outputs: &mut Vec<Copy>) -> Result<OwnedFd> {
    let sink = match uri::parse(name)? {
        Target::Null => return null(),
        Target::Path(path) => open_path(&path)?,
        Target::File(path) => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).context("make the log's folder")?;
            }
            Sink::file(append(&path, true)?)
        }
    };
    let (read, write) = make_pipe(owner)?;
    outputs.push(Copy::start(read, sink)?);
    Ok(write)
}

fn open_path(path: &Path) -> Result<Sink> {
    let what = || format!("open {}", path.display());
    let kind = std::fs::metadata(path).context(what())?.file_type();
    if !kind.is_fifo() {
        return Ok(Sink::file(append(path, false)?));
    }
    let mut options = pipe::OpenOptions::new();
    let fifo = options.read_write(true).open_sender(path).context(what())?;
    Ok(Sink::fifo(fifo))
}

fn append(path: &Path, create: bool) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(create)
        .mode(0o640)
        .open(path)
        .context(format!("open {}", path.display()))
}

/// The FIFO for reading, and once more for writing so that it has no end yet.
fn open_stdin(path: &Path) -> Result<(pipe::Receiver, pipe::Sender)> {
    let what = || format!("open {}", path.display());
    let from = pipe::OpenOptions::new().open_receiver(path).context(what())?;
    let keep = pipe::OpenOptions::new().open_sender(path).context(what())?;
    Ok((from, keep))
}

fn null() -> Result<OwnedFd> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    Ok(null.context("open /dev/null")?.into())
}

fn make_pipe((uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context("make a pipe")?;
    if (uid, gid) != (0, 0) {
        for end in [read.as_fd(), write.as_fd()] {
            std::os::unix::fs::fchown(end, Some(uid), Some(gid)).context("chown a pipe")?;
        }
    }
    Ok((read, write))
}
