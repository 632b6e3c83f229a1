//! Connections that end without a word to their peers.

use std::io;
use std::os::fd::OwnedFd;

use log::warn;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::connections;

/// `TCP_REPAIR_OFF_NO_WP`, -1: no window probe is sent. The peer shall hear nothing of any of this.
const OFF: u32 = u32::MAX;
const ON: u32 = 1;

/// Connections that were taken out of the protocol: as long as this is held, and after it was [left], their
/// peers hear nothing from this host, also when the processes that own them end. Dropped, they are put back.
///
/// [left]: Silenced::leave
#[derive(Debug, Default)]
#[must_use = "dropped, the connections speak again"]
pub struct Silenced {
    held: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    /// Repair mode takes `SO_REUSEADDR` away.
    reuse: bool,
}

impl Silenced {
    /// How many connections were silenced.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there were none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Leaves them as they are: their processes have ended.
    pub fn leave(mut self) {
        self.held.clear();
    }
}

impl Drop for Silenced {
    fn drop(&mut self) {
        for Connection { socket, reuse } in &self.held {
            let off = setsockopt(socket, sockopt::TcpRepair, &OFF);
            let reused =
                if *reuse { setsockopt(socket, sockopt::ReuseAddr, reuse) } else { Ok(()) };
            if let Err(error) = off.and(reused) {
                warn!("have a connection speak again: {error}");
            }
        }
    }
}

/// Puts the TCP connections of `pids` into repair mode, in which closing sends nothing. To be called while
/// the processes are frozen; to be left after they have ended.
///
/// # Errors
/// When a process or a socket cannot be reached; all are as before then.
pub fn silence(pids: &[u32]) -> io::Result<Silenced> {
    let mut silenced = Silenced::default();
    for socket in connections(pids)? {
        let reuse = getsockopt(&socket, sockopt::ReuseAddr)?;
        setsockopt(&socket, sockopt::TcpRepair, &ON)?;
        silenced.held.push(Connection { socket, reuse });
    }
    Ok(silenced)
}

/// Puts the TCP connections of `pids` back into the protocol that a CRIU has left out of it, which was killed
/// in a dump. How many there were.
///
/// # Errors
/// When a process or a socket cannot be reached.
pub fn put_back(pids: &[u32]) -> io::Result<usize> {
    let mut count = 0;
    for socket in connections(pids)? {
        if getsockopt(&socket, sockopt::TcpRepair)? == ON {
            // With a window probe, as CRIU does it: the peer may have been waiting.
            setsockopt(&socket, sockopt::TcpRepair, &0)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            count += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use super::*;

    /// A process with a connection, which says back what it hears, and one more for each of `more`.
    fn program(more: usize) -> (Child, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let script = "import socket, sys\ns = socket.socket()\n\
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
            s.connect(('127.0.0.1', int(sys.argv[1])))\n\
            l = socket.create_server(('127.0.0.1', 0), backlog=10)\nkept = []\n\
            for n in range(int(sys.argv[2])):\n  kept.append(socket.create_connection(l.getsockname()))\n  kept.append(l.accept())\n\
            s.sendall(b'.')\n\
            while (heard := s.recv(9)): s.sendall(heard)";
        let port = listener.local_addr().unwrap().port().to_string();
        let child = Command::new("python3")
            .args(["-c", script, &port, &more.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        peer.read_exact(&mut [0]).unwrap();
        (child, peer)
    }

    /// Fails unless the program says back what it hears.
    fn answers(peer: &mut TcpStream) {
        peer.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        peer.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello");
    }

    fn is_in_repair(socket: &OwnedFd) -> bool {
        getsockopt(socket, sockopt::TcpRepair).unwrap() == 1
    }

    #[test]
    fn a_connection_that_was_silenced_in_vain_speaks_again() {
        let (mut child, mut peer) = program(0);
        let silenced = silence(&[child.id()]).unwrap();
        assert_eq!(silenced.len(), 1);
        let copy = silenced.held[0].socket.try_clone().unwrap();
        assert!(is_in_repair(&copy));
        drop(silenced);
        assert!(!is_in_repair(&copy) && getsockopt(&copy, sockopt::ReuseAddr).unwrap());
        drop(copy);
        answers(&mut peer);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap_or(0), 0, "it ends as it would have");
    }

    #[test]
    fn a_connection_that_was_left_in_repair_is_put_back() {
        let (mut child, mut peer) = program(1);
        silence(&[child.id()]).unwrap().leave();
        assert_eq!(put_back(&[child.id()]).unwrap(), 3);
        assert_eq!(put_back(&[child.id()]).unwrap(), 0);
        answers(&mut peer);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_peer_hears_nothing_of_the_end_of_a_silenced_connection() {
        let (mut child, mut peer) = program(0);
        let silenced = silence(&[child.id()]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        silenced.leave();
        peer.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let error = peer.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    }

    #[test]
    fn there_is_room_for_more_connections_than_descriptors_by_default() {
        const HERE: &str = "FERRY_TEST_FEW_DESCRIPTORS";
        if std::env::var_os(HERE).is_none() {
            // The limit is one of the whole process, which other tests share.
            let test = std::thread::current().name().unwrap().to_owned();
            let run = Command::new("sh")
                .args(["-c", "ulimit -Sn 64; exec \"$@\"", "sh"])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", &test, "--nocapture"])
                .env(HERE, "1")
                .output()
                .unwrap();
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
            return;
        }
        // The child may have as many as it needs.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(limit.current, Some(64));
        let room = super::super::Room::make().unwrap();
        let (mut child, _peer) = program(100);
        drop(room);
        assert_eq!(silence(&[child.id()]).unwrap().len(), 201);
        let after = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(after.current, Some(64));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
