//! On the real kernel, each in a network namespace of its own.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use super::rules::Verdict;
use super::*;

/// All of 127.0.0.0/8 is this host's: one address is the moved one, another the client's.
const MOVED: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3));

/// Runs `test` in a network namespace that ends with it.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace, as root");
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Whether a datagram reaches `to`. One that is not dropped arrives before `send_to` returns.
fn passes(to: IpAddr) -> bool {
    let receiver = UdpSocket::bind((to, 0)).unwrap();
    receiver.set_nonblocking(true).unwrap();
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    sender.send_to(b"x", receiver.local_addr().unwrap()).unwrap();
    receiver.recv(&mut [0; 8]).is_ok()
}

/// Whether a datagram from `ip` to itself may be sent, and arrives.
fn crosses(ip: IpAddr) -> bool {
    let receiver = UdpSocket::bind((ip, 0)).unwrap();
    receiver.set_nonblocking(true).unwrap();
    let sender = UdpSocket::bind((ip, 0)).unwrap();
    let sent = sender.send_to(b"x", receiver.local_addr().unwrap());
    sent.is_ok() && receiver.recv(&mut [0; 8]).is_ok()
}

/// Whether `from` may send.
fn sends(from: IpAddr) -> bool {
    let sender = UdpSocket::bind((from, 0)).unwrap();
    sender.send_to(b"x", (Ipv4Addr::LOCALHOST, 9)).is_ok()
}

#[test]
fn a_prepared_lock_silences_its_addresses_only_while_it_is_locked() {
    in_namespace(|| {
        let lock = Prepared::new("m-1", &[MOVED]).unwrap();
        assert!(passes(MOVED) && sends(MOVED));
        for _ in 0..2 {
            lock.lock().unwrap();
            lock.lock().unwrap();
            assert!(!passes(MOVED) && !sends(MOVED));
            assert!(passes(OTHER) && sends(OTHER));
            lock.unlock().unwrap();
            lock.unlock().unwrap();
            assert!(passes(MOVED) && sends(MOVED));
        }
        lock.lock().unwrap();
        assert_eq!(present().unwrap(), ["m-1"]);
        drop(lock);
        assert!(passes(MOVED) && present().unwrap().is_empty());
    });
}

