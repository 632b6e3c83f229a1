//! Receiving changes: from a stream into the destination's merged root file system.

use std::ffi::OsStr;
use std::fs::File;
use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, makedev, mkdirat, mknodat,
    utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};

use super::codec::{Extent, MAX_DATA, Record, read_data, read_extent, read_header, read_record};
use super::manifest::{Meta, Time};
use super::root::{Root, remove_all};
use super::scan::is_local;
use super::sys;
use super::{Error, Result};

/// What was received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Number of steps.
    pub entries: u64,
    /// Bytes of file contents, without holes.
    pub bytes: u64,
}

/// Does what the stream `input` says to the tree at `root`: the mounted root file system of a container that
/// does not run. Reads from the header to the end record and not a byte further.
///
/// # Errors
/// [`Error::Stream`] when the stream ends early, [`Error::Version`], [`Error::Malformed`], [`Error::Io`]. What
/// was done before stays.
pub fn apply(mut input: impl BufRead, root: &Path) -> Result<Applied> {
    read_header(&mut input)?;
    let mut target =
        Target { root: Root::open(root)?, buffer: Vec::new(), done: Applied::default() };
    loop {
        match read_record(&mut input)? {
            Record::End { count } if count == target.done.entries => return Ok(target.done),
            Record::End { .. } => return Err(Error::Malformed("records are missing")),
            record => target.apply(record, &mut input)?,
        }
        target.done.entries += 1;
    }
}

struct Target {
    root: Root,
    buffer: Vec<u8>,
    done: Applied,
}

