//! One test for each blocker: a container or host that has it, beside one that has nothing.

use ferry_oci::pages::areas::Usage;

use super::super::container::{Bind, Names, Shared};
use super::super::room::NetnsFacts;
use super::super::samples::{connection, container, host, listener};
use super::*;

fn place() -> RoomFacts {
    RoomFacts {
        id_taken: false,
        listeners: vec![listener("0.0.0.0:22")],
        netns: None,
        address_on: None,
        device: Some("eth0".into()),
        missing_paths: Vec::new(),
        memory_available: 1 << 30,
        images_free: 1 << 30,
    }
}

/// Everything that can be changed before the names of the blockers are looked at.
struct Case {
    source: HostFacts,
    destination: HostFacts,
    container: ContainerFacts,
    room: RoomFacts,
    way: Way,
    ip: Option<Cidr>,
    on_source: Option<&'static str>,
    along: Vec<IpAddr>,
    link_on_ip: bool,
}

fn names(change: impl FnOnce(&mut Case)) -> Vec<&'static str> {
    let mut case = Case {
        source: host("a"),
        destination: host("b"),
        container: container(),
        room: place(),
        way: Way::Store { hidden: true },
        ip: Some("10.77.0.100/24".parse().unwrap()),
        on_source: Some("eth0"),
        along: Vec::new(),
        link_on_ip: false,
    };
    change(&mut case);
    let facts = Facts {
        source: &case.source,
        destination: &case.destination,
        container: &case.container,
        room: &case.room,
        way: case.way,
        ip: case.ip,
        ip_on_source: case.on_source,
        goes_along: &case.along,
        link_on_ip: case.link_on_ip,
    };
    blockers(&facts).into_iter().map(|b| b.name).collect()
}

#[test]
fn a_plain_container_is_not_blocked() {
    assert_eq!(names(|_| {}), [""; 0]);
}

#[test]
fn each_obstacle_is_refused_by_its_name() {
    type Change = fn(&mut Case);
    let cases: [(&str, Change); 45] = [
        ("criu-missing", |c| c.destination.criu = None),
        ("runc-missing", |c| c.source.runc = None),
        ("nf-tables", |c| c.destination.nf_tables = false),
        ("shim-missing", |c| c.destination.shim = false),
        ("same-host", |c| c.destination = c.source.clone()),
        ("architecture", |c| c.destination.arch = "aarch64".into()),
        ("cpu", |c| c.destination.cpu_flags.clear()),
        ("criu-version", |c| c.destination.criu = Some("4.1.1".into())),
        ("cgroups", |c| c.destination.cgroups = "v1".into()),
        ("runtime", |c| c.container.runtime = "io.containerd.runc.v2".into()),
        ("status", |c| c.container.status = "paused".into()),
        ("migrating", |c| c.container.migration = "m".into()),
        ("exec-open", |c| c.container.execs = vec!["sh".into()]),
        ("terminal", |c| c.container.terminal = true),
        ("pod", |c| c.container.sandbox = "p".into()),
        ("restart-policy", |c| {
            c.container.labels.insert("containerd.io/restart.status".into(), "running".into());
        }),
        ("stopped", |c| c.container.stopped = Some(7)),
        ("io-uring", |c| c.container.io_uring = vec![7]),
        ("user-namespace", |c| c.container.user_namespace = true),
        ("netns-path", |c| given(c, "/run/netns/x", Names::Hosts)),
        ("netns-path", |c| given(c, "/run/netns/x", Names::Other)),
        ("netns-path", |c| given(c, "/proc/7/ns/net", Names::Its)),
        ("netns-missing", |c| {
            given(c, "/run/netns/x", Names::Its);
            c.room.netns = Some(NetnsFacts::Missing);
        }),
        ("netns-missing", |c| {
            given(c, "/run/netns/x", Names::Its);
            c.room.netns = Some(NetnsFacts::NoNamespace);
        }),
        ("netns-missing", |c| {
            given(c, "/run/netns/x", Names::Its);
            c.room.netns = Some(NetnsFacts::Hosts);
        }),
        ("netns-address", |c| {
            given(c, "/run/netns/x", Names::Its);
            c.room.netns = Some(NetnsFacts::There(vec!["::1".parse().unwrap()]));
        }),
        ("ip-unused", |c| {
            given(c, "/run/netns/x", Names::Its);
            c.ip = Some("10.77.0.100/24".parse().unwrap());
        }),
        ("cni", |c| {
            c.container.network = Network::Devices(vec!["eth0".into()]);
            c.ip = None;
        }),
        ("namespace-joined", |c| c.container.joined = vec!["pid /proc/1/ns/pid".into()]),
        ("namespace-shared", |c| {
            c.container.shared = vec![Shared { kind: "net".into(), pid: 9 }];
        }),
        ("bind-mount", |c| {
            c.container.binds = vec![Bind { source: "/srv/data".into(), target: "/data".into() }];
        }),
        ("volume", |c| {
            let source = "/var/lib/nerdctl/1/volumes/default/v/_data".to_owned();
            c.container.binds = vec![Bind { source, target: "/data".into() }];
        }),
        ("path-missing", |c| c.room.missing_paths = vec!["/etc/hosts".into()]),
        ("hook", |c| c.container.hooks = vec!["/usr/bin/nerdctl".into()]),
        ("snapshotter", |c| c.container.snapshotter = "btrfs".into()),
        ("ip-unused", |c| c.container.network = Network::Loopback),
        ("address-primary", |c| c.along = vec!["10.77.0.1".parse().unwrap()]),
        ("address-own", |c| c.link_on_ip = true),
        ("address-missing", |c| c.on_source = None),
        ("address-taken", |c| c.room.address_on = Some("eth0".into())),
        ("address-network", |c| c.room.device = None),
        ("id-taken", |c| c.room.id_taken = true),
        ("memory", |c| c.room.memory_available = 1 << 20),
        ("memory-limit", |c| c.container.memory.limit = Some(1 << 19)),
        ("images-space", |c| c.room.images_free = 0),
    ];
    for (name, change) in cases {
        assert_eq!(names(change), [name]);
    }
}

