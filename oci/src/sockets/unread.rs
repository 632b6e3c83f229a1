//! Datagrams that have come and were not read: CRIU leaves them behind.

use std::io;

use super::inodes_of;

/// A UDP socket with something to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unread {
    /// A process that has it.
    pub pid: u32,
    /// Its number there.
    pub fd: i32,
    /// Bytes of the kernel's memory that they take.
    pub bytes: u64,
}

/// The UDP sockets of the processes `pids` with datagrams that were not read, each once.
///
/// # Errors
/// When the first process is gone.
pub fn unread(pids: &[u32]) -> io::Result<Vec<Unread>> {
    let Some(&first) = pids.first() else { return Ok(Vec::new()) };
    let owners = inodes_of(pids);
    let mut found = Vec::new();
    for file in ["udp", "udp6"] {
        let text = match std::fs::read_to_string(format!("/proc/{first}/net/{file}")) {
            Ok(text) => text,
            // A kernel without IPv6.
            Err(e) if e.kind() == io::ErrorKind::NotFound && file == "udp6" => continue,
            Err(e) => return Err(e),
        };
        for (inode, bytes) in text.lines().skip(1).filter_map(waiting) {
            if let Some(&(pid, fd)) = owners.get(&inode) {
                found.push(Unread { pid, fd, bytes });
            }
        }
    }
    Ok(found)
}

/// Inode of a socket with something to read, and how much.
fn waiting(line: &str) -> Option<(u64, u64)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, received) = fields.get(4)?.split_once(':')?;
    let bytes = u64::from_str_radix(received, 16).ok().filter(|bytes| *bytes != 0)?;
    Some((fields.get(9)?.parse().ok()?, bytes))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_datagram_counts_until_it_is_read() {
        let me = [std::process::id()];
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(socket) = UdpSocket::bind(address) else { continue };
            let own = || {
                let fd = socket.as_raw_fd();
                unread(&me).unwrap().into_iter().find(|unread| unread.fd == fd)
            };
            assert_eq!(own(), None);
            socket.send_to(b"hello", socket.local_addr().unwrap()).unwrap();
            assert!(own().unwrap().bytes >= 5);
            socket.recv(&mut [0; 9]).unwrap();
            assert_eq!(own(), None);
        }
    }
}
