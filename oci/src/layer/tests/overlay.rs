//! The overlays, and what can be seen of a tree through them.
#![allow(unsafe_code)] // A shared mapping, which only exists by mmap.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Uid;
use tempfile::TempDir;

use crate::layer::sys;

/// The mounted root file systems of two hosts. The mounts end with the test's thread.
pub(super) struct Hosts {
    pub(super) source: PathBuf,
    pub(super) source_upper: PathBuf,
    pub(super) destination: PathBuf,
    _dir: TempDir,
}

impl Hosts {
    /// `None`, with a message that counts as a skip, without the right to mount.
    pub(super) fn new() -> Option<Self> {
        Self::with_options("")
    }

    pub(super) fn with_options(options: &str) -> Option<Self> {
        if !Uid::effective().is_root() || unshare(CloneFlags::CLONE_NEWNS).is_err() {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("a test");
            // Not eprintln: the test runner would keep that to itself.
            let _ = writeln!(std::io::stderr(), "\nskipped: {name}: only root can mount overlays");
            return None;
        }
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let lower = at("lower");
        image(&lower);
        let mut roots = Vec::new();
        for host in ["source", "destination"] {
            let (upper, work) = (at(&format!("{host}.upper")), at(&format!("{host}.work")));
            let merged = at(host);
            let data = format!(
                "lowerdir={},upperdir={},workdir={},index=off{options}",
                lower.display(),
                upper.display(),
                work.display()
            );
            mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(data.as_str()))
                .unwrap();
            roots.push((merged, upper));
        }
        let (destination, _) = roots.pop()?;
        let (source, source_upper) = roots.pop()?;
        Some(Self { source, source_upper, destination, _dir: dir })
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for root in [&self.source, &self.destination] {
            let _ = nix::mount::umount2(root, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// Makes an image: three directories deep, with files, links and a file with an attribute.
fn image(lower: &Path) {
    for d in 0..3 {
        let dir = lower.join(format!("d{d}"));
        fs::create_dir_all(dir.join("sub/deep")).unwrap();
        for f in 0..3 {
            fs::write(dir.join(format!("f{f}")), format!("image {d} {f}")).unwrap();
            fs::write(dir.join(format!("sub/f{f}")), vec![f; 5000]).unwrap();
            fs::write(dir.join(format!("sub/deep/f{f}")), "deep").unwrap();
        }
        symlink("f0", dir.join("link")).unwrap();
    }
    let file = File::open(lower.join("d1/f1")).unwrap();
    sys::set_xattr(std::os::fd::AsFd::as_fd(&file), b"user.image", b"1").unwrap();
}

/// What can be seen of one path.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Node {
    kind: String,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    device: u64,
    contents: Vec<u8>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// All names of the file, when it has several in the upper layer.
    names: Vec<PathBuf>,
}

/// Everything below `root`, and `root` itself, as a process in the container sees it. Sockets are left out.
pub(super) fn tree(root: &Path) -> BTreeMap<PathBuf, Node> {
    let mut tree = BTreeMap::new();
    let mut names: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        if kind.is_socket() {
            continue;
        }
        let mut contents = Vec::new();
        if kind.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if kind.is_symlink() {
            contents = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
        } else if kind.is_file() {
            contents = fs::read(&path).unwrap();
        }
        let relative = path.strip_prefix(root).unwrap().to_owned();
        if !kind.is_dir() && stat.nlink() > 1 {
            names.entry(stat.ino()).or_default().push(relative.clone());
        }
        let node = Node {
            kind: format!("{kind:?}"),
            mode: stat.mode(),
            owner: (stat.uid(), stat.gid()),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            device: stat.rdev(),
            contents,
            xattrs: xattrs(&path),
            names: Vec::new(),
        };
        tree.insert(relative, node);
    }
    for group in names.into_values() {
        let mut group = group;
        group.sort();
        for name in &group {
            tree.get_mut(name).unwrap().names.clone_from(&group);
        }
    }
    tree
}

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    use nix::fcntl::{OFlag, open};
    use std::os::fd::AsFd;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let fd = open(path, flags, nix::sys::stat::Mode::empty()).unwrap();
    let mut names = sys::list_xattrs(fd.as_fd()).unwrap();
    names.sort();
    let value = |name: &Vec<u8>| sys::get_xattr(fd.as_fd(), name).unwrap().unwrap();
    names.iter().map(|name| (name.clone(), value(name))).collect()
}

/// A shared, writable mapping of a file.
pub(super) struct Mapping {
    at: *mut u8,
    len: usize,
}

impl Mapping {
    pub(super) fn new(file: &File, len: usize) -> Self {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self { at: at.cast(), len }
    }

    pub(super) fn write(&mut self, offset: usize, value: u8) {
        assert!(offset < self.len);
        // SAFETY: within the mapping, which lives as long as `self`.
        unsafe { self.at.add(offset).write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}
