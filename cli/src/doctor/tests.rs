//! Each check, on facts that nothing is wrong with but what it looks for.

use std::collections::{BTreeMap, BTreeSet};

use ferry_oci::pages::tracker::Probe;
use ferry_oci::quarantine::connections::Remaining;
use ferry_oci::sockets::{Kind, Outside, Unread};

use super::container::Processes;
use super::host::Host;
use super::locks::Lock;
use super::*;
use crate::describe::container::{Bind, ContainerFacts, Names, Network};
use crate::describe::samples;

fn host() -> Host {
    Host {
        base: samples::host("a"),
        containerd_error: None,
        containerd_owner: 0,
        criu_installed: true,
        runc_installed: true,
        criu_check: Vec::new(),
        user_namespace: false,
        capabilities: u64::MAX,
        seccomp: false,
        ptrace_scope: 1,
        checkpoint_restore: true,
        run_is_tmpfs: true,
        pipe_max_size: 1 << 20,
        tracker: Probe { write_protect: true, soft_dirty: true, ..Probe::default() },
        apparmor: true,
        apparmor_parser: true,
        selinux: false,
        iptables: "nf_tables".into(),
        tables: vec!["filter".into()],
        criu_rules: 0,
        locks: Vec::new(),
        unsettled: 0,
    }
}

/// Names and severities of what is found.
fn of_host(spoil: impl FnOnce(&mut Host)) -> Vec<(&'static str, Severity)> {
    let mut host = host();
    spoil(&mut host);
    let mut found = Findings::default();
    host_checks::all(&host, &mut found);
    assert!(found.0.iter().all(|f| !f.cure.is_empty() && !f.what.ends_with('.')), "{:?}", found.0);
    found.0.iter().map(|finding| (finding.name, finding.severity)).collect()
}

use Severity::{Blocker, Note, Warning};

#[test]
fn a_host_with_everything_has_nothing_to_hear() {
    assert_eq!(of_host(|_| {}), []);
}

#[test]
fn each_lack_of_a_host_is_named() {
    type Spoil = fn(&mut Host);
    let cases: [(Spoil, &str, Severity); 30] = [
        (|h| h.user_namespace = true, "rootless", Blocker),
        (|h| h.containerd_owner = 1000, "rootless", Blocker),
        (|h| h.capabilities &= !(1 << 21), "capability", Blocker),
        (|h| h.capabilities &= !(1 << 12), "capability", Blocker),
        (|h| h.containerd_error = Some("no".into()), "containerd", Blocker),
        (|h| (h.base.criu, h.criu_installed) = (None, false), "criu-missing", Blocker),
        (|h| h.base.criu = None, "criu-broken", Blocker),
        (|h| h.base.criu = Some("4.1.1".into()), "criu-old", Blocker),
        (
            |h| (h.base.criu, h.base.kernel) = (Some("4.1.1".into()), "6.12.1-x".into()),
            "criu-old",
            Warning,
        ),
        (
            |h| (h.base.criu, h.base.kernel) = (Some("4.0".into()), "6.14.0".into()),
            "criu-old",
            Blocker,
        ),
        (
            |h| (h.base.criu, h.base.kernel) = (Some("3.16".into()), "6.1.0".into()),
            "criu-old",
            Blocker,
        ),
        (|h| h.criu_check = vec!["Error (x)".into()], "criu-check", Warning),
        (|h| (h.base.runc, h.runc_installed) = (None, false), "runc-missing", Blocker),
        (|h| h.base.runc = None, "runc-missing", Blocker),
        (|h| h.base.runc = Some("1.1.15".into()), "runc-old", Warning),
        (|h| h.base.shim = false, "shim-missing", Blocker),
        (|h| h.base.hide_library = false, "hide-library", Note),
        (|h| h.base.fast_tar = false, "fast-tar", Note),
        (|h| h.checkpoint_restore = false, "kernel-checkpoint", Blocker),
        (|h| h.tracker.soft_dirty = false, "soft-dirty", Note),
        (|h| h.tracker.write_protect = false, "tracker", Warning),
        (|h| h.run_is_tmpfs = false, "run-tmpfs", Warning),
        (|h| h.base.cgroups = "hybrid".into(), "cgroups", Note),
        (|h| h.ptrace_scope = 3, "ptrace", Blocker),
        (|h| h.seccomp = true, "seccomp-suspend", Warning),
        (|h| h.apparmor_parser = false, "apparmor", Warning),
        (|h| h.selinux = true, "selinux", Note),
        (|h| h.base.nf_tables = false, "nf-tables", Blocker),
        (|h| h.iptables = "legacy".into(), "iptables-legacy", Warning),
        (|h| h.unsettled = 1, "unsettled", Warning),
    ];
    for (spoil, name, severity) in cases {
        assert_eq!(of_host(spoil), [(name, severity)], "{name}");
    }
}

