//! A userfaultfd that makes the kernel note writes, without anybody having to answer.
#![allow(unsafe_code)] // The ioctls of userfaultfd(2) have no safe wrapper.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// `_IOWR(0xaa, number, size)`.
const fn ioctl(number: usize, size: usize) -> libc::Ioctl {
    (3 << 30 | size << 16 | 0xaa << 8 | number) as libc::Ioctl
}

const UFFDIO_API: libc::Ioctl = ioctl(0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::Ioctl = ioctl(0, size_of::<Register>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = ioctl(6, size_of::<WriteProtect>());
const UFFD_API: u64 = 0xaa;
/// `UFFD_FEATURE_WP_ASYNC` (6.7): a write to a protected page takes the protection away, and goes on.
const WP_ASYNC: u64 = 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WP: u64 = 2;

/// The write tracking of one address space. Dropping it ends the tracking: the kernel takes back every
/// protection, in about 12 ms for a GB.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    /// Enables a userfaultfd that was just made.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut api = Api { api: UFFD_API, features: WP_ASYNC, ioctls: 0 };
        // SAFETY: `api` is the structure that the call reads and writes.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(Self(fd))
    }

    /// Has writes to `range` noted from now on, but for pages that are marked as protected from an
    /// earlier time: see [`lift`](Self::lift).
    ///
    /// `range` must be whole mappings: registering a part splits one, and a program that moves it then
    /// is refused with EFAULT. So the process must not run between the look at them and this.
    pub(super) fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let len = range.end - range.start;
        let mut register = Register { start: range.start, len, mode: MODE_WP, ioctls: 0 };
        // SAFETY: `register` is the structure that the call reads and writes.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })
    }

    /// Takes the protection of `range`, which must be registered, away: all of it counts as written.
    pub(super) fn lift(&self, range: &Range<u64>) -> io::Result<()> {
        let len = range.end - range.start;
        let mut protect = WriteProtect { start: range.start, len, mode: 0 };
        // SAFETY: `protect` is the structure that the call reads.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) })
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
