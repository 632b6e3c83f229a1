//! Two hosts made of network namespaces, joined by a cable. They end with the test: namespaces of
//! threads, they have no name and no file.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

pub(super) const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
pub(super) const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2));
/// Addresses of the server that move.
pub(super) const MOVED: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 100));
pub(super) const MOVED_TOO: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 101));
const MOVED_6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 0x100));
const CLIENT_6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 2));

/// The client's address of the same family as `address`.
pub(super) fn client_for(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { CLIENT } else { CLIENT_6 }
}

/// Runs `test` with an IPv4 address that moves, and with one of IPv6.
pub(super) fn in_both_families(test: impl Fn(&Net, IpAddr)) {
    test(&Net::new(), MOVED);
    match has_ipv6() {
        true => test(&Net::new(), MOVED_6),
        false => {
            let thread = thread::current();
            let name = thread.name().unwrap_or("a test");
            // Not print: the test runner would keep that to itself.
            let text = format!("\nskipped: {name}: the kernel has no IPv6\n");
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }
}

fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread in it.
pub(super) struct Host {
    jobs: Sender<Job>,
    thread: i32,
}

impl Host {
    fn new() -> Self {
        let (jobs, todo) = channel::<Job>();
        let (started, start) = channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace, as root");
            started.send(gettid().as_raw()).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        Self { jobs, thread: start.recv().expect("the host starts") }
    }

    /// Runs `job` on the host. Sockets that it makes stay there wherever they are used.
    pub(super) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        self.jobs.send(Box::new(move || drop(done.send(job())))).expect("the host is alive");
        result.recv().expect("the job does not panic")
    }

    /// Runs ip(8) on the host.
    pub(super) fn ip(&self, words: String) {
        self.run(move || {
            let output = Command::new("ip").args(words.split(' ')).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "ip {words}: {error}");
        });
    }
}

/// A server with the addresses that move, and its client.
pub(super) struct Net {
    pub(super) server: Host,
    pub(super) client: Host,
}

impl Net {
    pub(super) fn new() -> Self {
        let (server, client) = (Host::new(), Host::new());
        server.ip(format!("link add s type veth peer name c netns {}", client.thread));
        for ip in [SERVER, MOVED, MOVED_TOO] {
            server.ip(format!("address add {ip}/24 dev s"));
        }
        client.ip(format!("address add {CLIENT}/24 dev c"));
        for (host, device) in [(&server, "s"), (&client, "c")] {
            host.ip("link set lo up".to_owned());
            host.ip(format!("link set {device} up"));
        }
        // Nothing is repeated within a test, however slow the machine: what is lost stays lost.
        client.ip(format!("route replace 10.9.0.0/24 dev c src {CLIENT} rto_min 60s"));
        if has_ipv6() {
            server.ip(format!("address add {MOVED_6}/64 dev s nodad"));
            client.ip(format!("address add {CLIENT_6}/64 dev c nodad"));
            client.ip(format!("route add fd09::/64 dev c src {CLIENT_6} metric 1 rto_min 60s"));
        }
        client.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_early_retrans", "0").unwrap());
        Self { server, client }
    }

    /// Segments that the client has sent again, and resets that it got.
    pub(super) fn repeated_and_reset(&self) -> (u64, u64) {
        self.client.run(|| {
            let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
            let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
            let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
            let value = |wanted| {
                let column = names.split(' ').position(|name| name == wanted).unwrap();
                values.split(' ').nth(column).unwrap().parse().unwrap()
            };
            (value("RetransSegs"), value("EstabResets"))
        })
    }
}
