use super::super::spec::{MASKED, PROTECTED};
use super::*;
use ferry_oci::criu::images::{Asked, Namespaces};
use serde_json::json;

const RELATIME: u32 = 1 << 21;
const RO: u32 = 1;

fn spec() -> Value {
    json!({
        "root": {"path": "rootfs"},
        "process": {},
        "mounts": [
            {"destination": "/proc", "type": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/", "type": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "options": ["nosuid", "noexec"]},
            {"destination": "/sys", "type": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts",
             "options": ["rbind", "rw", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": MASKED,
            "readonlyPaths": PROTECTED,
        },
    })
}

fn mount(ids: [u32; 3], kind: &str, root: &str, target: &str, flags: u32) -> Asked {
    let [id, parent, device] = ids;
    let source = if kind == "overlay" { "overlay" } else { kind };
    Asked {
        id,
        parent,
        device,
        kind: kind.into(),
        root: root.into(),
        target: target.into(),
        source: source.into(),
        flags: flags | RELATIME,
        ..Asked::default()
    }
}

/// As CRIU 4.2 dumps a container of `ctr run` on cgroup v1.
fn asks() -> Asks {
    let keyed = |key: &str, mount: Asked| Asked { key: Some(key.into()), ..mount };
    let mut mounts = vec![
        mount([1, 99, 70], "overlay", "/", "/", 0),
        mount([2, 1, 71], "proc", "/", "/proc", 14),
        mount([3, 1, 72], "tmpfs", "/", "/dev", 2),
        mount([4, 3, 73], "devpts", "/", "/dev/pts", 10),
        mount([5, 1, 74], "sysfs", "/", "/sys", 15),
        mount([6, 5, 75], "tmpfs", "/", "/sys/fs/cgroup", 14),
        keyed(
            "/sys/fs/cgroup/cpu",
            mount([7, 6, 20], "cgroup", "/default/x", "/sys/fs/cgroup/cpu", RO),
        ),
        keyed("/etc/hosts", mount([8, 1, 21], "ext4 by name", "/etc/hosts", "/etc/hosts", RO)),
        mount([9, 5, 76], "tmpfs", "/", "/sys/firmware", RO),
    ];
    for (id, path) in (10..).zip(["/proc/kcore", "/proc/keys", "/proc/timer_list"]) {
        mounts.push(keyed("/dev/null", mount([id, 2, 72], "tmpfs", "/null", path, 2)));
    }
    for (id, path) in (20..).zip(PROTECTED) {
        mounts.push(mount([id, 2, 71], "proc", &path["/proc".len()..], path, 15));
    }
    let private = vec!["pid", "network", "ipc", "uts", "mount"];
    Asks { mounts, namespaces: Namespaces { private, ..Default::default() }, groups: None }
}

/// That `change` is refused with `part` in the words, and allowed by `kind` alone.
fn refused(kind: Allowed, part: &str, change: impl FnOnce(&mut Asks)) {
    let mut asks = asks();
    change(&mut asks);
    let error = check(&spec(), &asks, None, &[]).expect_err(part).to_string();
    assert!(error.contains(part) && error.contains("--allow"), "{part}: {error}");
    check(&spec(), &asks, None, &[kind]).unwrap();
    let other = if kind == Allowed::Mounts { Allowed::Namespaces } else { Allowed::Mounts };
    check(&spec(), &asks, None, &[other]).unwrap_err();
}

fn at<'a>(asks: &'a mut Asks, target: &str) -> &'a mut Asked {
    asks.mounts.iter_mut().find(|mount| mount.target == target).unwrap()
}

#[test]
fn a_container_as_it_was_dumped_asks_for_nothing_more() {
    check(&spec(), &asks(), None, &[]).unwrap();
    // On version 2 there is one hierarchy.
    let mut second = asks();
    second.mounts.retain(|mount| mount.target != "/sys/fs/cgroup/cpu");
    *at(&mut second, "/sys/fs/cgroup") = mount([6, 5, 75], "cgroup2", "/", "/sys/fs/cgroup", RO);
    check(&spec(), &second, None, &[]).unwrap();
    // What the container does without is nobody's loss.
    let mut bare = asks();
    bare.mounts.retain(|mount| mount.target != "/etc/hosts");
    check(&spec(), &bare, None, &[]).unwrap();
}

#[test]
fn a_mount_that_the_container_has_not_is_refused() {
    let refused = |part: &str, change: &dyn Fn(&mut Asks)| {
        refused(Allowed::Mounts, part, change);
    };
    let more = |mount: Asked| move |asks: &mut Asks| asks.mounts.push(mount.clone());
    let outside = |root: &str| mount([50, 1, 21], "tmpfs", root, "/x", 0);
    refused("at /x", &more(mount([50, 1, 90], "ext4 by name", "/", "/x", 0)));
    refused("at /x", &more(mount([50, 1, 90], "proc", "/", "/x", 14)));
    refused("at /x", &more(outside("/etc/hosts")));
    refused("at /x", &more(Asked { key: Some("/etc/hosts".into()), ..outside("/") }));
    refused("at /x", &more(Asked { key: Some("/x".into()), ..outside("/") }));
    refused("at /x", &more(Asked { key: Some("/dev/null".into()), ..outside("/") }));
    refused("at /proc", &more(mount([50, 2, 91], "proc", "/", "/proc", 14)));
    let binds =
        |root: &'static str| move |asks: &mut Asks| at(asks, "/proc/sys").root = root.into();
    refused("at /proc/sys", &binds("/self/root"));
    refused("at /proc/sys", &binds("/../.."));
    // From the root's files a link may lead anywhere.
    refused("or the root's", &|asks| at(asks, "/dev").device = 70);
}

#[test]
fn a_mount_that_can_do_more_is_refused() {
    let refused = |part: &str, change: &dyn Fn(&mut Asks)| {
        refused(Allowed::Mounts, part, change);
    };
    for target in ["/etc/hosts", "/sys", "/proc/sys", "/sys/fs/cgroup/cpu", "/sys/firmware"] {
        refused(&format!("at {target}"), &|asks| at(asks, target).flags = 14);
    }
    // The file system's own flags say nothing of a bind.
    refused("at /etc/hosts", &|asks| {
        let hosts = at(asks, "/etc/hosts");
        (hosts.flags, hosts.file_system_flags) = (0, RO);
    });
    refused("at /proc", &|asks| at(asks, "/proc").flags = 0);
    let flag = |flag| move |asks: &mut Asks| at(asks, "/proc").flags |= flag;
    refused("no mount's own", &flag(libc::MS_BIND as u32));
    refused("no mount's own", &flag(libc::MS_MOVE as u32));
    refused("no mount's own", &flag(libc::MS_REC as u32));
    refused("no mount's own", &|asks| at(asks, "/dev").file_system_flags = libc::MS_BIND as u32);
    refused("deleted", &|asks| at(asks, "/dev").odd = true);
    refused("from outside", &|asks| at(asks, "/").key = Some("/etc/hosts".into()));
    // Behind the mount that it should cover.
    refused("/proc/keys", &|asks| at(asks, "/proc/keys").parent = 1);
    // There on every host.
    refused("an open /proc/sys", &|asks| asks.mounts.retain(|m| m.target != "/proc/sys"));
}

#[test]
fn a_namespace_or_group_of_the_host_is_refused() {
    let refused = |part: &str, change: &dyn Fn(&mut Asks)| {
        refused(Allowed::Namespaces, part, change);
    };
    for kind in ["pid", "network", "mount"] {
        let part = format!("the host's {kind} namespace");
        refused(&part, &|asks| asks.namespaces.private.retain(|private| *private != kind));
    }
    refused("a user namespace", &|asks| asks.namespaces.private.push("user"));
    refused("process 7", &|asks| asks.namespaces.others.push("process 7".into()));
    refused("the control group", &|asks| asks.groups = Some("the control group".into()));
    let full = DumpOptions { manage_cgroups: Some("full".into()), ..DumpOptions::default() };
    let error = check(&spec(), &asks(), Some(&full), &[]).unwrap_err().to_string();
    assert!(error.contains("mode full"), "{error}");
}

#[test]
fn a_network_given_by_path_is_the_host_s_to_criu_only_when_it_runs_in_there() {
    let mut spec = spec();
    spec["linux"]["namespaces"][2] = json!({"type": "network", "path": "/run/netns/x"});
    let mut asks = asks();
    asks.namespaces.private.retain(|private| *private != "network");
    let inside = DumpOptions { in_netns: true, ..DumpOptions::default() };
    check(&spec, &asks, Some(&inside), &[]).unwrap();
    check(&spec, &asks, None, &[]).unwrap_err();
    check(&self::spec(), &asks, Some(&inside), &[]).unwrap_err();
}
