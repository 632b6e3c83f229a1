//! Copying what a process writes, from a pipe or a terminal, to where it goes.

use super::master::Master;
use super::sink::Sink;
use crate::error::{Context as _, Result};
use log::{debug, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Size of a copier's buffer: that of a pipe.
pub(super) const BUFFER: usize = 64 * 1024;
/// More than a terminal holds of what was written to it: the kernel's buffers are 64 KiB and 4 KiB.
const TERMINAL: u64 = 128 * 1024;

enum Source {
    Pipe(pipe::Receiver),
    Terminal(Master),
}

impl Source {
    async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.readable().await,
            Self::Terminal(master) => master.readable().await,
        }
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.try_read(buffer),
            Self::Terminal(master) => master.try_read(buffer),
        }
    }
}

/// The descriptors beside the copier's own; closed when it ends.
struct Ends {
    /// The pipe's read end, or the terminal's master: to see whether it is empty.
    source: OwnedFd,
    /// Keeps the terminal from ending while the process lives: it may close its streams and open
    /// the terminal again, as an init does that writes to /dev/console.
    slave: Option<OwnedFd>,
}

struct Shared {
    ends: Mutex<Option<Ends>>,
    is_terminal: bool,
    hang_up: Notify,
    /// Set from before a read until its bytes are written.
    busy: AtomicBool,
    done: AtomicBool,
    /// Bytes read, and bytes written or dropped.
    read: AtomicU64,
    moved: AtomicU64,
}

impl Shared {
    fn ends(&self) -> MutexGuard<'_, Option<Ends>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One output stream being copied. Dropping it ends the copying.
pub(super) struct Copy {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Copy {
    /// Starts copying from the read end of a pipe.
    pub(super) fn start(pipe: OwnedFd, sink: Sink) -> Result<Self> {
        let source = pipe.try_clone().context("duplicate a pipe")?;
        let from = pipe::Receiver::from_owned_fd(pipe).context("use a pipe")?;
        Ok(Self::spawn(Source::Pipe(from), Ends { source, slave: None }, sink))
    }

    /// Starts copying from the master of a terminal.
    pub(super) fn start_terminal(master: OwnedFd, sink: Sink) -> Result<Self> {
        let source = master.try_clone().context("duplicate a terminal's master")?;
        let flags = rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags);
        let slave = slave.inspect_err(|err| debug!("open the terminal: {err}")).ok();
        let from = Master::new(master).context("use a terminal's master")?;
        Ok(Self::spawn(Source::Terminal(from), Ends { source, slave }, sink))
    }

    fn spawn(from: Source, ends: Ends, sink: Sink) -> Self {
        let shared = Arc::new(Shared {
            ends: Mutex::new(Some(ends)),
            is_terminal: matches!(from, Source::Terminal(_)),
            hang_up: Notify::new(),
            busy: AtomicBool::new(false),
            done: AtomicBool::new(false),
            read: AtomicU64::new(0),
            moved: AtomicU64::new(0),
        });
        let task = tokio::spawn(output(from, sink, shared.clone()));
        Self { shared, task }
    }

    pub(super) fn progress(&self) -> Progress {
        Progress(self.shared.clone())
    }

    /// Ends it, and closes a terminal for that.
    pub(super) fn hang_up(&self) -> HangUp {
        HangUp(self.shared.clone())
    }

    /// Sets the size of a terminal; a pipe, and one that has gone, has none.
    pub(super) fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size =
            rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        match &*self.shared.ends() {
            Some(ends) if self.shared.is_terminal => {
                rustix::termios::tcsetwinsize(&ends.source, size).context("resize")
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.task.abort();
        *self.shared.ends() = None;
    }
}

/// Closes a terminal.
pub(super) struct HangUp(Arc<Shared>);

impl HangUp {
    pub(super) fn now(self) {
        self.0.hang_up.notify_one();
    }
}

/// Tells how far a copy has come.
pub(super) struct Progress(Arc<Shared>);

impl Progress {
    fn is_drained(&self) -> bool {
        if self.0.done.load(Ordering::SeqCst) {
            return true;
        }
        // The order matters: what has left the source was marked busy before.
        !self.is_readable() && !self.0.busy.load(Ordering::SeqCst)
    }