#[test]
fn a_locked_connection_lives_on_and_loses_nothing() {
    in_namespace(|| {
        let listener = TcpListener::bind((MOVED, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let lock = Prepared::new("m-1", &[MOVED]).unwrap();
        lock.lock().unwrap();
        client.write_all(b"held").unwrap();
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(lock);
        server.set_nonblocking(false).unwrap();
        let mut data = [0; 4];
        server.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"held");
    });
}

#[test]
fn a_lock_that_is_left_stays_until_its_migration_is_cleared() {
    in_namespace(|| {
        for migration in ["m-1", "m-2"] {
            let address = if migration == "m-1" { MOVED } else { OTHER };
            let lock = Prepared::new(migration, &[address]).unwrap();
            lock.lock().unwrap();
            lock.leave();
        }
        assert_eq!(present().unwrap(), ["m-1", "m-2"]);
        clear("m-1").unwrap();
        clear("m-1").unwrap();
        assert!(passes(MOVED) && !passes(OTHER));
        assert_eq!(present().unwrap(), ["m-2"]);
    });
}

#[test]
fn a_table_is_removed_by_its_name_and_no_other() {
    in_namespace(|| {
        for migration in ["m-1", "m-2"] {
            let lock = Prepared::new(migration, &[MOVED]).unwrap();
            lock.lock().unwrap();
            lock.leave();
        }
        remove_table("ferry-m-1").unwrap();
        remove_table("ferry-m-1").unwrap();
        remove_table("CRIU-7").unwrap();
        assert_eq!(present().unwrap(), ["m-2"]);
        assert!(!passes(MOVED));
        remove_table("ferry-m-2").unwrap();
        assert!(passes(MOVED));
    });
}

#[test]
fn a_lock_whose_tables_were_taken_away_says_so() {
    in_namespace(|| {
        let lock = Prepared::new("m-1", &[MOVED]).unwrap();
        clear("m-1").unwrap();
        let error = lock.lock().unwrap_err();
        assert_eq!(error.to_string(), "lock the connections");
        assert_eq!(error.source.kind(), ErrorKind::NotFound);
    });
}

#[test]
fn without_queues_packets_are_dropped_until_the_address_is_opened() {
    in_namespace(|| {
        let hold = Hold::new("m-1", &[MOVED], None).unwrap();
        assert_eq!(hold.how(), How::Dropped);
        assert!(!passes(MOVED) && !sends(MOVED));
        hold.open().unwrap();
        assert!(passes(MOVED) && sends(MOVED));
        hold.remove().unwrap();
        assert!(present().unwrap().is_empty());
    });
}

#[test]
fn a_queue_without_a_reader_drops_until_packets_pass() {
    in_namespace(|| {
        let hold = Hold::new("m-1", &[MOVED], Some(20_000)).unwrap();
        assert_eq!(hold.how(), How::Queued(20_000));
        assert!(!passes(MOVED) && !sends(MOVED) && passes(OTHER));
        hold.open().unwrap();
        assert!(!passes(MOVED) && sends(MOVED));
        hold.pass().unwrap();
        assert!(passes(MOVED));
    });
}

#[test]
fn both_ways_to_queue_are_tried_and_a_refusal_changes_nothing() {
    in_namespace(|| {
        let socket = Socket::open().unwrap();
        let install = |verdict| {
            let script = Script::new("ferry-m-1").create(&[MOVED]).silence(&[MOVED], verdict);
            run(&socket, script, "try")
        };
        let ways = [Verdict::Queue(20_000), Verdict::Target(20_000)].map(|way| {
            let result = install(way);
            assert_eq!(present().unwrap().is_empty(), result.is_err(), "{way:?}");
            clear("m-1").unwrap();
            result.is_ok()
        });
        assert!(ways.contains(&true), "{ways:?}");
    });
}

#[test]
fn an_ipv6_address_is_silent_too() {
    in_namespace(|| {
        let moved: IpAddr = "::1".parse().unwrap();
        let lock = Prepared::new("m-1", &[moved, MOVED]).unwrap();
        assert!(crosses(moved));
        lock.lock().unwrap();
        assert!(!crosses(moved) && !passes(MOVED) && passes(OTHER));
        lock.unlock().unwrap();
        assert!(crosses(moved));
    });
}

#[test]
fn a_lock_for_all_lets_nothing_pass_whatever_the_address() {
    in_namespace(|| {
        let v6: IpAddr = Ipv6Addr::LOCALHOST.into();
        let lock = Prepared::for_all("m-1").unwrap();
        for _ in 0..2 {
            assert!([MOVED, OTHER, v6].into_iter().all(crosses));
            lock.lock().unwrap();
            assert!(![MOVED, OTHER, v6].into_iter().any(crosses));
            lock.unlock().unwrap();
        }
        lock.lock().unwrap();
        drop(lock);
        assert!([MOVED, OTHER, v6].into_iter().all(crosses) && present().unwrap().is_empty());
    });
}

/// A measurement for a person: `cargo test -p ferry-oci lock_takes -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn how_long_a_lock_takes() {
    in_namespace(|| {
        let median = |mut times: Vec<Duration>| {
            times.sort();
            (times[times.len() / 2], times[times.len() - 1])
        };
        let start = Instant::now();
        let lock = Prepared::new("m-1", &[MOVED]).unwrap();
        println!("prepare {:?}", start.elapsed());
        let (mut locks, mut unlocks) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            let start = Instant::now();
            lock.lock().unwrap();
            locks.push(start.elapsed());
            let start = Instant::now();
            lock.unlock().unwrap();
            unlocks.push(start.elapsed());
        }
        println!("lock (median, longest) {:?}, unlock {:?}", median(locks), median(unlocks));
        let start = Instant::now();
        drop(lock);
        println!("remove {:?}", start.elapsed());
    });
}