impl Target {
    fn apply(&mut self, record: Record, input: &mut impl BufRead) -> Result<()> {
        match record {
            Record::Remove { path } => {
                self.root.forget();
                self.remove(&path).map_err(|e| Error::io("remove", &path, e))
            }
            Record::Dir { path, meta, clear } => {
                self.root.forget();
                let fd = self.dir(&path, clear).map_err(|e| Error::io("make", &path, e))?;
                set_meta(fd.as_fd(), OsStr::new("."), fd.as_fd(), &meta, &path, false)
            }
            Record::File { path, meta, size } => self.file(&path, &meta, size, input),
            Record::Symlink { path, meta, target } => {
                self.node(&path, &meta, |dir, name| symlinkat(target.as_path(), dir, name))
            }
            Record::Fifo { path, meta } => self.node(&path, &meta, |dir, name| {
                mknodat(dir, name, SFlag::S_IFIFO, Mode::S_IRUSR, 0)
            }),
            Record::Device { path, meta, block, major, minor } => {
                let kind = if block { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
                let device = makedev(major.into(), minor.into());
                self.node(&path, &meta, |dir, name| mknodat(dir, name, kind, Mode::S_IRUSR, device))
            }
            Record::Link { path, to } => {
                self.link(&path, &to).map_err(|e| Error::io("link", &path, e))
            }
            Record::Times { path, mtime } => {
                let dir = self.root.dir(&path);
                let set = dir.and_then(|fd| set_mtime(fd.as_fd(), OsStr::new("."), mtime));
                set.map_err(|e| Error::io("set the time of", &path, e))
            }
            Record::End { .. } => Err(Error::Malformed("records follow the end")),
        }
    }

    fn remove(&mut self, path: &Path) -> nix::Result<()> {
        match self.root.parent(path) {
            Ok((dir, name)) => remove_all(dir, name),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Makes a directory, or takes the one that is there.
    fn dir(&mut self, path: &Path, clear: bool) -> nix::Result<OwnedFd> {
        if path.as_os_str().is_empty() {
            return self.root.dir(path);
        }
        let (dir, name) = self.root.parent(path)?;
        let found = match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits(),
            Err(Errno::ENOENT) => false,
            Err(e) => return Err(e),
        };
        if clear || !found {
            remove_all(dir, name)?;
            mkdirat(dir, name, Mode::S_IRWXU)?;
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(dir, name, flags, Mode::empty())
    }

    fn file(
        &mut self,
        path: &Path,
        meta: &Meta,
        size: u64,
        input: &mut impl BufRead,
    ) -> Result<()> {
        let create = |root: &mut Root| {
            let (dir, name) = root.parent(path)?;
            remove_all(dir, name)?;
            let flags = OFlag::O_WRONLY
                | OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_NOFOLLOW
                | OFlag::O_CLOEXEC;
            openat(dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
        };
        let failed = |e| Error::Io { doing: "write", path: path.to_owned(), source: e };
        let file = create(&mut self.root).map_err(|e| Error::io("create", path, e))?;
        let file = File::from(file);
        file.set_len(size).map_err(failed)?;
        let mut at: u64 = 0;
        loop {
            let room = size - at;
            match read_extent(input)? {
                Extent::End if room == 0 => break,
                Extent::Hole(len) if len <= room => at += len,
                Extent::Data(len) if len as u64 <= room => {
                    self.buffer.resize(MAX_DATA.max(len), 0);
                    let data = &mut self.buffer[..len];
                    read_data(input, data)?;
                    file.write_all_at(data, at).map_err(failed)?;
                    at += len as u64;
                    self.done.bytes += len as u64;
                }
                _ => return Err(Error::Malformed("a file does not have the size announced")),
            }
        }
        let (dir, name) = self.root.parent(path).map_err(|e| Error::io("open", path, e))?;
        set_meta(dir, name, file.as_fd(), meta, path, true)
    }

    /// Makes what has no contents.
    fn node(
        &mut self,
        path: &Path,
        meta: &Meta,
        make: impl FnOnce(BorrowedFd<'_>, &OsStr) -> nix::Result<()>,
    ) -> Result<()> {
        let create = |root: &mut Root| {
            let (dir, name) = root.parent(path)?;
            remove_all(dir, name)?;
            make(dir, name)?;
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(dir, name, flags, Mode::empty())
        };
        let fd = create(&mut self.root).map_err(|e| Error::io("create", path, e))?;
        let (dir, name) = self.root.parent(path).map_err(|e| Error::io("open", path, e))?;
        set_meta(dir, name, fd.as_fd(), meta, path, true)
    }

    fn link(&mut self, path: &Path, to: &Path) -> nix::Result<()> {
        let (Some(from_dir), Some(from)) = (to.parent(), to.file_name()) else {
            return Err(Errno::EINVAL);
        };
        let from_dir = self.root.dir(from_dir)?;
        let (dir, name) = self.root.parent(path)?;
        remove_all(dir, name)?;
        linkat(from_dir, from, dir, name, AtFlags::empty())
    }
}

/// Gives `name` in `dir`, which `fd` refers to as well, its owner, mode, attributes and, with `time`, its
/// time. In this order: each of them changes those after it.
fn set_meta(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    fd: BorrowedFd<'_>,
    meta: &Meta,
    path: &Path,
    time: bool,
) -> Result<()> {
    let owner = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
    fchownat(dir, name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW)
        .map_err(|e| Error::io("set the owner of", path, e))?;
    // The mode of a link means nothing and cannot be set.
    let mode = Mode::from_bits_truncate(meta.mode);
    match fchmodat(dir, name, mode, FchmodatFlags::NoFollowSymlink) {
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(e) => return Err(Error::io("set the mode of", path, e)),
    }
    set_xattrs(fd, &meta.xattrs).map_err(|e| Error::io("set the attributes of", path, e))?;
    if time {
        set_mtime(dir, name, meta.mtime).map_err(|e| Error::io("set the time of", path, e))?;
    }
    Ok(())
}

fn set_mtime(dir: BorrowedFd<'_>, name: &OsStr, mtime: Time) -> nix::Result<()> {
    let mtime = TimeSpec::new(mtime.seconds, mtime.nanoseconds.into());
    utimensat(dir, name, &TimeSpec::UTIME_OMIT, &mtime, UtimensatFlags::NoFollowSymlink)
}

/// Makes `wanted` all attributes there are, save those that belong to this host.
fn set_xattrs(fd: BorrowedFd<'_>, wanted: &[(Vec<u8>, Vec<u8>)]) -> std::io::Result<()> {
    let there = match sys::list_xattrs(fd) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Vec::new(),
        other => other?,
    };
    // A new file can have inherited some from its directory.
    for name in there {
        if !is_local(&name) && !wanted.iter().any(|(w, _)| *w == name) {
            sys::remove_xattr(fd, &name)?;
        }
    }
    wanted.iter().try_for_each(|(name, value)| sys::set_xattr(fd, name, value))
}
