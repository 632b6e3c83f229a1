//! A small checkpoint, made here message by message, and what becomes of it when it is spoiled.

use super::super::decode::{encode, image};
use super::*;
use encode::{bytes, message, number};
use std::path::Path;

type Images = Vec<(&'static str, Vec<u8>)>;

/// Two processes: a shell with a pipe, files and sockets, and its child that has ended.
fn checkpoint() -> Images {
    let inventory = message(&[number(1, 2), number(6, 2), number(11, 2), bytes(13, b"run-1")]);
    let shell =
        [number(1, 1), number(2, 0), number(3, 1), number(4, 1), number(5, 1), number(5, 9)];
    let child = message(&[number(1, 7), number(2, 1), number(3, 1), number(4, 1)]);
    let creds = message(&[number(1, 1000), number(2, 100), bytes(15, b"unconfined")]);
    let core = |state, name: &[u8]| {
        let task = message(&[number(1, state), number(2, 0), bytes(6, name)]);
        let thread = message(&[number(1, 0), bytes(10, &creds), number(11, 2)]);
        message(&[number(1, 1), bytes(3, &task), bytes(5, &thread)])
    };
    let vma = |start, end| message(&[number(1, start), number(2, end), number(6, 0x22)]);
    let mm = message(&[
        number(8, 0x7ff8),
        number(9, 0x8009),
        number(12, 3),
        bytes(14, &vma(0x1000, 0x4000)),
        bytes(14, &vma(0x6000, 0x9000)),
    ]);
    let pages = [
        message(&[number(1, 5)]),
        message(&[number(1, 0x1000), number(2, 1), number(4, 4)]),
        message(&[number(1, 0x2000), number(2, 2), number(4, 1)]),
        message(&[number(1, 0x7000), number(2, 2), number(4, 4)]),
    ];
    let mut content = vec![0; 3 * 4096];
    content[4096 + 0xff8..][..17].copy_from_slice(b"sh\0-c\0sleep 1000\0");
    let regular = message(&[number(2, 0o2), number(3, 42), bytes(6, b"/bin/sh")]);
    let pipe = message(&[number(2, 77), number(3, 1)]);
    let four = u64::from(u32::from_le_bytes([10, 0, 0, 1]));
    let inet = message(&[
        number(3, 2),
        number(4, 1),
        number(5, 6),
        number(6, 1),
        number(7, 6379),
        number(8, 5),
        number(11, four),
        number(12, four + (1 << 24)),
    ]);
    let listener = message(&[number(5, 6), number(6, 10), number(7, 80), bytes(11, &[0])]);
    let unix = message(&[number(2, 8), number(3, 1), number(4, 10), bytes(11, b"\0name")]);
    let file = |kind, id, field, content: &[u8]| {
        message(&[number(1, kind), number(2, id), bytes(field, content)])
    };
    let files = [
        file(1, 3, 3, &regular),
        file(2, 4, 18, &pipe),
        file(4, 5, 4, &inet),
        file(4, 6, 4, &listener),
        file(5, 7, 16, &unix),
        file(7, 8, 9, &[]),
    ];
    let fds: Vec<_> =
        (3..10).map(|id| message(&[number(1, id), number(3, 1), number(4, 12 - id)])).collect();
    let mounts = [
        message(&[number(1, 1), bytes(6, b"/"), bytes(7, b"/proc"), bytes(8, b"proc")]),
        message(&[
            number(1, 0),
            bytes(6, b"/srv"),
            bytes(7, b"/data"),
            number(13, 1),
            bytes(14, b"ext4"),
        ]),
    ];
    let dump = message(&[number(1, 10), number(2, 5000), number(7, 3)]);
    vec![
        ("inventory.img", image(0x5831_3116, &[inventory]).split_off(4)),
        ("pstree.img", image(0x5027_3030, &[message(&shell), child])),
        ("core-1.img", image(0x5505_3847, &[core(1, b"sh")])),
        ("core-7.img", image(0x5505_3847, &[core(2, b"sleep")])),
        ("ids-1.img", image(0x5443_2030, &[message(&[number(1, 1), number(2, 2)])])),
        ("ids-7.img", image(0x5443_2030, &[message(&[number(1, 1), number(2, 3)])])),
        ("mm-1.img", image(0x5749_2820, &[mm])),
        ("pagemap-1.img", image(0x5608_4025, &pages)),
        ("pages-5.img", content),
        ("files.img", image(0x5630_3138, &files)),
        ("fdinfo-2.img", image(0x5621_3732, &fds)),
        ("mountpoints-9.img", image(0x5556_3928, &mounts)),
        ("utsns-9.img", image(0x5447_3203, &[message(&[bytes(1, b"box")])])),
        ("stats-dump", image(0x5709_3306, &[message(&[bytes(1, &dump)])])),
    ]
}

fn write(images: &Images) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in images {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// Images in memory.
struct Held(std::collections::BTreeMap<&'static str, Vec<u8>>);

impl Source for Held {
    fn names(&self) -> Vec<String> {
        self.0.keys().map(|name| (*name).to_owned()).collect()
    }

    fn size(&self, name: &str) -> Option<u64> {
        self.0.get(name).map(|bytes| bytes.len() as u64)
    }

    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.get(name).cloned())
    }

    fn pages(&mut self, spans: &[Span]) -> io::Result<Vec<Vec<u8>>> {
        let part = |span: &Span| {
            let bytes = self.0.get(span.name.as_str())?;
            Some(bytes.get(span.offset as usize..)?.get(..span.length)?.to_vec())
        };
        Ok(spans.iter().map(|span| part(span).unwrap_or_default()).collect())
    }
}

fn read(dir: &Path) -> Result<Contents, ReadError> {
    Contents::read(&mut Folder::open(dir).unwrap())
}

#[test]
fn everything_in_a_checkpoint_is_read() {
    let dir = write(&checkpoint());
    let contents = read(dir.path()).unwrap();
    let inventory = &contents.inventory;
    assert_eq!((inventory.version, inventory.lsm), (2, Some("apparmor")));
    assert_eq!((inventory.network_lock, inventory.run_id.as_str()), ("skip", "run-1"));
    assert_eq!(contents.hostname, "box");
    assert_eq!(contents.pages_bytes, 3 * 4096);
    assert!(!contents.has_parent);
    let statistics = contents.statistics.unwrap();
    assert_eq!((statistics.frozen_us, statistics.pages_written), (5000, 3));

    let [shell, child] = contents.processes.as_slice() else { panic!("{contents:?}") };
    assert_eq!((shell.pid, shell.threads, shell.state), (1, 2, "running"));
    assert_eq!((shell.uid, shell.gid, shell.seccomp), (1000, 100, Some("filter")));
    assert_eq!((shell.name.as_str(), shell.exe.as_str()), ("sh", "/bin/sh"));
    assert_eq!(shell.command, ["sh", "-c", "sleep 1000"]);
    let memory = Memory { mapped: 0x6000, present: 3 * 4096, in_parent: 2 * 4096, lazy: 0 };
    assert_eq!(shell.memory, memory);
    assert_eq!((child.pid, child.ppid, child.state), (7, 1, "zombie"));
    assert!(child.command.is_empty() && child.files.is_empty());

    let file = |fd| &shell.files.iter().find(|file| file.fd == fd).unwrap().file;
    assert_eq!(file(9), &File::File { path: "/bin/sh".into(), position: 42, access: "rw" });
    assert_eq!(file(8), &File::Pipe { pipe: 77, access: "w" });
    let tcp = |local: &str, remote: &str, state| File::Inet {
        protocol: "tcp".into(),
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        state,
    };
    assert_eq!(file(7), &tcp("10.0.0.1:6379", "10.0.0.2:5", "connected"));
    assert_eq!(file(6), &tcp("0.0.0.0:80", "0.0.0.0:0", "listening"));
    let unix = File::Unix { path: "@name".into(), state: "listening", inode: 8, peer: 0 };
    assert_eq!(file(5), &unix);
    assert_eq!(file(4), &File::Other { what: "epoll" });
    assert_eq!(file(3), &File::Unknown);
    assert_eq!((contents.mounts[0].kind.as_str(), contents.mounts[0].external), ("proc", false));
    assert_eq!((contents.mounts[1].kind.as_str(), contents.mounts[1].external), ("ext4", true));
}

#[test]
fn what_is_missing_is_named() {
    let lacking = |name: &str| {
        let mut images = checkpoint();
        images.retain(|image| image.0 != name);
        read(write(&images).path())
    };
    assert!(matches!(lacking("inventory.img"), Err(ReadError::NoImages)));
    for name in ["pstree.img", "core-7.img"] {
        let error = lacking(name).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("not complete"), "{error}");
    }
    // Without pages there is no command line, and the rest is there.
    assert!(lacking("pages-5.img").unwrap().processes[0].command.is_empty());
    assert_eq!(lacking("stats-dump").unwrap().statistics, None);
}