    fn is_readable(&self) -> bool {
        let ends = self.0.ends();
        let Some(ends) = &*ends else { return false };
        let mut fds = [PollFd::new(ends.source.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            // A terminal whose process has gone has an end to be read.
            Ok(_) => fds[0].revents().is_some_and(|ready| {
                ready.contains(PollFlags::POLLIN)
                    || (self.0.is_terminal && ready.contains(PollFlags::POLLHUP))
            }),
            Err(_) => false,
        }
    }

    /// How much will have been moved once all that was written until now is.
    fn target(&self) -> u64 {
        let held = match &*self.0.ends() {
            Some(_) if self.0.is_terminal => TERMINAL,
            Some(ends) => rustix::io::ioctl_fionread(&ends.source).unwrap_or_default(),
            None => 0,
        };
        held + self.0.read.load(Ordering::SeqCst)
    }

    /// The process has exited. Waits until all that it has written has been handed on, or nothing
    /// has moved for `stall`.
    pub(super) async fn drained(&self, stall: Duration) {
        if let Some(ends) = &mut *self.0.ends() {
            ends.slave = None;
        }
        let target = self.target();
        let mut moved = self.0.moved.load(Ordering::SeqCst);
        let mut since = Instant::now();
        // Others may have the stream too, and write without an end.
        while !self.is_drained() && moved < target {
            sleep(Duration::from_millis(1)).await;
            let now = self.0.moved.load(Ordering::SeqCst);
            if now != moved {
                (moved, since) = (now, Instant::now());
            } else if since.elapsed() > stall {
                return debug!("output is not read, the exit is reported without it");
            }
        }
    }
}

async fn output(from: Source, mut sink: Sink, shared: Arc<Shared>) {
    let mut buffer = Vec::new();
    let mut broken = false;
    loop {
        let ready = tokio::select! {
            biased;
            ready = from.readable() => ready,
            () = shared.hang_up.notified() => break,
        };
        if let Err(err) = ready {
            warn!("wait for output: {err}");
            break;
        }
        // Not kept between bursts: a container that is silent costs no buffer.
        buffer.resize(BUFFER, 0);
        shared.busy.store(true, Ordering::SeqCst);
        let bytes = match from.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                shared.busy.store(false, Ordering::SeqCst);
                buffer = Vec::new();
                continue;
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => {
                warn!("read output: {err}");
                break;
            }
        };
        shared.read.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        // A sink that fails is left alone, and the container goes on undisturbed.
        if !broken && let Err(err) = sink.write(bytes, &shared.moved).await {
            warn!("write output: {err}; what follows is dropped");
            broken = true;
        } else if broken {
            shared.moved.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        }
        shared.busy.store(false, Ordering::SeqCst);
    }
    drop((sink, from));
    *shared.ends() = None;
    shared.done.store(true, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::termios::OptionalActions;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    fn pipe_with_writer() -> (OwnedFd, File) {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        (read, File::from(write))
    }

    const STALL: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn all_is_written_before_drained_although_the_pipe_stays_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (read, mut write) = pipe_with_writer();
        let copy = Copy::start(read, Sink::file(File::create(&path).unwrap())).unwrap();
        for round in 1..=50 {
            write.write_all(&[b'x'; 1000]).unwrap();
            copy.progress().drained(STALL).await;
            assert_eq!(std::fs::metadata(&path).unwrap().len(), round * 1000);
        }
    }

