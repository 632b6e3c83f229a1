//! Unix sockets of a container that are connected to a process outside of it.
//!
//! `/proc/net/unix` does not say who the peer is; the kernel's socket diagnosis does.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use super::inodes_of;
use crate::netns::Netns;
use crate::quarantine::netlink::attributes;

/// A Unix socket whose peer is outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    /// A process that has it.
    pub pid: u32,
    /// Its number there.
    pub fd: i32,
    /// Name of the peer, or of the socket itself; empty if neither has one.
    pub name: String,
}

/// What the kernel says of a Unix socket.
#[derive(Debug, Default)]
struct Unix {
    peer: u32,
    name: String,
}

/// The Unix sockets of the processes `pids` that have a peer which none of them has.
///
/// # Errors
/// When the first process is gone, or the kernel has no socket diagnosis.
pub fn outside(pids: &[u32]) -> io::Result<Vec<Outside>> {
    let Some(&first) = pids.first() else { return Ok(Vec::new()) };
    let own = inodes_of(pids);
    let inside = Netns::of(first)?.run(list)??;
    // The peer may be in the host's network, and the container is not.
    let mut all = list()?;
    all.extend(inside);
    let mut found = Vec::new();
    for (inode, (pid, fd)) in &own {
        let number = u32::try_from(*inode).ok();
        let Some(unix) = number.and_then(|inode| all.get(&inode)) else { continue };
        // A peer that has not accepted the connection yet has no inode.
        if unix.peer == 0 || own.contains_key(&u64::from(unix.peer)) {
            continue;
        }
        let peer = all.get(&unix.peer).map(|peer| peer.name.clone()).unwrap_or_default();
        let name = if peer.is_empty() { unix.name.clone() } else { peer };
        found.push(Outside { pid: *pid, fd: *fd, name });
    }
    Ok(found)
}

/// Unix sockets of the calling thread's network namespace, by inode.
fn list() -> io::Result<BTreeMap<u32, Unix>> {
    const BY_FAMILY: u16 = 20;
    const SHOW_NAME_AND_PEER: u32 = 1 | 4;
    const HEADER: usize = 16;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let mut request = Vec::new();
    request.extend(40_u32.to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    request.extend([0; 8]); // sequence number, port
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes()); // in every state
    request.extend(0_u32.to_ne_bytes()); // of every inode
    request.extend(SHOW_NAME_AND_PEER.to_ne_bytes());
    request.extend([0xff; 8]); // no cookie
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut found = BTreeMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((header, _)) = rest.split_at_checked(HEADER) {
            let number = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|n| header[at + n]));
            let message = rest.get(HEADER..number(0) as usize).unwrap_or_default();
            match i32::from(u16::from_ne_bytes([header[4], header[5]])) {
                libc::NLMSG_DONE => return Ok(found),
                libc::NLMSG_ERROR => {
                    let code = message.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => found.extend(entry(message)),
            }
            rest = rest.get((number(0) as usize).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// Inode and what else is said of it.
fn entry(message: &[u8]) -> Option<(u32, Unix)> {
    let inode = u32::from_ne_bytes(message.get(4..8)?.try_into().ok()?);
    let mut unix = Unix::default();
    for (kind, data) in attributes(message.get(16..)?) {
        match kind {
            0 => {
                let text = String::from_utf8_lossy(data.strip_suffix(&[0]).unwrap_or(data));
                unix.name = text.replacen('\0', "@", 1);
            }
            2 => unix.peer = u32::from_ne_bytes(data.try_into().ok()?),
            _ => {}
        }
    }
    Some((inode, unix))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn only_a_socket_with_its_peer_outside_is_outside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("outside");
        let listener = UnixListener::bind(&path).unwrap();
        let _pair = UnixStream::pair().unwrap();
        let me = std::process::id();
        let waiting = UnixStream::connect(&path).unwrap();
        let fd = waiting.as_raw_fd();
        assert!(!outside(&[me]).unwrap().iter().any(|found| found.fd == fd));
        drop(waiting);
        listener.accept().unwrap();
        let script = "import socket, sys, time\ns = socket.socket(socket.AF_UNIX)\n\
                      s.connect(sys.argv[1])\nprint(flush=True)\nsys.stdin.read()";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let found = outside(&[child.id()]).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].name.ends_with("/outside"), "{found:?}");
        assert!(outside(&[child.id(), me]).unwrap().iter().all(|f| f.pid != child.id()));
        drop((child.stdin.take(), accepted));
        child.wait().unwrap();
    }
}