#[test]
fn links_and_files_that_are_too_long_are_not_read() {
    let dir = write(&checkpoint());
    let core = dir.path().join("core-1.img");
    std::fs::rename(&core, dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", &core).unwrap();
    let error = read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("core-1.img is missing"), "{error}");
    std::fs::remove_file(&core).unwrap();
    std::fs::File::create(&core).unwrap().set_len(1 << 40).unwrap();
    let error = read(dir.path()).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("no such image has more"), "{error}: {source}");
}

#[test]
fn one_file_that_is_open_very_often_is_refused() {
    let mut images = checkpoint();
    let path = "x".repeat(4000);
    let regular = message(&[bytes(6, path.as_bytes())]);
    let file = message(&[number(1, 1), number(2, 3), bytes(3, &regular)]);
    let fds: Vec<_> = (0..60_000).map(|fd| message(&[number(1, 3), number(4, fd)])).collect();
    for (name, bytes) in &mut images {
        match *name {
            "files.img" => *bytes = image(0x5630_3138, std::slice::from_ref(&file)),
            "fdinfo-2.img" => *bytes = image(0x5621_3732, &fds),
            _ => {}
        }
    }
    let error = read(write(&images).path()).unwrap_err();
    assert!(matches!(error, ReadError::Image(..)), "{error}");
}

#[test]
fn a_spoiled_checkpoint_is_an_error_or_another_one_but_no_panic() {
    let images = checkpoint();
    let mut held = Held(images.iter().cloned().collect());
    let (mut errors, mut runs, mut random) = (0, 0, 1_u64);
    for (name, whole) in images.iter().filter(|image| image.0 != "pages-5.img") {
        let cut = (0..whole.len()).map(|length| whole[..length].to_vec());
        let flipped = (0..whole.len() * 8).map(|bit| {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        });
        let scrambled = (0..500).map(|_| {
            let mut bytes = whole.clone();
            for _ in 0..3 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (random >> 33) as usize % bytes.len();
                bytes[at] = (random >> 24) as u8;
            }
            bytes
        });
        for bytes in cut.chain(flipped).chain(scrambled) {
            held.0.insert(name, bytes);
            errors += usize::from(Contents::read(&mut held).is_err());
            runs += 1;
        }
        held.0.insert(name, whole.clone());
    }
    println!("{runs} spoiled checkpoints, {errors} refused");
    assert!(errors > runs / 10 && Contents::read(&mut held).is_ok());
}
