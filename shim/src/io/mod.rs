//! Standard streams of a container's process.
//!
//! The process gets pipes (CRIU can dump those), a terminal, or /dev/null; the shim copies between
//! those and what the client named: a FIFO, a file, or nothing. A log program reads pipes itself.
//!
//! ```text
//!   client ── FIFO ──> shim ── pipe, or terminal ──> stdin
//!   client <── FIFO ── shim <── pipe, or terminal ── stdout, stderr
//!   file:// <───────── shim <── pipe, or terminal ── stdout, stderr
//!   binary:// <───────────────────────────── pipe ── stdout, stderr
//!   binary:// <─ pipe ─ shim <────────── terminal ── stdout
//! ```
//! The shim holds output FIFOs open for reading too: a client that is missing, or that comes and
//! goes, neither blocks Create nor breaks the pipe.

mod console;
mod copy;
mod input;
mod logger;
mod master;
mod pipes;
mod sink;
mod uri;

use crate::error::{Context as _, Error, Result};
use crate::reaper::Reaper;
use console::ConsoleSocket;
use copy::Copy;
use input::{Feed, Input};
use logger::{Logger, Pipes, Subject};
use master::Master;
use sink::Sink;
use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use uri::Target;

/// Where a client wants the streams of a process. Empty is nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    /// FIFO, or empty.
    pub(crate) stdin: String,
    /// FIFO, URI, or empty.
    pub(crate) stdout: String,
    /// FIFO, URI, or empty. A terminal has none, and a log program takes it with stdout.
    pub(crate) stderr: String,
    /// Whether a terminal was asked for.
    pub(crate) terminal: bool,
}

/// What opening streams needs besides their names.
pub(crate) struct Setup<'a> {
    /// Container, or exec.
    pub(crate) id: &'a str,
    /// containerd namespace.
    pub(crate) namespace: &'a str,
    /// Who may reopen the pipes through /proc.
    pub(crate) owner: (u32, u32),
    /// Whether the process comes from a checkpoint. What was a pipe stays one then, with nobody at its
    /// other end: `/dev/null` would end its input, and the host's could not be dumped again.
    pub(crate) restored: bool,
    /// Starts log programs.
    pub(crate) reaper: &'a Arc<Reaper>,
}

/// What a process inherits.
pub(crate) struct ChildStdio {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl ChildStdio {
    fn null() -> Result<Self> {
        Ok(Self { stdin: null()?, stdout: null()?, stderr: null()? })
    }

    /// Gives it to `command`. The shim's copies close with it.
    pub(crate) fn attach(self, command: &mut Command) {
        command.stdin(self.stdin).stdout(self.stdout).stderr(self.stderr);
    }
}

/// The shim's side. Dropping it ends all copying.
#[derive(Default)]
pub(crate) struct ProcessIo {
    outputs: Vec<Copy>,
    input: Input,
    logger: Option<Logger>,
    console: Option<Console>,
}

/// A terminal that runc has yet to make and send.
pub(crate) struct Console {
    socket: ConsoleSocket,
    stdin: Option<PathBuf>,
    sink: Sink,
}

impl Console {
    /// Waits for the terminal; for after runc has returned.
    pub(crate) async fn receive(&self) -> Result<OwnedFd> {
        self.socket.receive().await
    }
}

impl ProcessIo {
    /// Opens everything that `stdio` names and starts copying. Waits for no client, only for a log
    /// program to be ready.
    pub(crate) async fn open(stdio: &Stdio, setup: &Setup<'_>) -> Result<(Self, ChildStdio)> {
        let stdin = stdin(&stdio.stdin)?;
        let mut io = Self::default();
        let stdout = uri::parse(&stdio.stdout).map_err(|err| err.context("stdout"))?;
        let program = match &stdout {
            Target::Program(program) => Some(program),
            _ => None,
        };
        if let Some(program) = program {
            let (id, namespace, owner) = (setup.id, setup.namespace, setup.owner);
            let subject = Subject { id, namespace, owner };
            io.logger = Some(Logger::start(program, &subject, setup.reaper).await?);
        }
        if stdio.terminal {
            let sink = match &io.logger {
                Some(logger) => {
                    let [stdout, _] = logger.ends()?;
                    Sink::Pipe(pipe::Sender::from_owned_fd(stdout).context("use a pipe")?)
                }
                None => open_sink(stdout).map_err(|err| err.context("stdout"))?,
            };
            io.console = Some(Console { socket: ConsoleSocket::listen()?, stdin, sink });
            return Ok((io, ChildStdio::null()?));
        }
        let [stdout, stderr] = match &io.logger {
            Some(logger) => logger.ends()?,
            None => {
                let stderr = uri::parse(&stdio.stderr).map_err(|err| err.context("stderr"))?;
                let stdout = io.output(stdout, setup).map_err(|err| err.context("stdout"))?;
                let stderr = io.output(stderr, setup).map_err(|err| err.context("stderr"))?;
                [stdout, stderr]
            }
        };
        let stdin = match stdin {
            None if setup.restored => {
                let (read, write) = pipes::make(setup.owner)?;
                io.input = Input::Nobody { _end: write };
                read
            }
            None => null()?,
            Some(path) => {
                let (read, write) = pipes::make(setup.owner)?;
                let to = pipe::Sender::from_owned_fd(write).context("use a pipe")?;
                io.input = Input::waiting(path, Feed::Pipe(to));
                read
            }
        };
        Ok((io, ChildStdio { stdin, stdout, stderr }))
    }

