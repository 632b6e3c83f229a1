//! On the real kernel, in network namespaces of their own.

mod net;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use ferry_oci::quarantine;
use nix::sys::socket::{setsockopt, sockopt::TcpRepair};

use super::*;
use ferry_oci::announce::Announcement;
use net::{MOVED, MOVED_TOO, Net, client_for, in_both_families};

/// Longer than anything here takes; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

fn connect(net: &Net, to: IpAddr) -> (TcpStream, TcpStream) {
    let listener = net.server.run(move || TcpListener::bind((to, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let client = net.client.run(move || TcpStream::connect(address).unwrap());
    client.set_nodelay(true).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (client, server)
}

/// A sender on the client and a receiver on the server's `address`, which know of each other.
fn datagrams(net: &Net, address: IpAddr) -> (UdpSocket, UdpSocket) {
    let receiver = net.server.run(move || UdpSocket::bind((address, 0)).unwrap());
    let to = receiver.local_addr().unwrap();
    let sender = net.client.run(move || UdpSocket::bind((client_for(address), 0)).unwrap());
    sender.connect(to).unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    sender.send(&u32::MAX.to_be_bytes()).unwrap();
    assert_eq!(number(&receiver), u32::MAX);
    (sender, receiver)
}

fn number(receiver: &UdpSocket) -> u32 {
    let mut bytes = [0; 4];
    receiver.recv(&mut bytes).expect("a datagram arrives");
    u32::from_be_bytes(bytes)
}

fn hold(net: &Net, migration: &'static str, address: IpAddr) -> Held {
    let held = net.server.run(move || Held::start(migration, &[address], true).unwrap());
    assert!(matches!(held.how(), How::Queued(_)));
    held
}

/// Waits until `count` packets are held.
fn wait_for(held: &Held, count: u64) {
    let start = Instant::now();
    while held.count() < count {
        assert!(start.elapsed() < PATIENCE, "{} of {count} packets came", held.count());
        sleep(Duration::from_millis(1));
    }
}

fn nothing_arrives(receiver: &UdpSocket) -> bool {
    receiver.set_nonblocking(true).unwrap();
    let result = receiver.recv(&mut [0; 4]);
    receiver.set_nonblocking(false).unwrap();
    result.is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
}

/// Rules on the server. It has no queue any more.
fn left_behind(net: &Net) -> Vec<String> {
    let queues = || std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue");
    let start = Instant::now();
    // A program that another test starts just now may have its socket for a moment.
    while !net.server.run(move || queues().unwrap()).is_empty() {
        assert!(start.elapsed() < PATIENCE, "a queue is left");
        sleep(Duration::from_millis(1));
    }
    net.server.run(|| quarantine::present().unwrap())
}

#[test]
fn tcp_that_was_held_arrives_in_order_without_a_retransmission() {
    in_both_families(|net, moved| {
        let (mut client, mut server) = connect(net, moved);
        let held = hold(net, "m-1", moved);
        let sent: Vec<u8> = (0..8).collect();
        for byte in &sent {
            client.write_all(&[*byte]).unwrap();
        }
        wait_for(&held, 8);
        sleep(Duration::from_millis(50));
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
        server.set_nonblocking(false).unwrap();
        held.open().unwrap();
        assert_eq!(held.release().unwrap(), 8);
        let mut received = [0; 8];
        server.read_exact(&mut received).unwrap();
        assert_eq!(received, *sent);
        server.write_all(b"answer").unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.read_exact(&mut [0; 6]).unwrap();
        assert_eq!(net.repeated_and_reset(), (0, 0));
        held.finish().unwrap();
        assert!(left_behind(net).is_empty());
    });
}

#[test]
fn a_new_connection_waits_and_is_made_after_the_release() {
    in_both_families(|net, moved| {
        drop(datagrams(net, moved)); // the client knows the way
        let listener = net.server.run(move || TcpListener::bind((moved, 0)).unwrap());
        let address = listener.local_addr().unwrap();
        let held = hold(net, "m-1", moved);
        thread::scope(|scope| {
            let client = &net.client;
            let connect = move || TcpStream::connect_timeout(&address, PATIENCE).map(drop);
            let connecting = scope.spawn(move || client.run(connect));
            wait_for(&held, 1);
            assert!(!connecting.is_finished());
            held.open().unwrap();
            held.release().unwrap();
            connecting.join().unwrap().unwrap();
        });
        assert_eq!(net.repeated_and_reset().0, 0);
    });
}

#[test]
fn an_announcement_leads_clients_here_while_the_address_is_silent() {
    in_both_families(|net, moved| {
        let (sender, receiver) = datagrams(net, moved);
        // As if the address were elsewhere.
        net.client
            .ip(format!("neighbour replace {moved} lladdr 02:00:00:00:00:09 dev c nud stale"));
        let held = hold(net, "m-1", moved);
        sender.send(&[1; 4]).unwrap();
        let announcement = net.server.run(move || Announcement::prepare(moved, "s").unwrap());
        assert_eq!(held.count(), 0);
        announcement.send().unwrap();
        sender.send(&[2; 4]).unwrap();
        wait_for(&held, 1);
        held.open().unwrap();
        held.release().unwrap();
        assert_eq!(number(&receiver), u32::from_be_bytes([2; 4]));
    });
}

#[test]
fn neighbours_get_no_answer_about_the_address_until_it_is_opened() {
    in_both_families(|net, moved| {
        let (sender, _receiver) = datagrams(net, moved);
        let held = hold(net, "m-1", moved);
        net.client.ip(format!("neighbour del {moved} dev c"));
        sender.send(&[1; 4]).unwrap();
        sleep(Duration::from_millis(50));
        assert_eq!(held.count(), 0);
        held.open().unwrap();
        wait_for(&held, 1); // asked again after a second
    });
}

#[test]
fn no_datagram_is_lost_when_the_queue_hands_over_to_the_direct_way() {
    let net = Net::new();
    let (sender, receiver) = datagrams(&net, MOVED);
    let held = hold(&net, "m-1", MOVED);
    let waiting = 100;
    (0..waiting).for_each(|n: u32| _ = sender.send(&n.to_be_bytes()).unwrap());
    wait_for(&held, u64::from(waiting));
    let stop = Arc::new(AtomicBool::new(false));
    let sending = thread::spawn({
        let stop = stop.clone();
        move || {
            let mut n = waiting;
            while !stop.load(Ordering::Relaxed) {
                sender.send(&n.to_be_bytes()).unwrap();
                n += 1;
                sleep(Duration::from_micros(20));
            }
            sender.send(&u32::MAX.to_be_bytes()).unwrap();
            n
        }
    });
    let receiving = thread::spawn(move || {
        let numbers = std::iter::from_fn(|| Some(number(&receiver)).filter(|n| *n != u32::MAX));
        numbers.collect::<Vec<_>>()
    });
    wait_for(&held, u64::from(waiting) + 10);
    held.open().unwrap();
    held.release().unwrap();
    sleep(Duration::from_millis(5));
    held.finish().unwrap();
    stop.store(true, Ordering::Relaxed);
    let sent = sending.join().unwrap();
    let received = receiving.join().unwrap();
    assert!(received.iter().take(110).copied().eq(0..110), "held ones come first, in their order");
    assert_eq!(received.iter().copied().collect::<BTreeSet<_>>(), (0..sent).collect());
    assert_eq!(received.len(), sent as usize);
    assert!(left_behind(&net).is_empty());
}

#[test]
fn what_was_held_is_gone_when_it_is_dropped() {
    in_both_families(|net, moved| {
        let (sender, receiver) = datagrams(net, moved);
        let held = hold(net, "m-1", moved);
        sender.send(&[1; 4]).unwrap();
        wait_for(&held, 1);
        assert_eq!(held.drop_all().unwrap(), 1);
        sender.send(&[2; 4]).unwrap();
        wait_for(&held, 2);
        held.finish().unwrap();
        assert!(nothing_arrives(&receiver));
        sender.send(&[3; 4]).unwrap();
        assert_eq!(number(&receiver), u32::from_be_bytes([3; 4]));
    });
}

/// Not a test: the process that the next one kills.
#[test]
#[ignore = "started by another test"]
fn holds_until_it_is_killed() {
    if std::env::var_os("FERRY_HOLDS").is_some() {
        let held = Held::start("m-1", &[MOVED], true).unwrap();
        println!("\nholds");
        let start = Instant::now();
        while start.elapsed() < PATIENCE * 2 {
            println!("count {}", held.count());
            sleep(Duration::from_millis(1));
        }
    }
}

fn process_that_holds(net: &Net) -> (Child, impl Iterator<Item = String>) {
    let name = "network::queue::tests::holds_until_it_is_killed";
    let mut child = net.server.run(move || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", name])
            .env("FERRY_HOLDS", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line == "holds"));
    (child, lines)
}

#[test]
fn a_reader_killed_before_the_release_lets_nothing_through_and_no_reset_reaches_the_client() {
    let net = Net::new();
    let (mut client, server) = connect(&net, MOVED);
    let (sender, receiver) = datagrams(&net, MOVED);
    let (mut reader, mut lines) = process_that_holds(&net);
    // The connection is known to no socket here, as before a restore.
    setsockopt(&server, TcpRepair, &1).unwrap();
    drop(server);
    client.write_all(b"x").unwrap();
    sender.send(&[1; 4]).unwrap();
    assert!(lines.any(|line| line == "count 2"));
    reader.kill().unwrap();
    reader.wait().unwrap();
    client.write_all(b"x").unwrap();
    sender.send(&[2; 4]).unwrap();
    sleep(Duration::from_millis(50));
    assert!(nothing_arrives(&receiver));
    assert_eq!(net.repeated_and_reset(), (0, 0));
    assert!(client.take_error().unwrap().is_none());
    // The next agent finds the rules by the migration's id. Without them the client is reset.
    assert_eq!(left_behind(&net), ["m-1"]);
    net.server.run(|| quarantine::clear("m-1").unwrap());
    client.write_all(b"x").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn packets_pass_when_the_reader_dies_after_the_release() {
    let net = Net::new();
    let (sender, receiver) = datagrams(&net, MOVED);
    let held = hold(&net, "m-1", MOVED);
    sender.send(&[1; 4]).unwrap();
    wait_for(&held, 1);
    held.release().unwrap();
    drop(held);
    sender.send(&[2; 4]).unwrap();
    assert_eq!([number(&receiver), number(&receiver)], [1, 2].map(|n| u32::from_be_bytes([n; 4])));
    net.server.run(|| quarantine::clear("m-1").unwrap());
    assert!(left_behind(&net).is_empty());
}

#[test]
fn two_migrations_at_once_do_not_touch_each_other() {
    let net = Net::new();
    let (one_sender, one) = datagrams(&net, MOVED);
    let (two_sender, two) = datagrams(&net, MOVED_TOO);
    let first = hold(&net, "m-1", MOVED);
    let second = hold(&net, "m-2", MOVED_TOO);
    assert_ne!(first.how(), second.how());
    one_sender.send(&[1; 4]).unwrap();
    two_sender.send(&[2; 4]).unwrap();
    wait_for(&first, 1);
    wait_for(&second, 1);
    first.release().unwrap();
    assert_eq!(number(&one), u32::from_be_bytes([1; 4]));
    assert!(nothing_arrives(&two));
    // Removing the first one's chains would drop what waits for the second: it waits for that.
    let finishing = net.server.run(|| thread::spawn(|| first.finish()));
    sleep(Duration::from_millis(60));
    second.release().unwrap();
    assert_eq!(number(&two), u32::from_be_bytes([2; 4]));
    finishing.join().unwrap().unwrap();
    assert_eq!(net.server.run(|| quarantine::present().unwrap()), ["m-2"]);
    net.server.run(|| second.finish().unwrap());
    assert!(left_behind(&net).is_empty());
}

#[test]
fn a_queue_that_somebody_reads_is_left_alone() {
    let net = Net::new();
    net.server.run(|| {
        let theirs = Queue::take(7).unwrap();
        let ours = Queue::take(7).unwrap();
        assert_eq!(ours.number(), theirs.number() + 1);
    });
}

/// A measurement for a person: `cargo test -p ferry-cli release_takes -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn how_long_a_release_takes() {
    let net = Net::new();
    let (sender, receiver) = datagrams(&net, MOVED);
    for count in [1, 10, 100, 1, 10, 100] {
        let start = Instant::now();
        let held = hold(&net, "m-1", MOVED);
        let started = start.elapsed();
        (0..count).for_each(|_| _ = sender.send(&[0; 4]).unwrap());
        wait_for(&held, count);
        let start = Instant::now();
        held.open().unwrap();
        let opened = start.elapsed();
        let waiting = thread::spawn({
            let receiver = receiver.try_clone().unwrap();
            move || {
                (0..count).for_each(|_| _ = number(&receiver));
                Instant::now()
            }
        });
        sleep(Duration::from_millis(20));
        let start = Instant::now();
        held.release().unwrap();
        let released = start.elapsed();
        let arrived = waiting.join().unwrap() - start;
        let start = Instant::now();
        held.finish().unwrap();
        let finished = start.elapsed();
        println!(
            "{count} packets: start {started:?}, open {opened:?}, release {released:?}, \
             last one read after {arrived:?}, finish {finished:?}"
        );
    }
}
