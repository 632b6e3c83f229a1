//! A userfaultfd that makes the kernel note writes, without anybody having to answer.
#![allow(unsafe_code)] // The ioctls of userfaultfd(2) have no safe wrapper.

use std::fs::File;
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

/// `struct procmap_query`: one mapping of `/proc/PID/maps`, in binary.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    addr: u64,
    start: u64,
    end: u64,
    // Flags, page size, offset, inode, device, sizes and addresses of names: not asked for.
    rest: [u64; 8],
}

/// `_IOWR(kind, number, size)`.
const fn iowr(kind: usize, number: usize, size: usize) -> libc::Ioctl {
    (3 << 30 | size << 16 | kind << 8 | number) as libc::Ioctl
}

const fn ioctl(number: usize, size: usize) -> libc::Ioctl {
    iowr(0xaa, number, size)
}

/// `PROCMAP_QUERY` (6.11).
const PROCMAP_QUERY: libc::Ioctl = iowr(b'f' as usize, 17, size_of::<Query>());

const UFFDIO_API: libc::Ioctl = ioctl(0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::Ioctl = ioctl(0, size_of::<Register>());
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

    /// Has writes to `range` noted from now on. What was there before counts as written.
    pub(super) fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let len = range.end - range.start;
        let mut register = Register { start: range.start, len, mode: MODE_WP, ioctls: 0 };
        // SAFETY: `register` is the structure that the call reads and writes.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether `range` is one whole mapping of the process whose `/proc/PID/maps` is `maps`, as far as this
/// kernel can be asked for one alone.
///
/// To be asked just before [`Uffd::register`]: registering a part of a mapping splits it, and a
/// program that moves it at that moment is refused with EFAULT.
pub(super) fn is_mapping(maps: &File, range: &Range<u64>) -> bool {
    let mut query =
        Query { size: size_of::<Query>() as u64, addr: range.start, ..Query::default() };
    // SAFETY: `query` is the structure that the call reads and writes; it asks for no names.
    match check(unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) }) {
        Ok(()) => (query.start, query.end) == (range.start, range.end),
        Err(error) => error.raw_os_error() == Some(libc::ENOTTY),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_mapping_is_none() {
        let maps = File::open("/proc/self/maps").unwrap();
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = text.lines().find(|line| line.ends_with("[stack]")).unwrap();
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        let whole = parse(start)..parse(end);
        assert!(is_mapping(&maps, &whole));
        if !is_mapping(&maps, &(0..4096)) {
            assert!(!is_mapping(&maps, &(whole.start..whole.end - 4096)));
        }
    }
}