    /// The process's end of a stream that leads to `target`.
    fn output(&mut self, target: Target, setup: &Setup<'_>) -> Result<OwnedFd> {
        if target == Target::Null && !setup.restored {
            return null();
        }
        let sink = open_sink(target)?;
        let (read, write) = pipes::make(setup.owner)?;
        self.outputs.push(Copy::start(read, sink)?);
        Ok(write)
    }

    /// The socket that runc is to send a terminal to.
    pub(crate) fn console_socket(&self) -> Option<PathBuf> {
        self.console.as_ref().map(|console| console.socket.path().to_owned())
    }

    /// The terminal that was asked for, until it is taken.
    pub(crate) fn take_console(&mut self) -> Option<Console> {
        self.console.take()
    }

    /// Copies between the client and the terminal that `console` has received.
    pub(crate) fn connect(&mut self, console: Console, master: OwnedFd) -> Result<()> {
        let feed = master.try_clone().context("duplicate a terminal's master")?;
        let output = Copy::start_terminal(master, console.sink)?;
        if let Some(path) = console.stdin {
            let feed = Master::new(feed).context("use a terminal's master")?;
            self.input = Input::waiting(path, Feed::Terminal(feed, output.hang_up()));
        }
        self.outputs.push(output);
        Ok(())
    }

    /// Takes over the terminal that runc, which has returned, was asked for.
    pub(crate) async fn connect_terminal(&mut self) -> Result<()> {
        let Some(console) = self.take_console() else { return Ok(()) };
        let master = console.receive().await?;
        self.connect(console, master)
    }

    /// Sets the size of the terminal, if there is one.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.outputs.iter().try_for_each(|output| output.resize(columns, rows))
    }

    /// The process has started: its input may begin.
    pub(crate) fn started(&mut self) {
        self.input.started();
    }

    /// Lets stdin end as soon as its client has closed it too. With a terminal this hangs up.
    pub(crate) fn close_stdin(&mut self) {
        self.input.close();
    }

    /// What [`drained`] needs, detached from this object's lock.
    pub(crate) fn pending(&self) -> Pending {
        Pending {
            outputs: self.outputs.iter().map(Copy::progress).collect(),
            logger: self.logger.as_ref().map(Logger::pipes),
        }
    }

    /// Ends all copying, and waits for the end of a log program.
    pub(crate) async fn close(self) {
        let Self { outputs, input, logger, console } = self;
        drop((outputs, input, console));
        if let Some(logger) = logger {
            logger.end().await;
        }
    }
}

/// Output that is on its way.
#[derive(Default)]
pub(crate) struct Pending {
    outputs: Vec<copy::Progress>,
    logger: Option<Arc<Pipes>>,
}

/// The process has exited: waits until all that it has written has been handed on. Ends early when
/// a stream makes no progress for `stall` (nobody reads it). A process that inherited the stream
/// and lives on does not matter.
pub(crate) async fn drained(pending: Pending, stall: Duration) {
    for progress in pending.outputs {
        progress.drained(stall).await;
    }
    if let Some(pipes) = pending.logger {
        pipes.drained(stall).await;
    }
}

