//! userfaultfd: its messages and its requests.
#![allow(unsafe_code)] // The requests are ioctls on structures.

use std::io;
use std::os::fd::RawFd;

/// Bytes of a message.
pub(super) const MESSAGE: u64 = 32;

const fn request(number: u64, size: u64) -> u64 {
    // _IOWR(0xaa, number, size)
    3 << 30 | size << 16 | 0xaa << 8 | number
}
const WAKE: u64 = 2 << 30 | 16 << 16 | 0xaa << 8 | 0x02; // _IOR
const COPY: u64 = request(0x03, 40);
const ZEROPAGE: u64 = request(0x04, 32);

/// What a task did with its memory, or wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// It waits for the page at this address.
    Fault(u64),
    /// It has forked; the child's descriptor.
    Fork(RawFd),
    /// It moved memory.
    Remap { from: u64, to: u64, len: u64 },
    /// It dropped the content of memory.
    Remove(u64, u64),
    /// It unmapped memory.
    Unmap(u64, u64),
}

/// Kinds of messages, as the kernel numbers them.
pub(super) const PAGEFAULT: u8 = 0x12;
pub(super) const FORK: u8 = 0x13;
pub(super) const REMAP: u8 = 0x14;
pub(super) const REMOVE: u8 = 0x15;
pub(super) const UNMAP: u8 = 0x16;

impl Event {
    /// Reads a message, given as words.
    pub(super) fn parse(words: [u64; 4]) -> Option<Self> {
        let [kind, a, b, c] = words;
        match kind as u8 {
            // Flags come first, then the address.
            PAGEFAULT => Some(Self::Fault(b & !0xfff)),
            FORK => Some(Self::Fork(a as u32 as RawFd)),
            REMAP => Some(Self::Remap { from: a, to: b, len: c }),
            REMOVE => Some(Self::Remove(a, b)),
            UNMAP => Some(Self::Unmap(a, b)),
            _ => None,
        }
    }
}

/// Reads messages into memory at `buffer`, `len` bytes. Zero when there are none.
pub(super) fn read(fd: RawFd, buffer: u64, len: u64) -> io::Result<u64> {
    // SAFETY: callers give a part of a shared mapping of this process.
    let n = unsafe { libc::read(fd, buffer as *mut libc::c_void, len as usize) };
    match u64::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EAGAIN) => Ok(0),
            e => Err(e),
        },
    }
}

/// Fills `len` bytes from `to` on from this process's memory at `from`, and wakes who waits there.
/// Returns how much was filled, which may be less than `len`.
pub(super) fn copy(fd: RawFd, to: u64, from: u64, len: u64) -> Result<u64, i32> {
    let mut arg = [to, from, len, 0, 0];
    // SAFETY: `arg` is a struct uffdio_copy; the kernel only reads at `from`, and checks it.
    let rc = unsafe { libc::ioctl(fd, COPY, arg.as_mut_ptr()) };
    result(rc, arg[4] as i64, len)
}

/// Fills `len` bytes from `to` on with zeros, and wakes who waits there.
pub(super) fn zero(fd: RawFd, to: u64, len: u64) -> Result<u64, i32> {
    let mut arg = [to, len, 0, 0];
    // SAFETY: `arg` is a struct uffdio_zeropage.
    let rc = unsafe { libc::ioctl(fd, ZEROPAGE, arg.as_mut_ptr()) };
    result(rc, arg[3] as i64, len)
}

fn result(rc: i32, done: i64, len: u64) -> Result<u64, i32> {
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    match (rc, done) {
        (0, _) => Ok(len),
        (_, 1..) => Ok(done as u64),
        _ => Err(errno),
    }
}

/// Wakes who waits for a page between `start` and `start + len`; they look again.
pub(super) fn wake(fd: RawFd, start: u64, len: u64) -> io::Result<()> {
    let arg = [start, len];
    // SAFETY: `arg` is a struct uffdio_range.
    match unsafe { libc::ioctl(fd, WAKE, arg.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Wakes everybody who waits, wherever.
pub(super) fn wake_all(fd: RawFd) {
    // The size of an address space differs; the first that the kernel takes is the right one.
    let start = 0x10000;
    for top in [(1 << 56) - 4096, 1 << 52, 1 << 48, (1 << 47) - 4096, 1 << 42, 1 << 39u64] {
        if wake(fd, start, top - start).is_ok() {
            return;
        }
    }
    log::error!("cannot wake the tasks behind descriptor {fd}");
}