    #[tokio::test]
    async fn a_fifo_without_a_reader_does_not_hang_the_exit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = pipe::OpenOptions::new().read_write(true).open_sender(&path).unwrap();
        let (read, mut write) = pipe_with_writer();
        let copy = Copy::start(read, Sink::Pipe(fifo)).unwrap();
        let writer = std::thread::spawn(move || write.write_all(&[b'x'; 150_000]).is_ok());
        tokio::time::timeout(Duration::from_secs(5), copy.progress().drained(STALL)).await.unwrap();
        // A reader that comes late gets everything, and the end.
        let mut reader = File::open(&path).unwrap();
        let bytes = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map(|_| bytes.len())
        });
        assert_eq!(bytes.await.unwrap().unwrap(), 150_000);
        assert!(writer.join().unwrap());
        copy.progress().drained(STALL).await;
    }

    #[tokio::test]
    async fn a_sink_that_fails_does_not_stop_the_writer() {
        let (read, mut write) = pipe_with_writer();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let copy = Copy::start(read, Sink::file(full)).unwrap();
        let writer = std::thread::spawn(move || write.write_all(&[b'x'; 300_000]).is_ok());
        tokio::time::timeout(Duration::from_secs(5), async {
            while !copy.progress().0.done.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        assert!(writer.join().unwrap());
    }

    /// A terminal's master and slave, the slave raw.
    fn terminal() -> (OwnedFd, File) {
        let (master, slave) = crate::io::tests::terminal();
        let mut raw = rustix::termios::tcgetattr(&slave).unwrap();
        raw.make_raw();
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &raw).unwrap();
        (master, slave)
    }

    #[tokio::test]
    async fn a_pipe_has_no_size_and_is_not_refused_one() {
        let (read, _write) = pipe_with_writer();
        Copy::start(read, Sink::Null).unwrap().resize(132, 43).unwrap();
    }

    #[tokio::test]
    async fn all_is_read_of_a_terminal_that_has_been_closed() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = dir.path().join(round.to_string());
            let (master, mut slave) = terminal();
            let sink = Sink::file(File::create(&path).unwrap());
            let copy = Copy::start_terminal(master, sink).unwrap();
            copy.resize(132, 43).unwrap();
            let size = rustix::termios::tcgetwinsize(&slave).unwrap();
            assert_eq!((size.ws_col, size.ws_row), (132, 43));
            let writer = std::thread::spawn(move || slave.write_all(&[b'x'; 100_000]).unwrap());
            let written = async {
                while !writer.is_finished() {
                    sleep(STALL / 20).await
                }
            };
            written.await;
            copy.progress().drained(STALL).await;
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 100_000);
            // Nobody has it any more: the sink is closed before the exit is told.
            assert!(copy.shared.done.load(Ordering::SeqCst));
            copy.resize(1, 1).unwrap();
        }
    }

    #[tokio::test]
    async fn a_terminal_may_be_closed_and_opened_again_while_its_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (master, slave) = terminal();
        let name = std::fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd())).unwrap();
        let sink = Sink::file(File::create(&path).unwrap());
        let copy = Copy::start_terminal(master, sink).unwrap();
        drop(slave);
        sleep(STALL / 4).await;
        let flags = nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_NOCTTY;
        let again = nix::fcntl::open(&name, flags, nix::sys::stat::Mode::empty()).unwrap();
        nix::unistd::write(&again, b"again").unwrap();
        // Another process that has it does not hold up the exit.
        tokio::time::timeout(STALL * 20, copy.progress().drained(STALL)).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"again");
        assert!(!copy.shared.done.load(Ordering::SeqCst));
        drop(again);
    }

    #[tokio::test]
    async fn a_terminal_that_is_hung_up_is_closed() {
        let (master, mut slave) = terminal();
        let copy = Copy::start_terminal(master, Sink::Null).unwrap();
        copy.hang_up().now();
        let closed = tokio::task::spawn_blocking(move || slave.read(&mut [0; 8]));
        let closed = tokio::time::timeout(STALL * 20, closed).await.unwrap().unwrap();
        assert!(matches!(closed, Ok(0) | Err(_)));
    }

    #[tokio::test]
    async fn a_process_that_writes_on_does_not_hold_up_the_exit_of_another() {
        let (read, mut write) = pipe_with_writer();
        let copy = Copy::start(read, Sink::Null).unwrap();
        let progress = copy.progress();
        let writer = std::thread::spawn(move || while write.write_all(&[b'x'; 1000]).is_ok() {});
        tokio::time::timeout(STALL * 50, progress.drained(STALL)).await.unwrap();
        drop((copy, progress));
        while !writer.is_finished() {
            sleep(STALL / 20).await;
        }
    }
}