/// A connection over loopback, its client's end first.
fn connected(to: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((to, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for end in [&client, &server] {
        end.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    }
    (client, server)
}

fn of(server: &TcpStream) -> connections::Connection {
    let (local, remote) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
    connections::Connection { local, remote }
}

/// Whether what one end writes is read at the other.
fn arrives(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    from.write_all(b"x").unwrap();
    to.read(&mut [0; 16]).is_ok()
}

#[test]
fn connections_are_silent_until_they_are_unlocked_and_others_never() {
    for address in ["127.0.0.1", "::1"] {
        in_namespace(move || {
            let (mut client, mut server) = connected(address);
            let (mut other_client, mut other_server) = connected(address);
            connections::lock("one", &[of(&server)], Duration::from_secs(60)).unwrap();
            assert_eq!(connections::locked().unwrap(), ["one"]);
            assert_eq!(tables().unwrap(), ["ferry_checkpoint_one"]);
            let remaining = connections::remaining("one").unwrap();
            assert_eq!(remaining.connections, 1);
            assert!((50..=60).contains(&remaining.seconds), "{remaining:?}");
            assert!(!arrives(&mut client, &mut server), "{address}: in");
            assert!(!arrives(&mut server, &mut client), "{address}: out");
            assert!(arrives(&mut other_client, &mut other_server));
            // Again, for more of them.
            let both = [of(&server), of(&other_server)];
            connections::lock("one", &both, Duration::from_secs(60)).unwrap();
            assert!(!arrives(&mut other_client, &mut other_server));
            connections::unlock("one").unwrap();
            connections::unlock("one").unwrap();
            assert!(connections::locked().unwrap().is_empty());
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            assert!(server.read(&mut [0; 16]).is_ok(), "{address}: it comes again");
        });
    }
}

#[test]
fn a_lock_that_is_forgotten_ends_with_its_time() {
    in_namespace(|| {
        let (mut client, mut server) = connected("127.0.0.1");
        connections::lock("one", &[of(&server)], Duration::from_millis(500)).unwrap();
        assert!(!arrives(&mut client, &mut server));
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert!(server.read(&mut [0; 16]).is_ok());
        assert_eq!(connections::remaining("one").unwrap().connections, 0);
    });
}

#[test]
fn a_peer_of_a_locked_connection_that_has_ended_hears_nothing() {
    in_namespace(|| {
        let (mut client, server) = connected("127.0.0.1");
        let (mut plain, gone) = connected("127.0.0.1");
        connections::lock("one", &[of(&server)], Duration::from_secs(60)).unwrap();
        for ended in [server, gone] {
            nix::sys::socket::setsockopt(&ended, nix::sys::socket::sockopt::TcpRepair, &1).unwrap();
        }
        client.write_all(b"x").unwrap();
        plain.write_all(b"x").unwrap();
        let reset = |stream: &mut TcpStream| match stream.read(&mut [0; 16]) {
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
            Ok(_) => false,
        };
        assert!(reset(&mut plain), "without a lock the kernel answers");
        assert!(!reset(&mut client), "with a lock it does not");
    });
}

#[test]
fn more_connections_than_a_message_holds_are_locked() {
    in_namespace(|| {
        let all: Vec<_> = (1..=2000)
            .map(|port| connections::Connection {
                local: (MOVED, 80).into(),
                remote: (OTHER, port).into(),
            })
            .collect();
        connections::lock("many", &all, Duration::from_secs(60)).unwrap();
        let listed = Command::new("nft").args(["list", "ruleset"]).output();
        if let Ok(listed) = listed {
            let text = String::from_utf8_lossy(&listed.stdout).into_owned();
            assert!(text.matches("127.0.0.3 . ").count() >= 2000, "{text}");
        }
        connections::unlock("many").unwrap();
    });
}