#[test]
fn connections_that_cannot_follow_are_named() {
    let outbound = connection("10.77.0.1:40000", "10.77.0.9:6379");
    assert_eq!(names(|c| c.container.sockets.push(outbound)), ["connection"]);
    let left = connection("10.77.0.100:6379", "10.77.0.100:5000");
    assert_eq!(names(|c| c.container.sockets.push(left)), ["connection"]);
    let local = connection("127.0.0.1:6379", "127.0.0.1:5000");
    assert_eq!(names(|c| c.container.sockets.push(local.clone())), ["connection"]);
    let both = [local, connection("127.0.0.1:5000", "127.0.0.1:6379")];
    assert_eq!(names(|c| c.container.sockets.extend(both)), [""; 0]);
    assert_eq!(names(|c| c.ip = None), ["connection"]);
}

#[test]
fn connections_on_a_moved_ipv6_address_follow_and_others_do_not() {
    let with = |local: &str, remote: &str| {
        let sockets = vec![listener("[::]:6379"), connection(local, remote)];
        names(|c| {
            c.ip = Some("fd77::100/64".parse().unwrap());
            c.container.sockets = sockets;
        })
    };
    assert_eq!(with("[fd77::100]:6379", "[fd77::fe]:5"), [""; 0]);
    for (local, remote) in [
        ("10.77.0.100:6379", "10.77.0.254:5"),
        ("[fd77::1]:6379", "[fd77::fe]:5"),
        ("[fd77::100]:6379", "[fd77::100]:5"),
        ("[::1]:6379", "[::1]:5"),
    ] {
        assert_eq!(with(local, remote), ["connection"], "{local} {remote}");
    }
}

#[test]
fn a_listener_on_the_hosts_own_address_is_named() {
    let own = listener("10.77.0.1:80");
    assert_eq!(names(|c| c.container.sockets.push(own)), ["listener-address"]);
    let loopback = listener("127.0.0.1:80");
    assert_eq!(names(|c| c.container.sockets.push(loopback)), [""; 0]);
}

#[test]
fn a_port_is_taken_by_the_same_or_by_any_address() {
    for there in ["0.0.0.0:6379", "10.77.0.2:6379", "[::]:6379"] {
        assert_eq!(names(|c| c.room.listeners.push(listener(there))), ["port-taken"], "{there}");
    }
    let mut udp = listener("0.0.0.0:6379");
    udp.protocol = Protocol::Udp;
    assert_eq!(names(|c| c.room.listeners.push(udp)), [""; 0]);
}

#[test]
fn sockets_of_a_private_network_never_block() {
    let local = connection("127.0.0.1:6379", "127.0.0.1:5000");
    let change = |c: &mut Case| {
        c.container.network = Network::Loopback;
        c.container.sockets = vec![local];
        c.ip = None;
    };
    assert_eq!(names(change), [""; 0]);
}

/// In the network namespace `path`, which the destination has, with lo up.
fn given(c: &mut Case, path: &str, names: Names) {
    c.container.network = Network::Path { path: path.into(), names };
    c.container.sockets.clear();
    c.room.netns = Some(NetnsFacts::There(vec!["127.0.0.1".parse().unwrap()]));
    c.ip = None;
}