#[test]
fn without_the_right_to_resources_pipes_are_short_and_users_are_left_out() {
    let without = |pipes| of_host(|h| (h.capabilities, h.pipe_max_size) = (!(1 << 24), pipes));
    assert_eq!(without(1 << 20), [("limits", Warning), ("pipe-max-size", Warning)]);
    assert_eq!(without(4 << 20), [("limits", Warning)]);
    let processes = Processes { users: BTreeSet::from([0, 1000]), ..Processes::default() };
    let mut found = Findings::default();
    let host = Host { capabilities: !(1 << 24), ..host() };
    container_checks::all(&samples::container(), &processes, &host, &mut found);
    assert_eq!(found.0[0].name, "limits");
    assert_eq!(found.0[0].severity, Blocker);
}

#[test]
fn rules_left_behind_are_told_from_locks_that_are_wanted() {
    let left = of_host(|h| h.tables.push("CRIU-1234".into()));
    assert_eq!(left, [("criu-rules", Warning)]);
    assert_eq!(of_host(|h| h.criu_rules = 8), [("criu-rules", Warning)]);
    let lock = |connections| of_host(|h| h.locks = vec![lock(connections, None)]);
    assert_eq!(lock(2), [("checkpoint-lock", Note)]);
    assert_eq!(lock(0), [("checkpoint-lock", Note)]);
}

fn lock(connections: usize, netns: Option<&str>) -> Lock {
    let remaining = Remaining { connections, seconds: 100 };
    Lock { id: "0123456789abcdef".into(), netns: netns.map(Into::into), remaining }
}

#[test]
fn a_lock_is_told_with_its_namespace_and_once() {
    let mut found = Findings::default();
    lock(2, Some("/run/netns/x")).tell(&mut found);
    lock(0, Some("/run/netns/x")).tell(&mut found);
    let (full, empty) = (&found.0[0], &found.0[1]);
    assert!(full.what.contains("in the network namespace /run/netns/x"), "{full:?}");
    assert!(empty.cure.contains("nsenter --net=/run/netns/x nft delete table"), "{empty:?}");
    let told = |host: Host| {
        let checkpoint_locks = vec![lock(2, Some("/proc/7/ns/net"))];
        let processes = Processes { checkpoint_locks, ..Processes::default() };
        let mut found = Findings::default();
        container_checks::all(&samples::container(), &processes, &host, &mut found);
        found.0.iter().map(|finding| finding.name).collect::<Vec<_>>()
    };
    assert_eq!(told(host()), ["checkpoint-lock"]);
    let known = Host { locks: vec![lock(2, Some("/run/netns/x"))], ..host() };
    assert_eq!(told(known), Vec::<&str>::new());
}

fn of_container(
    spoil: impl FnOnce(&mut ContainerFacts, &mut Processes),
) -> Vec<(&'static str, Severity)> {
    let (mut facts, mut processes) = (samples::container(), Processes::default());
    spoil(&mut facts, &mut processes);
    let mut found = Findings::default();
    container_checks::all(&facts, &processes, &host(), &mut found);
    found.0.iter().map(|finding| (finding.name, finding.severity)).collect()
}

fn socket(family: i32, protocol: u32) -> Kind {
    Kind { pid: 7, fd: 3, family: family as u16, protocol }
}