fn stdin(name: &str) -> Result<Option<PathBuf>> {
    match uri::parse(name).map_err(|err| err.context("stdin"))? {
        Target::Null => Ok(None),
        Target::Path(path) => {
            let what = || format!("stdin: open {}", path.display());
            if !std::fs::metadata(&path).context(what())?.file_type().is_fifo() {
                let text = format!("stdin: {} is not a FIFO", path.display());
                return Err(Error::invalid_argument(text));
            }
            Ok(Some(path))
        }
        Target::File(_) | Target::Program(_) => {
            Err(Error::invalid_argument(format!("stdin: {name:?} is not a FIFO")))
        }
    }
}

fn open_sink(target: Target) -> Result<Sink> {
    match target {
        Target::Null => Ok(Sink::Null),
        Target::Path(path) => open_path(&path),
        Target::File(path) => {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).context(format!("make {}", folder.display()))?;
            }
            Ok(Sink::file(append(&path, true)?))
        }
        Target::Program(_) => {
            Err(Error::invalid_argument("a log program takes both streams: name it as stdout"))
        }
    }
}

fn open_path(path: &Path) -> Result<Sink> {
    let what = || format!("open {}", path.display());
    let kind = std::fs::metadata(path).context(what())?.file_type();
    if !kind.is_fifo() {
        return Ok(Sink::file(append(path, false)?));
    }
    let mut options = pipe::OpenOptions::new();
    let fifo = options.read_write(true).open_sender(path).context(what())?;
    Ok(Sink::Pipe(fifo))
}

fn append(path: &Path, create: bool) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(create)
        .mode(0o644)
        .open(path)
        .context(format!("open {}", path.display()))
}

fn null() -> Result<OwnedFd> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    Ok(null.context("open /dev/null")?.into())
}

/// For the fuzzing.
#[cfg(test)]
pub(crate) fn is_served(name: &str) -> bool {
    uri::parse(name).is_ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::reaper::tests::with_reaper;
    use containerd_shim::protos::ttrpc::Code;
    use std::io::Write;

    /// A terminal's master and slave.
    pub(crate) fn terminal() -> (OwnedFd, File) {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        (master, slave.into())
    }

    fn stdio(stdout: &str, stderr: &str, terminal: bool) -> Stdio {
        Stdio { stdin: String::new(), stdout: stdout.into(), stderr: stderr.into(), terminal }
    }

    #[test]
    fn a_log_program_takes_what_is_written_to_a_terminal() {
        with_reaper(|reaper| async move {
            let dir = tempfile::tempdir().unwrap();
            let script = dir.path().join("logger");
            let text = "#!/bin/sh\nexec 5>&-\nexec /bin/cat <&3 >$2/out\n";
            std::fs::write(&script, text).unwrap();
            let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&script, executable).unwrap();
            let uri = format!("binary://{}?dir={}", script.display(), dir.path().display());
            let setup = Setup {
                id: "box",
                namespace: "ns",
                owner: (0, 0),
                restored: false,
                reaper: &reaper,
            };
            let opened = ProcessIo::open(&stdio(&uri, &uri, true), &setup).await;
            let (mut io, child) = opened.unwrap();
            drop(child);
            let socket = io.console_socket().unwrap();
            assert!(socket.exists());
            let console = io.take_console().unwrap();
            let (master, mut slave) = terminal();
            io.connect(console, master).unwrap();
            assert!(!socket.exists());
            slave.write_all(b"line").unwrap();
            drop(slave);
            drained(io.pending(), Duration::from_secs(10)).await;
            io.close().await;
            assert_eq!(std::fs::read(dir.path().join("out")).unwrap(), b"line");
        });
    }

    #[test]
    fn names_that_make_no_sense_are_refused() {
        with_reaper(|reaper| async move {
            let setup = Setup {
                id: "box",
                namespace: "ns",
                owner: (0, 0),
                restored: false,
                reaper: &reaper,
            };
            let refused = async |stdin: &str, stdout: &str, stderr: &str| {
                let stdio = Stdio { stdin: stdin.into(), ..stdio(stdout, stderr, false) };
                ProcessIo::open(&stdio, &setup).await.err().unwrap().code()
            };
            assert_eq!(refused("", "", "binary:///bin/true").await, Code::INVALID_ARGUMENT);
            assert_eq!(refused("file:///dev/null", "", "").await, Code::INVALID_ARGUMENT);
            assert_eq!(refused("", "tcp:///x", "").await, Code::UNIMPLEMENTED);
            assert_eq!(refused("/dev/null", "", "").await, Code::INVALID_ARGUMENT);
        });
    }
}
