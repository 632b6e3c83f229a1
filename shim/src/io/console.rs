//! Receives the master of a process's terminal: runc makes the terminal inside the container and
//! sends its master to a socket that it is given.

use crate::error::{Context as _, Error, Result};
use ferry_oci::paths;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// How long after runc's return the master may take to arrive: it has been sent by then.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest name of a terminal that runc sends along.
const NAME: usize = 4096;

/// A socket for one master; its file goes with it.
pub(super) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    pub(super) fn listen() -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // Not in the bundle: a socket's path has 108 bytes at most. By this name the cleanup after
        // a dead shim finds it.
        let name = format!("{}-pty-{count}.sock", std::process::id());
        Self::listen_in(Path::new(paths::SOCKETS), &name)
    }

    fn listen_in(folder: &Path, name: &str) -> Result<Self> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.context("make the folder of the console socket")?;
        let path = folder.join(name);
        // One that a shim with the same pid left behind when it was killed.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).context("listen for the terminal")?;
        Ok(Self { listener, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the master.
    pub(super) async fn receive(&self) -> Result<OwnedFd> {
        self.receive_within(DEADLINE).await
    }

    async fn receive_within(&self, deadline: Duration) -> Result<OwnedFd> {
        let received = async {
            let (stream, _) = self.listener.accept().await?;
            take(&stream).await
        };
        let received = tokio::time::timeout(deadline, received).await;
        let master = received.map_err(|_| {
            Error::deadline_exceeded(format!("runc has sent no terminal within {deadline:?}"))
        })?;
        let master = master.context("receive the terminal from runc")?;
        match rustix::termios::isatty(&master) {
            true => Ok(master),
            false => Err(Error::internal("what runc has sent is no terminal")),
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn take(stream: &UnixStream) -> io::Result<OwnedFd> {
    loop {
        stream.readable().await?;
        match stream.try_io(Interest::READABLE, || read(stream)) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

fn read(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut name = [0; NAME];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut name)];
    let received = recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let cut = received.flags.contains(ReturnFlags::CTRUNC);
    let mut fds: Vec<_> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    match fds.pop() {
        Some(fd) if fds.is_empty() && !cut => Ok(fd),
        _ => Err(io::Error::other("one descriptor was expected")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::ttrpc::Code;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::os::unix::net;

    fn send(path: &Path, fds: &[std::os::fd::BorrowedFd<'_>]) {
        let stream = net::UnixStream::connect(path).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let parts = [IoSlice::new(b"/dev/ptmx")];
        sendmsg(&stream, &parts, &mut control, SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn a_terminal_arrives_and_its_socket_goes() {
        let dir = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::listen_in(dir.path(), "pty").unwrap();
        let (master, _slave) = crate::io::tests::terminal();
        send(socket.path(), &[master.as_fd()]);
        socket.receive().await.unwrap();
        drop(socket);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_is_no_terminal_or_never_comes_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::listen_in(dir.path(), "pty").unwrap();
        send(socket.path(), &[]);
        assert!(socket.receive().await.is_err());
        let null = std::fs::File::open("/dev/null").unwrap();
        send(socket.path(), &[null.as_fd()]);
        assert!(socket.receive().await.is_err());
        send(socket.path(), &[null.as_fd(), null.as_fd()]);
        assert!(socket.receive().await.is_err());
        let err = socket.receive_within(Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(err.code(), Code::DEADLINE_EXCEEDED);
    }
}
