//! Looking at an upper directory.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, major, minor};

use super::manifest::{Entry, Kind, Manifest, Meta, RACY, Time};
use super::sys;
use super::{Error, Result};

/// Attributes by which the overlay marks what it has made of its upper directory.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// Attributes that speak of the host on which a file lies: labels and signatures that the other host makes
/// anew.
const HOST: [&[u8]; 3] = [b"security.selinux", b"security.ima", b"security.evm"];

/// Whether an attribute stays where it is.
pub(super) fn is_local(name: &[u8]) -> bool {
    name.starts_with(OVERLAY) || HOST.contains(&name)
}

/// Looks at everything in the upper directory `upper`, which may be in use.
///
/// # Errors
/// [`Error::Io`]; [`Error::ByReference`] for what the overlay keeps elsewhere.
pub fn scan(upper: &Path) -> Result<Manifest> {
    rescan(upper, &Manifest::default())
}

/// As [`scan`], cheaper when `old` is an earlier scan of the same directory.
///
/// # Errors
/// As [`scan`].
pub fn rescan(upper: &Path, old: &Manifest) -> Result<Manifest> {
    let began = SystemTime::now();
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(upper, flags, Mode::empty())
        .map_err(|e| Error::io("open the upper directory", upper, e))?;
    let settled = Time::from(began.checked_sub(RACY).unwrap_or(SystemTime::UNIX_EPOCH));
    let mut scan = Scan { old, new: Manifest { settled, ..Manifest::default() } };
    scan.add(root, PathBuf::new())?;
    Ok(scan.new)
}

struct Scan<'a> {
    old: &'a Manifest,
    new: Manifest,
}

impl Scan<'_> {
    /// Adds what `fd` refers to and everything below it.
    fn add(&mut self, fd: OwnedFd, path: PathBuf) -> Result<()> {
        let stat = fstat(&fd).map_err(|e| Error::io("look at", &path, e))?;
        let Some(entry) = self.entry(fd.as_fd(), &stat, &path)? else {
            return Ok(());
        };
        let is_dir = entry.is_dir();
        self.new.entries.insert(path.clone(), entry);
        if !is_dir {
            return Ok(());
        }
        // By descriptor: the container may put a link in the directory's place at any time.
        let names = match fs::read_dir(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            Ok(names) => names,
            Err(e) if is_gone(&e) => return Ok(()),
            Err(e) => return Err(Error::io("list", &path, e)),
        };
        for name in names {
            let name = name.map_err(|e| Error::io("list", &path, e))?.file_name();
            let below = path.join(&name);
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            match openat(&fd, name.as_os_str(), flags, Mode::empty()) {
                Ok(child) => self.add(child, below)?,
                Err(Errno::ENOENT) => {}
                Err(e) => return Err(Error::io("open", &below, e)),
            }
        }
        Ok(())
    }

    /// `None` when it went away.
    fn entry(&self, fd: BorrowedFd<'_>, stat: &FileStat, path: &Path) -> Result<Option<Entry>> {
        let format = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        let device = || (number(major(stat.st_rdev)), number(minor(stat.st_rdev)));
        let kind = match format {
            SFlag::S_IFDIR => Kind::Dir { opaque: false },
            SFlag::S_IFREG => Kind::File,
            SFlag::S_IFLNK => match readlinkat(fd, OsStr::new("")) {
                Ok(target) => Kind::Symlink(target.into()),
                Err(Errno::ENOENT) => return Ok(None),
                Err(e) => return Err(Error::io("read the link", path, e)),
            },
            SFlag::S_IFIFO => Kind::Fifo,
            SFlag::S_IFSOCK => Kind::Socket,
            SFlag::S_IFCHR if stat.st_rdev == 0 => Kind::Whiteout,
            SFlag::S_IFCHR => Kind::Char(device().0, device().1),
            _ => Kind::Block(device().0, device().1),
        };
        let mut entry = Entry {
            kind,
            meta: Meta {
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                mtime: time(stat.st_mtime, stat.st_mtime_nsec),
                xattrs: Vec::new(),
            },
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
            size: if format == SFlag::S_IFREG { stat.st_size.cast_unsigned() } else { 0 },
            ino: stat.st_ino,
            nlink: stat.st_nlink,
        };
        if entry.is_absence() {
            return Ok(Some(entry));
        }
        // Changing an attribute changes the ctime.
        if let Some(old) = self.old.get(path).filter(|old| {
            let same_kind = old.kind == entry.kind || old.is_dir() && entry.is_dir();
            same_kind && (old.ino, old.ctime) == (entry.ino, entry.ctime) && !self.old.is_racy(old)
        }) {
            entry.kind.clone_from(&old.kind);
            entry.meta.xattrs.clone_from(&old.meta.xattrs);
            return Ok(Some(entry));
        }
        match read_xattrs(fd, path, &mut entry) {
            Err(Error::Io { source, .. }) if is_gone(&source) => Ok(None),
            other => other.map(|()| Some(entry)),
        }
    }
}

/// Reads the attributes of an entry, its own and those that the overlay put there.
fn read_xattrs(fd: BorrowedFd<'_>, path: &Path, entry: &mut Entry) -> Result<()> {
    let names = match sys::list_xattrs(fd) {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        Err(e) => return Err(Error::io("list the attributes of", path, e)),
    };
    for name in names {
        let read = || {
            let value = sys::get_xattr(fd, &name);
            value.map_err(|e| Error::io("read the attributes of", path, e))
        };
        let by_reference = |option| Err(Error::ByReference { path: path.to_owned(), option });
        match name.strip_prefix(OVERLAY) {
            // "x" says that the directory may have whiteouts that are attributes, and is not opaque.
            Some(b"opaque") if entry.is_dir() => {
                let opaque = read()?.as_deref() == Some(b"y");
                entry.kind = Kind::Dir { opaque };
            }
            Some(b"whiteout") if entry.kind == Kind::File && entry.size == 0 => {
                entry.kind = Kind::Whiteout;
                entry.meta.xattrs.clear();
                return Ok(());
            }
            Some(b"redirect") => return by_reference("redirect_dir"),
            Some(b"metacopy") => return by_reference("metacopy"),
            _ if is_local(&name) => {}
            _ => {
                if let Some(value) = read()? {
                    entry.meta.xattrs.push((name, value));
                }
            }
        }
    }
    entry.meta.xattrs.sort();
    Ok(())
}

fn time(seconds: i64, nanoseconds: i64) -> Time {
    Time { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) }
}

fn number(device: u64) -> u32 {
    u32::try_from(device).unwrap_or(u32::MAX)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ESTALE))
}
