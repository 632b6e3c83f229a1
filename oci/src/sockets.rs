//! The sockets of a container, read from `/proc`, and how to end them without a word to the peer.

mod kinds;
mod outside;
mod room;
mod silent;
mod unread;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};

pub use kinds::{Kind, kinds};
pub use outside::{Outside, outside};
use room::Room;
pub use silent::{Silenced, put_back, silence};
pub use unread::{Unread, unread};

/// Transport protocol of an inet socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// UDP over IPv4 or IPv6.
    Udp,
    /// A raw socket; ports are protocol numbers.
    Raw,
}

/// One inet socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InetSocket {
    /// Transport.
    pub protocol: Protocol,
    /// Own address; IPv4-mapped IPv6 addresses are given as IPv4.
    pub local: SocketAddr,
    /// Peer; port 0 where there is none.
    pub remote: SocketAddr,
    /// A TCP listener, or a UDP socket that is not connected.
    pub listening: bool,
    /// TCP and neither listening nor closed; or a connected UDP socket.
    pub connected: bool,
    /// Bound to `::`, which takes IPv4 as well.
    pub dual_stack: bool,
    /// Inode, as in `/proc/PID/fd`.
    pub inode: u64,
}

/// TCP states of `/proc/net/tcp`.
const TCP_CLOSE: u8 = 0x07;
const TCP_LISTEN: u8 = 0x0a;
/// A UDP socket without a peer reads as TCP_CLOSE, a connected one as TCP_ESTABLISHED.
const UDP_CONNECTED: u8 = 0x01;

/// Every inet socket that can be seen in the network namespace of process `pid`.
///
/// # Errors
/// When the process is gone.
pub fn in_netns_of(pid: u32) -> io::Result<Vec<InetSocket>> {
    let mut sockets = Vec::new();
    for (file, protocol) in [
        ("tcp", Protocol::Tcp),
        ("tcp6", Protocol::Tcp),
        ("udp", Protocol::Udp),
        ("udp6", Protocol::Udp),
        ("raw", Protocol::Raw),
        ("raw6", Protocol::Raw),
    ] {
        match fs::read_to_string(format!("/proc/{pid}/net/{file}")) {
            Ok(text) => sockets.extend(text.lines().skip(1).filter_map(|l| parse(protocol, l))),
            // A kernel without IPv6 has no tcp6.
            Err(e) if e.kind() == io::ErrorKind::NotFound && file.ends_with('6') => {}
            Err(e) => return Err(e),
        }
    }
    Ok(sockets)
}

/// The inet sockets that processes `pids` hold open, each once.
///
/// # Errors
/// When none of the processes can be read.
pub fn of_processes(pids: &[u32]) -> io::Result<Vec<InetSocket>> {
    let Some(&first) = pids.first() else {
        return Ok(Vec::new());
    };
    let inodes = inodes_of(pids);
    let mut sockets = in_netns_of(first)?;
    sockets.retain(|s| inodes.contains_key(&s.inode));
    Ok(sockets)
}

/// Socket inodes of `pids`, each with one process and descriptor that has it.
fn inodes_of(pids: &[u32]) -> BTreeMap<u64, (u32, i32)> {
    let mut inodes = BTreeMap::new();
    for &pid in pids {
        // A process that ended meanwhile has no sockets any more.
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(inode), Some(fd)) = (socket_inode(&target), number) {
                inodes.entry(inode).or_insert((pid, fd));
            }
        }
    }
    inodes
}

fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Has the kernel end the TCP connections of process `pid` whose peer has been silent for about
/// `limit`, at least 4 s, also while nothing is sent on them. How many there are.
///
/// # Errors
/// When the process or one of its sockets cannot be reached.
pub fn end_when_silent(pid: u32, limit: Duration) -> io::Result<usize> {
    let connections = connections(&[pid])?;
    let seconds = u32::try_from(limit.as_secs() / 4).unwrap_or(u32::MAX).max(1);
    let millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
    for connection in &connections {
        setsockopt(connection, sockopt::TcpKeepIdle, &seconds)?;
        setsockopt(connection, sockopt::TcpKeepInterval, &seconds)?;
        setsockopt(connection, sockopt::TcpKeepCount, &3)?;
        // Of what was sent and not acknowledged; its own limit is a quarter of an hour.
        setsockopt(connection, sockopt::TcpUserTimeout, &millis)?;
        setsockopt(connection, sockopt::KeepAlive, &true)?;
    }
    Ok(connections.len())
}