#[test]
fn in_a_namespace_given_by_path_only_connections_inside_the_container_follow() {
    let names = |sockets: &[InetSocket], there: &[&str]| {
        names(|c| {
            given(c, "/run/netns/x", Names::Its);
            c.container.sockets = sockets.to_vec();
            c.room.netns =
                Some(NetnsFacts::There(there.iter().map(|ip| ip.parse().unwrap()).collect()));
        })
    };
    let (lo, veth) = ("127.0.0.1", "10.99.0.5");
    assert_eq!(names(&[], &[lo]), [""; 0]);
    let pair = [
        connection("127.0.0.7:80", "127.0.0.1:5000"),
        connection("127.0.0.1:5000", "127.0.0.7:80"),
    ];
    assert_eq!(names(&pair, &[lo]), [""; 0]);
    // The other end is outside.
    assert_eq!(names(&pair[..1], &[lo]), ["connection"]);
    let out = connection("10.99.0.5:40000", "10.99.0.9:80");
    assert_eq!(names(&[out], &[lo, veth]), ["connection"]);
    let pair = [connection("10.99.0.5:80", "127.0.0.1:5000"), listener("0.0.0.0:80")];
    let other = connection("127.0.0.1:5000", "10.99.0.5:80");
    let all = [&pair[..], &[other]].concat();
    assert_eq!(names(&all, &[lo, veth]), [""; 0]);
    assert_eq!(names(&all, &[lo]), ["netns-address"]);
    assert_eq!(names(&[listener("10.99.0.5:80")], &[lo]), ["netns-address"]);
    // What listens there is looked for in the namespace.
    assert_eq!(names(&[listener("0.0.0.0:22")], &[lo]), ["port-taken"]);
}

/// Processes that share memory copy-on-write: 100 MB, and 400 MB when each has its own.
fn forked(c: &mut Case) {
    c.container.memory.usage = Usage { once: 100 << 20, each: 400 << 20, ..Usage::default() };
}

#[test]
fn memory_is_counted_for_each_process_unless_it_is_shared_again() {
    let with = |available: u64, way: Way| {
        names(|c| {
            forked(c);
            c.room.memory_available = available << 20;
            c.way = way;
        })
    };
    let store = Way::Store { hidden: true };
    assert_eq!(with(400, store), ["memory"]);
    assert_eq!(with(470, store), [""; 0]);
    // The dump lies beside it.
    assert_eq!(with(470, Way::Store { hidden: false }), ["memory"]);
    // Images and processes.
    assert_eq!(with(230, Way::Images), ["memory"]);
    assert_eq!(with(270, Way::Images), [""; 0]);
}

#[test]
fn a_limit_that_holds_now_is_too_low_where_nothing_is_shared() {
    let with = |limit: u64, way: Way| {
        names(|c| {
            forked(c);
            c.container.memory.limit = Some(limit << 20);
            c.way = way;
        })
    };
    let store = Way::Store { hidden: true };
    assert_eq!(with(200, store), ["memory-limit"]);
    assert_eq!(with(400, store), [""; 0]);
    assert_eq!(with(200, Way::Images), [""; 0]);
    assert_eq!(with(99, Way::Images), ["memory-limit"]);
}

#[test]
fn the_cure_for_too_little_memory_is_named() {
    let (a, b, mut container, mut room) = (host("a"), host("b"), container(), place());
    container.memory.usage = Usage { once: 100 << 20, each: 400 << 20, ..Usage::default() };
    container.memory.limit = Some(200 << 20);
    room.memory_available = 300 << 20;
    let facts = Facts {
        source: &a,
        destination: &b,
        container: &container,
        room: &room,
        way: Way::Store { hidden: true },
        ip: None,
        ip_on_source: None,
        goes_along: &[],
        link_on_ip: false,
    };
    let found: Vec<_> = blockers(&facts).into_iter().filter(|b| b.name != "connection").collect();
    let said = |n: usize| format!("{}; {}", found[n].what, found[n].cure);
    assert_eq!(
        said(0),
        "the destination has 300 MiB of memory available, 464 MiB are needed (300 MiB of them for \
         pages that its processes share now and will not share then); free memory there, or move \
         it with --mode stop, which keeps them shared"
    );
    assert_eq!(
        said(1),
        "redis needs 400 MiB where it goes (300 MiB of them for pages that its processes share \
         now and will not share then), its memory limit is 200 MiB; raise the limit, or move it \
         with --mode stop, which keeps them shared"
    );
}

#[test]
fn versions_are_compared_by_number() {
    assert!(version("4.10") > version("4.9.1"));
    assert!(version("4.2.1-3") >= version("4.2.1"));
}