#[test]
fn each_lack_of_a_container_is_named() {
    type Spoil = fn(&mut ContainerFacts, &mut Processes);
    let cases: [(Spoil, &str, Severity); 33] = [
        (|c, p| (c.stopped, _) = (Some(7), p.stopped.insert(7)), "stopped", Blocker),
        (|_, p| _ = p.stopped.insert(7), "stopped", Warning),
        (|c, _| c.runtime = "io.containerd.runc.v2".into(), "runtime", Blocker),
        (|c, _| c.io_uring = vec![7], "io-uring", Blocker),
        (|c, _| c.status = "created".into(), "status", Blocker),
        (|c, _| c.status = "paused".into(), "status", Warning),
        (|c, _| c.terminal = true, "terminal", Warning),
        (|c, _| c.execs = vec!["x".into()], "exec-open", Warning),
        (|c, _| c.sandbox = "pod".into(), "pod", Warning),
        (|c, _| c.user_namespace = true, "user-namespace", Warning),
        (|c, _| c.hooks = vec!["/bin/x".into()], "hook", Warning),
        (|c, _| c.network = Network::Devices(vec!["eth0".into()]), "cni", Warning),
        (|c, _| c.snapshotter = "native".into(), "snapshotter", Warning),
        (|c, _| c.memory.limit = Some(1 << 19), "memory-limit", Warning),
        // Its one connection leaves the namespace.
        (
            |c, _| {
                let path = "/run/netns/x".into();
                c.network = Network::Path { path, names: Names::Its };
            },
            "connection",
            Warning,
        ),
        (
            |c, _| c.binds.push(Bind { source: "/srv".into(), target: "/srv".into() }),
            "bind-mount",
            Warning,
        ),
        (|_, p| _ = p.anonymous.insert((7, "userfaultfd".into())), "file-kind", Blocker),
        (|_, p| _ = p.devices.insert((7, "/dev/kvm".into())), "device", Blocker),
        (|_, p| _ = p.host_files.insert((7, "/log".into())), "host-file", Blocker),
        (|_, p| _ = p.inotify_on_overlay.insert(7), "inotify-overlay", Warning),
        (|_, p| _ = p.locks.insert(7), "file-locks", Warning),
        (|_, p| _ = p.semaphores.insert((7, "3".into())), "eventfd-semaphore", Warning),
        (|_, p| _ = p.unread_timers.insert((7, "3".into())), "timerfd-unread", Warning),
        (|_, p| p.unread = vec![Unread { pid: 7, fd: 3, bytes: 5 }], "udp-unread", Warning),
        (|_, p| p.sockets = vec![socket(libc::AF_VSOCK, 0)], "socket-family", Blocker),
        (|_, p| p.sockets = vec![socket(libc::AF_INET6, 262)], "mptcp", Blocker),
        (|_, p| p.sockets = vec![socket(libc::AF_INET, 132)], "socket-protocol", Blocker),
        (|_, p| p.sockets = vec![socket(libc::AF_INET, 1)], "raw-socket", Warning),
        (
            |_, p| p.outside = vec![Outside { pid: 7, fd: 3, name: "/dev/log".into() }],
            "external-unix",
            Blocker,
        ),
        (|_, p| p.criu_tables = vec!["CRIU-1".into()], "criu-rules", Blocker),
        (|_, p| p.traced = BTreeMap::from([(7, 8)]), "traced", Blocker),
        (|_, p| _ = p.profiles.insert("docker-default (enforce)".into()), "lsm-profile", Note),
        (|c, _| c.memory.usage.carried.hugetlb = 2 << 20, "hugetlb", Note),
    ];
    for (spoil, name, severity) in cases {
        assert_eq!(of_container(spoil), [(name, severity)], "{name}");
    }
}

#[test]
fn what_criu_can_dump_is_not_named() {
    let usual = |_: &mut ContainerFacts, p: &mut Processes| {
        p.anonymous = ["eventfd", "eventpoll", "inotify", "pidfd", "bpf-map"]
            .map(|name| (7, name.to_owned()))
            .into();
        p.seccomp = BTreeSet::from([7]);
        p.sockets = vec![
            socket(libc::AF_UNIX, 0),
            socket(libc::AF_INET, 6),
            socket(libc::AF_INET6, 17),
            socket(libc::AF_NETLINK, 0),
        ];
    };
    assert_eq!(of_container(usual), []);
}

#[test]
fn filters_stand_in_the_way_only_where_they_cannot_be_suspended() {
    let processes = Processes { seccomp: BTreeSet::from([7]), ..Processes::default() };
    let found = |host: &Host| {
        let mut found = Findings::default();
        container_checks::all(&samples::container(), &processes, host, &mut found);
        found.0.iter().map(|finding| finding.name).collect::<Vec<_>>()
    };
    assert_eq!(found(&host()), Vec::<&str>::new());
    assert_eq!(found(&Host { seccomp: true, ..host() }), ["seccomp-suspend"]);
}

#[test]
fn the_worst_comes_first_and_each_has_its_cure() {
    let mut findings = Findings::default();
    findings.block("one", "a\x1b[2J", "b");
    findings.note("two", "c", "d");
    let report = Report {
        host: "a".into(),
        container: Some("x".into()),
        worst: Some(Blocker),
        findings: findings.0,
    };
    let wanted = "host a, container x\nblockers:\n  one: a\\u{1b}[2J\n      cure: b\n\
                  good to know:\n  two: c\n      cure: d\n";
    assert_eq!(text(&report), wanted);
    let nothing = Report { host: "a".into(), container: None, worst: None, findings: Vec::new() };
    assert_eq!(text(&nothing), "host a\nnothing stands in the way\n");
}
