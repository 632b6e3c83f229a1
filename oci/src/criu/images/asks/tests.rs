//! Images made here, message by message.

use super::super::super::decode::{encode, image as framed};
use super::super::Folder;
use super::*;
use encode::{bytes, message, number};

/// Numbers of namespaces, from the process's on, in the order of the fields.
const HOST: [u64; 8] = [1, 2, 3, 4, 6, 7, 8, 5];
const OWN: [u64; 8] = [9, 10, 11, 12, 13, 7, 8, 5];

fn ids(numbers: [u64; 8]) -> Vec<u8> {
    let fields = (5..).zip(numbers).map(|(field, value)| number(field, value));
    message(&[vec![number(1, 2), number(2, 2)], fields.collect()].concat())
}

fn mount(id: u64, target: &str, more: &[Vec<u8>]) -> Vec<u8> {
    let own = [
        number(1, 5),
        number(2, id),
        number(3, 80),
        number(4, 1),
        number(5, 15),
        bytes(6, b"/"),
        bytes(7, target.as_bytes()),
        bytes(8, b"tmpfs"),
        bytes(9, b""),
    ];
    message(&[own.to_vec(), more.to_vec()].concat())
}

fn group(path: &str, folder: &str, more: &[Vec<u8>]) -> Vec<u8> {
    let member = message(&[bytes(1, b"pids"), bytes(2, path.as_bytes())]);
    let set = message(&[number(1, 2), bytes(2, &member)]);
    let folder = message(&[vec![bytes(1, folder.as_bytes())], more.to_vec()].concat());
    let controller = message(&[bytes(1, b"pids"), bytes(2, &folder)]);
    message(&[bytes(1, &set), bytes(2, &controller)])
}

/// Two processes in namespaces of their own.
fn images() -> Vec<(String, Vec<u8>)> {
    let inventory = message(&[number(1, 2), bytes(3, &ids(HOST))]);
    let process = |pid, parent| message(&[number(1, pid), number(2, parent)]);
    let mounts = [mount(1, "/", &[]), mount(2, "/etc/hosts", &[bytes(18, b"/etc/hosts")])];
    let file = message(&[number(1, 14), number(2, 1), bytes(5, &number(2, 10))]);
    [
        ("inventory.img", framed(0x5831_3116, &[inventory]).split_off(4)),
        ("pstree.img", framed(0x5027_3030, &[process(1, 0), process(7, 1)])),
        ("ids-1.img", framed(0x5443_2030, &[ids(OWN)])),
        ("ids-7.img", framed(0x5443_2030, &[ids(OWN)])),
        ("mountpoints-13.img", framed(0x5556_3928, &mounts)),
        ("files.img", framed(0x5630_3138, &[file])),
        ("cgroup.img", framed(0x5938_3330, &[group("/default/redis", "default/redis", &[])])),
    ]
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .to_vec()
}

/// What is asked when `name` is `bytes`.
fn with(name: &str, bytes: Vec<u8>) -> Result<Asks, ReadError> {
    let mut images = images();
    images.retain(|image| image.0 != name);
    images.push((name.to_owned(), bytes));
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in images {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    Asks::read(&mut Folder::open(dir.path()).unwrap())
}

#[test]
fn what_a_plain_container_asks_for_is_read() {
    let asks = with("stats-dump", Vec::new()).unwrap();
    assert_eq!(asks.namespaces.private, ["pid", "network", "ipc", "uts", "mount"]);
    assert!(asks.namespaces.others.is_empty() && asks.groups.is_none(), "{asks:?}");
    let [root, hosts] = asks.mounts.as_slice() else { panic!("{asks:?}") };
    assert_eq!((root.id, root.target.as_str(), &root.key), (1, "/", &None));
    assert_eq!((hosts.flags, hosts.kind.as_str()), (15, "tmpfs"));
    assert_eq!(hosts.key.as_deref(), Some("/etc/hosts"));
}

#[test]
fn namespaces_of_the_host_and_of_others_are_seen() {
    let one = |name: &str, ids: Vec<u8>| with(name, framed(0x5443_2030, &[ids])).unwrap();
    let mut init = OWN;
    init[1] = HOST[1];
    assert!(!one("ids-1.img", ids(init)).namespaces.is_private("network"));
    let other = one("ids-7.img", ids(init)).namespaces.others;
    assert_eq!(other, ["process 7 in a network namespace of its own"]);
    for name in ["mountpoints-14.img", "netdev-10.img", "nftables-10.img"] {
        let others = with(name, Vec::new()).unwrap().namespaces.others;
        assert!(others.iter().any(|other| other.contains(name)), "{others:?}");
    }
    let file = message(&[number(1, 14), number(2, 1), bytes(5, &number(2, 6))]);
    let others = with("files.img", framed(0x5630_3138, &[file])).unwrap().namespaces.others;
    assert!(others[0].contains("open namespace"), "{others:?}");
    // A namespace of which nothing is said is CRIU's.
    let asks = one("ids-1.img", number(9, 13));
    assert!(asks.namespaces.is_private("mount"));
    let inventory = framed(0x5831_3116, &[number(1, 2)]).split_off(4);
    assert!(with("inventory.img", inventory).is_err());
}

#[test]
fn mounts_with_more_than_is_known_are_no_mounts() {
    let one = |mount| with("mountpoints-13.img", framed(0x5556_3928, &[mount]));
    let read = |more: &[Vec<u8>]| one(mount(1, "/", more)).map(|asks| asks.mounts[0].clone());
    assert_eq!(read(&[number(13, 1)]).unwrap().key.as_deref(), Some("/"));
    assert_eq!(read(&[number(1, 16), bytes(14, b"ext4")]).unwrap().kind, "ext4 by name");
    assert!(read(&[number(12, 1)]).unwrap().odd && read(&[number(16, 1)]).unwrap().odd);
    // The last of several counts, 32 bits of it.
    assert_eq!(read(&[number(5, 1 << 32 | 4096)]).unwrap().flags, 4096);
    assert!(read(&[number(19, 1)]).is_err());
    assert!(one(mount(1, "/etc\0/x", &[])).is_err());
}

#[test]
fn groups_that_are_not_the_container_s_are_seen() {
    let groups = |path, folder, more: &[Vec<u8>]| {
        let image = framed(0x5938_3330, &[group(path, folder, more)]);
        with("cgroup.img", image).unwrap().groups
    };
    let own = "default/redis";
    assert_eq!(groups("/default/redis", own, &[]), None);
    for (path, folder, more) in [
        ("/", own, vec![]),
        ("/default/other", own, vec![]),
        ("/default/redis/../../x", "default/redis/../../x", vec![]),
        ("/", "", vec![]),
        ("/default/redis", own, vec![bytes(2, &bytes(1, b"below"))]),
    ] {
        assert!(groups(path, folder, &more).is_some(), "{path} {folder}");
    }
}
