//! A directory tree in which nothing leads out: every path is resolved by the kernel below the root, without
//! following links and without leaving the mount.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::Result;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// A tree that only we, or only the container, change.
#[derive(Debug)]
pub(super) struct Root {
    fd: OwnedFd,
    /// The directory opened last: the next path is often in the same.
    last: Option<(PathBuf, OwnedFd)>,
}

impl Root {
    pub(super) fn open(path: &Path) -> super::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty())
            .map_err(|e| super::Error::io("open the root", path, e))?;
        Ok(Self { fd, last: None })
    }

    /// The directory that contains `path`, and the name of `path` in it.
    pub(super) fn parent<'a>(&mut self, path: &'a Path) -> Result<(BorrowedFd<'_>, &'a OsStr)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::EINVAL);
        };
        if self.last.as_ref().is_none_or(|(last, _)| last != parent) {
            self.last = Some((parent.to_owned(), self.dir(parent)?));
        }
        let (_, fd) = self.last.as_ref().ok_or(Errno::EINVAL)?;
        Ok((fd.as_fd(), name))
    }

    /// To be called when a directory is removed or replaced.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// Opens a directory as a place to work in.
    pub(super) fn dir(&self, path: &Path) -> Result<OwnedFd> {
        self.resolve(path, OFlag::O_PATH | OFlag::O_DIRECTORY)
    }

    /// Opens a file for reading, without leaving a trace in its time of last access.
    pub(super) fn read(&self, path: &Path) -> Result<File> {
        // Not to be held up by a pipe that was put in the file's place.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
        self.resolve(path, flags | OFlag::O_NOATIME)
            .or_else(|e| if e == Errno::EPERM { self.resolve(path, flags) } else { Err(e) })
            .map(File::from)
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS
            | ResolveFlag::RESOLVE_NO_XDEV;
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        loop {
            // EAGAIN: something was renamed meanwhile, so that the kernel cannot tell.
            match openat2(&self.fd, path, how) {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other,
            }
        }
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Removes `name` from `dir`, a directory with everything in it. What is not there is fine.
pub(super) fn remove_all(dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => {}
        Err(Errno::ENOENT) => return Ok(()),
        other => return other,
    }
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
    let inner = openat2(dir, name, how)?;
    let list = fs::read_dir(format!("/proc/self/fd/{}", inner.as_raw_fd())).map_err(errno)?;
    for entry in list {
        remove_all(inner.as_fd(), &entry.map_err(errno)?.file_name())?;
    }
    unlinkat(dir, name, UnlinkatFlags::RemoveDir)
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