/// Copies of the TCP connections of `pids`, each once.
fn connections(pids: &[u32]) -> io::Result<Vec<OwnedFd>> {
    let _room = Room::make()?;
    let owners = inodes_of(pids);
    let mut copies = Vec::new();
    for socket in of_processes(pids)? {
        if socket.protocol != Protocol::Tcp || !socket.connected {
            continue;
        }
        let Some(&(pid, fd)) = owners.get(&socket.inode) else {
            continue;
        };
        let process = Pid::from_raw(pid.cast_signed())
            .ok_or_else(|| io::Error::other("process id 0 has no sockets"))?;
        let pidfd = pidfd_open(process, PidfdFlags::empty())?;
        match pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()) {
            Ok(copy) if is_socket(&copy, socket.inode)? => copies.push(copy),
            // The process runs: it has closed the connection, and may have opened something else
            // under its number.
            Ok(_) | Err(Errno::BADF) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(copies)
}

fn is_socket(fd: &OwnedFd, inode: u64) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Socket && stat.st_ino == inode)
}

fn parse(protocol: Protocol, line: &str) -> Option<InetSocket> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (local, dual_stack) = parse_address(fields.get(1)?)?;
    let (remote, _) = parse_address(fields.get(2)?)?;
    let state = u8::from_str_radix(fields.get(3)?, 16).ok()?;
    let inode = fields.get(9)?.parse().ok()?;
    let (listening, connected) = match protocol {
        Protocol::Tcp => (state == TCP_LISTEN, state != TCP_LISTEN && state != TCP_CLOSE),
        Protocol::Udp | Protocol::Raw => (state != UDP_CONNECTED, state == UDP_CONNECTED),
    };
    Some(InetSocket { protocol, local, remote, listening, connected, dual_stack, inode })
}

/// `0100007F:1F90`: each 32-bit word in the host's byte order, the port in hexadecimal.
fn parse_address(text: &str) -> Option<(SocketAddr, bool)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut words = Vec::new();
    for start in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(start..start + 8)?, 16).ok()?;
        words.extend(word.to_ne_bytes());
    }
    let ip = match words.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(words).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?)),
        _ => return None,
    };
    let dual_stack = ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let ip = match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    };
    Some((SocketAddr::new(ip, port), dual_stack))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    #[test]
    fn an_ipv4_listener_is_read() {
        let line =
            "0: 0100007F:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 77 1 x";
        let socket = parse(Protocol::Tcp, line).unwrap();
        assert_eq!(socket.local, "127.0.0.1:6379".parse().unwrap());
        assert!(socket.listening && !socket.connected);
        assert_eq!(socket.inode, 77);
    }

    #[test]
    fn a_mapped_address_is_given_as_ipv4() {
        let text = "0000000000000000FFFF00000100007F:0050";
        assert_eq!(parse_address(text), Some(("127.0.0.1:80".parse().unwrap(), false)));
        let any = "00000000000000000000000000000000:0050";
        assert_eq!(parse_address(any), Some(("[::]:80".parse().unwrap(), true)));
    }

    #[test]
    fn short_or_foreign_lines_are_passed_over() {
        assert_eq!(parse(Protocol::Tcp, ""), None);
        assert_eq!(parse(Protocol::Tcp, "0: 0100:18EB 00000000:0000 0A 0 0 0 0 0 1"), None);
    }

    #[test]
    fn the_kernel_looks_after_a_silent_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let count = end_when_silent(std::process::id(), Duration::from_secs(20)).unwrap();
        assert!(count >= 1, "{count}");
        use nix::sys::socket::getsockopt;
        assert!(getsockopt(&stream, sockopt::KeepAlive).unwrap());
        assert_eq!(getsockopt(&stream, sockopt::TcpKeepIdle).unwrap(), 5);
        assert_eq!(getsockopt(&stream, sockopt::TcpUserTimeout).unwrap(), 20_000);
    }

    #[test]
    fn sockets_of_this_process_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let found = of_processes(&[std::process::id()]).unwrap();
        let has = |local: SocketAddr, listening: bool| {
            found.iter().any(|s| s.local == local && s.listening == listening)
        };
        assert!(has(address, true));
        assert!(has(stream.local_addr().unwrap(), false));
        assert!(has(udp.local_addr().unwrap(), true));
    }
}
