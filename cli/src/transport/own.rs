//! The agent's end of the stream: its standard input and output.
//!
//! Waited for like any other pipe or socket. tokio's own reads each piece on another thread, and those
//! switches come where a container waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream as StdStream;

use nix::fcntl::{FcntlArg, fcntl};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use super::{Input, Output};

/// What a pipe should hold, bytes: as much as an unprivileged process may ask for.
const PIPE: i32 = 1 << 20;

/// What the driver says.
pub(crate) fn input() -> Output {
    let stdin = io::stdin();
    widen(stdin.as_fd());
    if let Ok(pipe) = stdin.as_fd().try_clone_to_owned().and_then(pipe::Receiver::from_owned_fd) {
        return Box::new(pipe);
    }
    match socket(stdin.as_fd()) {
        Ok(socket) => Box::new(socket),
        Err(_) => Box::new(tokio::io::stdin()),
    }
}

/// What the driver hears.
pub(crate) fn output() -> Input {
    let stdout = io::stdout();
    if let Ok(pipe) = stdout.as_fd().try_clone_to_owned().and_then(pipe::Sender::from_owned_fd) {
        return Box::new(pipe);
    }
    match socket(stdout.as_fd()) {
        Ok(socket) => Box::new(socket),
        Err(_) => Box::new(tokio::io::stdout()),
    }
}

fn socket(fd: BorrowedFd<'_>) -> io::Result<UnixStream> {
    let stream = StdStream::from(fd.try_clone_to_owned()?);
    // Fails where it is none of that kind.
    stream.local_addr()?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Lets more wait in a pipe, so that those at its ends take fewer turns. Where the kernel refuses, it is
/// as it was.
pub(crate) fn widen(pipe: BorrowedFd<'_>) {
    let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(PIPE));
}
