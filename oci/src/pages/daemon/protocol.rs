//! Requests to a keeper: packets of a `SOCK_SEQPACKET` socket, four bytes of version (little-endian) and
//! then JSON. What does not fit this is refused, and the connection closed.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag,
    SockType, UnixAddr,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of requests and replies.
pub(super) const VERSION: u32 = 1;
/// Bytes that a packet may have.
const PACKET: usize = 16 << 10;

/// What a keeper can be asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// Become the writer.
    Open {
        container: String,
        migration: String,
    },
    /// Wait for a lazy restore at this path.
    Listen {
        path: PathBuf,
    },
    /// The memory is complete.
    Final,
    /// Fill in the background.
    Fill,
    /// Do not.
    HoldFill,
    Status,
    /// Forget the restore that is under way.
    AbortRestore,
    /// End the store.
    Drop,
    /// Have the worker killed at a point, after so many passes, so many times.
    #[cfg(any(test, feature = "fault-points"))]
    FaultPoint {
        point: super::Point,
        after: u64,
        times: u64,
    },
}

/// A keeper's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Reply {
    Done,
    /// The files come along.
    Store,
    Status(Box<Status>),
    Refused(String),
}

/// What a store is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It takes pages.
    Receiving,
    /// It is complete; no restore has connected yet.
    Complete,
    /// A restore is under way and its tasks are being served.
    Restoring,
    /// The restore is over; pages are served and filled, and given back.
    Running,
    /// All is in.
    Done,
}

/// Numbers of a store and of its page daemon. All of them begin anew after an aborted restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing.
    pub state: State,
    /// The container.
    pub container: String,
    /// The migration that opened it last.
    pub migration: String,
    /// Whether somebody has it open for writing.
    pub writer: bool,
    /// Pages that were written into the store.
    pub pages: u64,
    /// Those of them that lie on disk.
    pub spilled: u64,
    /// Tasks that CRIU has sent so far.
    pub tasks: u64,
    /// Pages that tasks still need, all together.
    pub pages_left: u64,
    /// Faults answered.
    pub faults: u64,
    /// Those answered by zeros.
    pub zero_pages: u64,
    /// Pages of the store that came with a fault: the one that was asked for, and some behind it.
    pub fault_pages: u64,
    /// Pages filled in the background.
    pub filled: u64,
    /// Forks of tasks whose memory was not complete.
    pub forks: u64,
    /// Things that went wrong. Pages they were about are tried again.
    pub errors: u64,
    /// How often a worker had to be started anew.
    pub restarts: u64,
    /// From reading a fault to its answer, median, microseconds (rounded up).
    pub fault_p50: u64,
    /// The same, 99 of 100.
    pub fault_p99: u64,
    /// From the first task's descriptor to the first fault answered, microseconds.
    pub first_fault: Option<u64>,
    /// The keeper's process id.
    pub keeper: u32,
    /// The worker's process id.
    pub worker: Option<u32>,
}

/// A path that is short enough for a socket whatever `path` is, and what keeps it valid.
fn reachable(path: &Path) -> io::Result<(UnixAddr, OwnedFd)> {
    use nix::fcntl::{OFlag, open};
    let (dir, name) = match (path.parent(), path.file_name()) {
        (Some(dir), Some(name)) => (dir, name),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let dir = open(
        dir,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    Ok((UnixAddr::new(&short)?, dir))
}

fn unix_socket(kind: SockType, flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Unix, kind, flags | SockFlag::SOCK_CLOEXEC, None)?)
}

/// Listens at `path`, for root alone. A socket that is there already is replaced.
pub(super) fn listen(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    let fd = unix_socket(kind, SockFlag::SOCK_NONBLOCK)?;
    let (addr, _dir) = reachable(path)?;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    socket::bind(fd.as_raw_fd(), &addr)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    socket::listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

/// Accepts a connection, if there is one and root made it.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = match socket::accept4(listener.as_raw_fd(), flags) {
        Ok(fd) => own(fd),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::ECONNABORTED) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let peer = socket::getsockopt(&fd, socket::sockopt::PeerCredentials)?;
    if peer.uid() != 0 {
        log::warn!("user {} may not talk to a page store", peer.uid());
        return Ok(None);
    }
    Ok(Some(fd))
}

/// Connects to the keeper at `path`.
pub(super) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let fd = unix_socket(SockType::SeqPacket, SockFlag::empty())?;
    let (addr, _dir) = reachable(path)?;
    socket::connect(fd.as_raw_fd(), &addr)?;
    Ok(fd)
}

/// Sends one packet, with descriptors.
pub(super) fn send(fd: BorrowedFd<'_>, message: &impl Serialize, fds: &[RawFd]) -> io::Result<()> {
    let mut packet = VERSION.to_le_bytes().to_vec();
    serde_json::to_writer(&mut packet, message)?;
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights };
    let data = [IoSlice::new(&packet)];
    socket::sendmsg::<()>(fd.as_raw_fd(), &data, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one packet and descriptors; `None` when the other side has gone.
///
/// # Errors
/// `InvalidData` when it is not one of ours.
pub(super) fn receive<T: DeserializeOwned>(
    fd: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut packet = vec![0; PACKET];
    let mut space = nix::cmsg_space!([RawFd; 3]);
    let mut data = [IoSliceMut::new(&mut packet)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = socket::recvmsg::<()>(fd.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(rights) = control {
            fds.extend(rights.into_iter().map(own));
        }
    }
    let (len, whole) = (message.bytes, !message.flags.contains(MsgFlags::MSG_TRUNC));
    if len == 0 {
        return Ok(None);
    }
    let body = packet[..len].strip_prefix(&VERSION.to_le_bytes()).filter(|_| whole);
    let body = body.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let message =
        serde_json::from_slice(body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(Some((message, fds)))
}

#[allow(unsafe_code)] // The kernel gives descriptors as numbers.
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: a descriptor that the kernel has just made for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
