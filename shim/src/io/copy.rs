//! Copying between pipes and FIFOs or files.

use crate::error::{Context as _, Result};
use log::{debug, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Size of a copier's buffer: that of a pipe.
const BUFFER: usize = 64 * 1024;

/// Where output goes.
pub(super) enum Sink {
    /// A FIFO, opened for reading and writing.
    Fifo(pipe::Sender),
    /// A file, opened for appending.
    File(tokio::fs::File),
}

impl Sink {
    pub(super) fn fifo(fifo: pipe::Sender) -> Self {
        Self::Fifo(fifo)
    }

    pub(super) fn file(file: File) -> Self {
        Self::File(tokio::fs::File::from_std(file))
    }

    /// Writes all of `bytes`, counting them in `moved`.
    async fn write(&mut self, mut bytes: &[u8], moved: &AtomicU64) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = match self {
                Self::Fifo(fifo) => fifo.write(bytes).await?,
                Self::File(file) => {
                    let count = file.write(bytes).await?;
                    // tokio's file reports a write when it is queued.
                    file.flush().await?;
                    count
                }
            };
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            moved.fetch_add(count as u64, Ordering::Relaxed);
            bytes = &bytes[count..];
        }
        Ok(())
    }
}

struct Shared {
    /// The pipe's read end, to see whether it is empty.
    pipe: OwnedFd,
    /// Set from before a read until its bytes are written.
    busy: AtomicBool,
    done: AtomicBool,
    moved: AtomicU64,
}

/// One output stream being copied. Dropping it ends the copying.
pub(super) struct Copy {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Copy {
    /// Starts copying from the read end of a pipe.
    pub(super) fn start(pipe: OwnedFd, sink: Sink) -> Result<Self> {
        let shared = Arc::new(Shared {
            pipe: pipe.try_clone().context("duplicate a pipe")?,
            busy: AtomicBool::new(false),
            done: AtomicBool::new(false),
            moved: AtomicU64::new(0),
        });
        let from = pipe::Receiver::from_owned_fd(pipe).context("use a pipe")?;
        let task = tokio::spawn(output(from, sink, shared.clone()));
        Ok(Self { shared, task })
    }

    pub(super) fn progress(&self) -> Progress {
        Progress(self.shared.clone())
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Tells how far a copy has come.
pub(crate) struct Progress(Arc<Shared>);

impl Progress {
    fn is_drained(&self) -> bool {
        if self.0.done.load(Ordering::SeqCst) {
            return true;
        }
        // The order matters: what has left the pipe was marked busy before.
        let mut fds = [PollFd::new(self.0.pipe.as_fd(), PollFlags::POLLIN)];
        let readable = match poll(&mut fds, PollTimeout::ZERO) {
            Ok(_) => fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)),
            Err(_) => false,
        };
        !readable && !self.0.busy.load(Ordering::SeqCst)
    }

    /// Waits until all that is in the pipe now has been written, or nothing has moved for `stall`.
    pub(super) async fn drained(&self, stall: Duration) {
        let mut moved = self.0.moved.load(Ordering::Relaxed);
        let mut since = Instant::now();
        while !self.is_drained() {
            sleep(Duration::from_millis(1)).await;
            let now = self.0.moved.load(Ordering::Relaxed);
            if now != moved {
                (moved, since) = (now, Instant::now());
            } else if since.elapsed() > stall {
                return debug!("output is not read, the exit is reported without it");
            }
        }
    }
}

async fn output(from: pipe::Receiver, mut sink: Sink, shared: Arc<Shared>) {
    let mut buffer = Vec::new();
    let mut broken = false;
    loop {
        if let Err(err) = from.readable().await {
            warn!("wait for output: {err}");
            break;
        }
        // Not kept between bursts: a container that is silent costs no buffer.
        buffer.resize(BUFFER, 0);
        shared.busy.store(true, Ordering::SeqCst);
        let read = from.try_read(&mut buffer);
        let count = match read {
            Ok(0) => break,
            Ok(count) => count,
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                shared.busy.store(false, Ordering::SeqCst);
                buffer = Vec::new();
                continue;
            }
            Err(err) => {
                warn!("read output: {err}");
                break;
            }
        };
        // A sink that fails is left alone, and the container goes on undisturbed.
        if !broken && let Err(err) = sink.write(&buffer[..count], &shared.moved).await {
            warn!("write output: {err}; what follows is dropped");
            broken = true;
        }
        shared.busy.store(false, Ordering::SeqCst);
    }
    drop(sink);
    shared.done.store(true, Ordering::SeqCst);
}

/// Copies a client's input to a process until either end closes.
pub(super) async fn input(from: pipe::Receiver, mut to: pipe::Sender) {
    let mut buffer = Vec::new();
    loop {
        if from.readable().await.is_err() {
            return;
        }
        buffer.resize(BUFFER, 0);
        match from.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if let Err(err) = to.write_all(&buffer[..count]).await {
                    return debug!("the process takes no more input: {err}");
                }
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => buffer = Vec::new(),
            Err(err) => return warn!("read input: {err}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

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
        let copy = Copy::start(read, Sink::fifo(fifo)).unwrap();
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

    #[tokio::test]
    async fn input_ends_with_its_writers() {
        let (client_read, mut client) = pipe_with_writer();
        let (process, process_write) = pipe_with_writer();
        let from = pipe::Receiver::from_owned_fd(client_read).unwrap();
        let to = pipe::Sender::from_owned_fd(OwnedFd::from(process_write)).unwrap();
        let task = tokio::spawn(input(from, to));
        client.write_all(b"hello").unwrap();
        drop(client);
        task.await.unwrap();
        let mut text = String::new();
        File::from(process).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
}
