//! What kinds of sockets a container has: not all can be dumped.

use std::io;

use rustix::net::sockopt::{socket_domain, socket_protocol};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::inodes_of;

/// A socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// A process that has it.
    pub pid: u32,
    /// Its number there.
    pub fd: i32,
    /// Address family, `AF_...`.
    pub family: u16,
    /// Protocol, `IPPROTO_...`; 0 where the family has but one.
    pub protocol: u32,
}

/// The sockets of the processes `pids`, each once. One that is closed meanwhile is left out.
pub fn kinds(pids: &[u32]) -> Vec<Kind> {
    let owners = inodes_of(pids);
    owners.values().filter_map(|(pid, fd)| kind(*pid, *fd).ok()).collect()
}

fn kind(pid: u32, fd: i32) -> io::Result<Kind> {
    let process = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = pidfd_open(process, PidfdFlags::empty())?;
    let socket = pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())?;
    let family = socket_domain(&socket)?.as_raw();
    let protocol = socket_protocol(&socket)?.map_or(0, |protocol| protocol.as_raw().get());
    Ok(Kind { pid, fd, family, protocol })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn sockets_of_this_process_are_told_by_kind() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let unix = UnixDatagram::unbound().unwrap();
        let found = kinds(&[std::process::id()]);
        let of = |fd: i32| found.iter().find(|kind| kind.fd == fd).unwrap();
        assert_eq!(i32::from(of(udp.as_raw_fd()).family), libc::AF_INET);
        assert_eq!(of(udp.as_raw_fd()).protocol, libc::IPPROTO_UDP.unsigned_abs());
        assert_eq!(i32::from(of(unix.as_raw_fd()).family), libc::AF_UNIX);
    }
}
