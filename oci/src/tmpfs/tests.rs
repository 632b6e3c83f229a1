use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::find::among;
use super::tree::digest;
use super::*;

const MOUNTS: &str = "\
20 1 0:30 / / rw - overlay overlay rw
21 20 0:40 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755,inode64
22 21 0:41 / /dev/shm rw,nosuid - tmpfs shm rw,size=65536k
23 21 0:42 / /dev/pts rw - devpts devpts rw
24 20 0:43 / /once ro - tmpfs tmpfs ro,size=4k,nr_inodes=1
25 20 0:43 / /again rw - tmpfs tmpfs ro,size=4k,nr_inodes=1
34 20 0:40 /null /proc/keys rw - tmpfs tmpfs rw,size=65536k,mode=755,inode64
35 20 0:52 / /bound rw - tmpfs tmpfs rw
26 20 0:44 /hosts /etc/hosts rw - tmpfs tmpfs rw
27 20 0:45 / /shared rw shared:3 - tmpfs tmpfs rw
28 20 0:46 / /from rw master:3 - tmpfs tmpfs rw
29 20 0:47 / /odd rw - tmpfs tmpfs rw,mpol=bind:0
31 20 0:49 / /with\\040space rw - tmpfs tmpfs rw
32 20 0:50 / /over rw - tmpfs tmpfs rw
33 32 0:51 / /over rw - tmpfs tmpfs rw";

#[test]
fn only_those_that_are_nothing_special_are_carried() {
    let host = "9 1 0:52 /x /run rw shared:9 - tmpfs tmpfs rw";
    let found = among(MOUNTS, host);
    let seen: Vec<_> = found.iter().map(|c| (&*c.at, &*c.source, &*c.options)).collect();
    assert_eq!(
        seen,
        [
            ("/dev", "tmpfs", "rw,size=65536k,mode=755,inode64"),
            ("/dev/shm", "shm", "rw,size=65536k"),
            ("/once", "tmpfs", "ro,size=4k,nr_inodes=1")
        ]
    );
}

/// A process with two file systems in memory, one within the other.
struct Container {
    child: Child,
    _root: tempfile::TempDir,
    at: String,
}

impl Container {
    fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().display().to_string();
        let script = "mount -t tmpfs -o size=1m,mode=751 outer $0 && cd $0 && mkdir inner under &&
            echo hidden >inner/hidden && mount -t tmpfs -o size=1m inner inner && echo in >inner/in &&
            mknod null c 1 3 && ln -s nowhere link && echo a >under/a && echo b >b && chmod 4711 b &&
            chown 12:34 under && mkfifo pipe && echo; read _";
        let mut child = Command::new("unshare")
            .args(["--mount", "sh", "-c", script, &at])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        Self { child, _root: root, at }
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn inside(&self, path: &str) -> std::path::PathBuf {
        format!("/proc/{}/root{}/{path}", self.pid(), self.at).into()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// What `find` says of a folder, without numbers of inodes.
fn listing(root: &Path) -> String {
    let format = "%P %y %m %U:%G %n %l %Ts\\n";
    let root = format!("{}/", root.display());
    let list = Command::new("find").args([&root, "-xdev", "-printf", format]).output().unwrap();
    let mut lines: Vec<_> = std::str::from_utf8(&list.stdout).unwrap().lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

#[test]
fn they_arrive_as_they_were_with_what_changed_in_the_last_moment() {
    let container = Container::start();
    let images = tempfile::tempdir().unwrap();
    let pid = container.pid();
    let mut leaving = Leaving::prepare(pid, &[pid], images.path()).unwrap();
    let number = leaving.carried().iter().position(|c| c.at == container.at).unwrap();
    let only = |leaving: &Leaving| leaving.carried()[number..].to_vec();
    for n in 0..2 {
        fs::rename(
            images.path().join(early_archive(number + n)),
            images.path().join(early_archive(n)),
        )
        .unwrap();
    }
    let migration = format!("mtest-tmpfs-{}", std::process::id());
    let mut arriving = Arriving::prepare(&migration, &only(&leaving), images.path()).unwrap();
    let place = crate::paths::tmpfs(&migration);
    let check = |text: &str| {
        // What is below the inner one came along, although it cannot be seen.
        assert_eq!(fs::read_to_string(place.join("0/inner/hidden")).unwrap(), "hidden\n");
        assert_eq!(fs::read_to_string(place.join("1/in")).unwrap(), text);
        fs::remove_file(place.join("0/inner/hidden")).unwrap();
        let there = listing(&container.inside(""));
        let missing: Vec<_> = there.lines().filter(|l| !l.starts_with("inner ")).collect();
        let here = listing(&place.join("0"));
        let here: Vec<_> = here.lines().filter(|l| !l.starts_with("inner ")).collect();
        assert_eq!(here, missing);
    };
    check("in\n");
    assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o700);
    let lines = arriving.lines();
    let (at, place_1) = (&container.at, place.join("1"));
    assert_eq!(lines[1], format!("external mnt[ferry{at}/inner]:{}", place_1.display()));

    assert_eq!(leaving.pack_changed().unwrap(), 0);
    arriving.complete(&only(&leaving), images.path()).unwrap();
    fs::write(container.inside("inner/in"), "new").unwrap();
    fs::write(container.inside("more"), "more").unwrap();
    assert_eq!(leaving.pack_changed().unwrap(), 2);
    for n in 0..2 {
        let late = images.path().join(late_archive(number + n));
        fs::rename(late, images.path().join(late_archive(n))).unwrap();
    }
    arriving.complete(&only(&leaving), images.path()).unwrap();
    check("new");

    fs::remove_file(images.path().join(late_archive(1))).unwrap();
    let mut wrong = only(&leaving);
    wrong[1].checksum = "0".into();
    let error = arriving.complete(&wrong, images.path()).unwrap_err().to_string();
    assert!(error.contains("inner is missing"), "{error}");
    assert!(arriving.complete(&wrong[..1], images.path()).is_ok());
    wrong[0].options = "rw".into();
    let error = arriving.complete(&wrong[..1], images.path()).unwrap_err().to_string();
    assert!(error.contains("was not prepared"), "{error}");
    drop(arriving);
    assert!(!place.exists());
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&migration));
}

