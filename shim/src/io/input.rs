//! A process's standard input.
//!
//! It is opened when the process starts, not before: opening lets the client's copying begin, and a
//! client whose input is short (`ctr`) sees its end before it has learnt that there is a task whose
//! stdin is to be closed.

use super::copy::{BUFFER, HangUp};
use super::master::Master;
use crate::error::{Context as _, Result};
use log::{debug, warn};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

/// Where input goes.
pub(super) enum Feed {
    Pipe(pipe::Sender),
    /// A terminal, which has no other end of its input than its own.
    Terminal(Master, HangUp),
}

/// Ends with its owner.
pub(super) struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Standard input. Dropping it ends the copying.
#[derive(Default)]
pub(super) enum Input {
    /// None.
    #[default]
    None,
    /// A pipe that nobody writes to: neither data nor an end, until it is closed.
    Nobody { _end: OwnedFd },
    /// The process has not started.
    Waiting { path: PathBuf, to: Feed, closed: bool },
    /// Being copied.
    Open {
        _task: Task,
        /// Keeps the reader from seeing EOF before CloseIO.
        keep: Option<pipe::Sender>,
    },
}

impl Input {
    pub(super) fn waiting(path: PathBuf, to: Feed) -> Self {
        Self::Waiting { path, to, closed: false }
    }

    /// The process has started: its input may begin.
    pub(super) fn started(&mut self) {
        match std::mem::take(self) {
            Self::Waiting { path, to, closed } => match open(&path) {
                Ok((from, keep)) => {
                    let _task = Task(tokio::spawn(copy(from, to)));
                    *self = Self::Open { _task, keep: Some(keep).filter(|_| !closed) };
                }
                Err(err) => warn!("stdin: {err}; the process gets none"),
            },
            other => *self = other,
        }
    }

    /// Lets it end as soon as its client has closed it too; what has been written before arrives.
    pub(super) fn close(&mut self) {
        match self {
            Self::Open { keep, .. } => *keep = None,
            Self::Waiting { closed, .. } => *closed = true,
            Self::Nobody { .. } => *self = Self::None,
            Self::None => {}
        }
    }
}

/// The FIFO for reading, and once more for writing so that it has no end yet.
fn open(path: &Path) -> Result<(pipe::Receiver, pipe::Sender)> {
    let what = || format!("open {}", path.display());
    let from = pipe::OpenOptions::new().open_receiver(path).context(what())?;
    let keep = pipe::OpenOptions::new().open_sender(path).context(what())?;
    Ok((from, keep))
}

/// Copies a client's input to a process until either end closes.
async fn copy(from: pipe::Receiver, mut to: Feed) {
    let mut buffer = Vec::new();
    loop {
        if from.readable().await.is_err() {
            return;
        }
        // Not kept between bursts.
        buffer.resize(BUFFER, 0);
        let bytes = match from.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                buffer = Vec::new();
                continue;
            }
            Err(err) => return warn!("read input: {err}"),
        };
        let written = match &mut to {
            Feed::Pipe(pipe) => pipe.write_all(bytes).await,
            Feed::Terminal(master, _) => master.write_all(bytes).await,
        };
        if let Err(err) = written {
            return debug!("the process takes no more input: {err}");
        }
    }
    if let Feed::Terminal(master, hang_up) = to {
        drop(master);
        hang_up.now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Write};
    use std::time::Duration;

    /// A client's FIFO, and the process's end of a pipe that it is copied to.
    fn fifo(dir: &Path) -> (PathBuf, Input, File) {
        let path = dir.join("stdin");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (read, write) = super::super::pipes::make((0, 0)).unwrap();
        let to = pipe::Sender::from_owned_fd(write).unwrap();
        (path.clone(), Input::waiting(path, Feed::Pipe(to)), File::from(read))
    }

    async fn read_to_end(mut process: File) -> String {
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            process.read_to_string(&mut text).map(|_| text)
        });
        tokio::time::timeout(Duration::from_secs(20), read).await.unwrap().unwrap().unwrap()
    }

    #[tokio::test]
    async fn clients_come_and_go_until_the_input_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut input, process) = fifo(dir.path());
        input.started();
        for text in ["one ", "two"] {
            OpenOptions::new().write(true).open(&path).unwrap().write_all(text.as_bytes()).unwrap();
        }
        input.close();
        assert_eq!(read_to_end(process).await, "one two");
    }

    #[tokio::test]
    async fn what_was_written_before_the_start_arrives_although_the_input_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut input, process) = fifo(dir.path());
        // As a client that does not wait for a reader.
        let mut client = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        client.write_all(b"early").unwrap();
        input.close();
        input.started();
        drop(client);
        assert_eq!(read_to_end(process).await, "early");
    }

    #[tokio::test]
    async fn a_client_that_never_comes_leaves_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut input, process) = fifo(dir.path());
        input.started();
        input.close();
        assert_eq!(read_to_end(process).await, "");
    }
}