#[test]
fn who_has_other_mounts_keeps_them() {
    let (one, other) = (Container::start(), Container::start());
    let found = find(one.pid(), &[one.pid()]).unwrap();
    assert!(found.iter().any(|carried| carried.at == one.at));
    assert_eq!(find(one.pid(), &[one.pid(), other.pid()]).unwrap(), []);
}

#[test]
fn odd_options_are_refused_and_leave_nothing() {
    let images = tempfile::tempdir().unwrap();
    let migration = format!("mtest-odd-{}", std::process::id());
    let carried = |options: &str| Tmpfs {
        at: "/x".into(),
        source: "tmpfs".into(),
        options: options.into(),
        checksum: String::new(),
    };
    let both = [carried("size=1m"), carried("size=1m,mpol=bind:0")];
    let error = Arriving::prepare(&migration, &both, images.path()).unwrap_err();
    assert!(error.to_string().contains("mpol"), "{error}");
    assert!(!crate::paths::tmpfs(&migration).exists());
}

#[test]
fn every_change_that_an_archive_would_have_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    for folder in ["a", "b"] {
        fs::create_dir(at(folder)).unwrap();
    }
    fs::write(at("a/file"), "text").unwrap();
    symlink("to", at("link")).unwrap();
    let mut seen = vec![digest(dir.path()).unwrap().unwrap()];
    assert_eq!(digest(dir.path()).unwrap().unwrap(), seen[0]);
    let time = fs::metadata(at("a/file")).unwrap().modified().unwrap();
    let changes: [&dyn Fn(); 8] = [
        // As a program that has the file mapped.
        &|| {
            let file = File::options().write(true).open(at("a/file")).unwrap();
            file.write_all_at(b"TEXT", 0).unwrap();
            file.set_modified(time).unwrap();
        },
        &|| fs::set_permissions(at("a/file"), fs::Permissions::from_mode(0o600)).unwrap(),
        &|| std::os::unix::fs::chown(at("a"), Some(7), None).unwrap(),
        &|| fs::hard_link(at("a/file"), at("b/file")).unwrap(),
        &|| fs::rename(at("a/file"), at("file")).unwrap(),
        &|| fs::remove_file(at("link")).unwrap(),
        &|| symlink("ot", at("link")).unwrap(),
        &|| File::create(at("empty")).map(drop).unwrap(),
    ];
    for (n, change) in changes.iter().enumerate() {
        change();
        let now = digest(dir.path()).unwrap().unwrap();
        assert!(!seen.contains(&now), "change {n}");
        seen.push(now);
    }
}

#[test]
fn what_is_large_is_left_to_criu() {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("holes")).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(digest(dir.path()).unwrap(), None);
}
