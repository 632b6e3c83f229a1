//! The system calls that several items need; std has none of them, and nothing but std is linked here.

#![expect(unsafe_code, reason = "system calls, memory by its address, and fork")]

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};

pub(crate) const NONE: c_int = 0;
pub(crate) const READ: c_int = 1;
pub(crate) const READ_WRITE: c_int = 3;
pub(crate) const SHARED: c_int = 1;
pub(crate) const PRIVATE: c_int = 2;
pub(crate) const ANONYMOUS: c_int = 0x20;

pub(crate) const PAGE: usize = 4096;

pub(crate) const SIGKILL: c_int = 9;

const PR_SET_PDEATHSIG: c_int = 1;
const PR_SET_CHILD_SUBREAPER: c_int = 36;

unsafe extern "C" {
    fn mmap(a: *mut c_void, n: usize, p: c_int, f: c_int, fd: c_int, o: i64) -> *mut c_void;
    fn mprotect(a: *mut c_void, n: usize, p: c_int) -> c_int;
    fn fork() -> c_int;
    fn _exit(code: c_int) -> !;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn setsid() -> c_int;
    fn setpgid(pid: c_int, group: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
}

/// An error of a call that has returned less than zero.
pub(crate) fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor that a call has just made.
pub(crate) fn made(fd: c_int) -> io::Result<File> {
    // SAFETY: just made, so nobody else's.
    check(fd).map(|fd| unsafe { File::from_raw_fd(fd) })
}

/// A range of memory that is never unmapped. Others may write it too, so it is never borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    at: *mut u8,
    length: usize,
}

impl Memory {
    /// Maps `length` bytes; `fd` is -1 without a file.
    pub(crate) fn map(
        length: usize,
        protection: c_int,
        flags: c_int,
        fd: RawFd,
    ) -> io::Result<Self> {
        // SAFETY: the kernel chooses where, so nothing that is in use is touched.
        let at = unsafe { mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
        Self::mapped(at, length)
    }

    /// What a call has mapped at `at`.
    pub(crate) fn mapped(at: *mut c_void, length: usize) -> io::Result<Self> {
        if at.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at: at.cast(), length })
    }

    pub(crate) fn protect(&self, start: usize, length: usize, protection: c_int) -> io::Result<()> {
        assert!(start + length <= self.length);
        // SAFETY: the range is ours, and nothing holds a reference into it.
        check(unsafe { mprotect(self.at.wrapping_add(start).cast(), length, protection) }).map(drop)
    }

    pub(crate) fn address(&self) -> usize {
        self.at.addr()
    }

    pub(crate) fn get(&self, n: usize) -> u8 {
        assert!(n < self.length);
        // SAFETY: within the range; the caller has made it readable.
        unsafe { self.at.wrapping_add(n).read_volatile() }
    }

    pub(crate) fn set(&self, n: usize, value: u8) {
        assert!(n < self.length);
        // SAFETY: within the range; the caller has made it writable.
        unsafe { self.at.wrapping_add(n).write_volatile(value) }
    }

    /// Writes all of it.
    pub(crate) fn fill(&self, seed: usize) {
        (0..self.length).for_each(|n| self.set(n, byte(seed, n)));
    }

    /// The first byte that is not as [`Self::fill`] has written it.
    pub(crate) fn differs(&self, seed: usize) -> Option<usize> {
        (0..self.length).find(|&n| self.get(n) != byte(seed, n))
    }
}

/// A byte that says where it belongs.
pub(crate) fn byte(seed: usize, n: usize) -> u8 {
    ((seed * 31 + n * 7) ^ (n >> 8) ^ (n >> 16)) as u8
}

/// Runs `child` in a new process, which ends with it.
pub(crate) fn fork_off(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: only called where no other thread runs.
    match check(unsafe { fork() })? {
        0 => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
            // SAFETY: ends this process.
            unsafe { _exit(code) }
        }
        pid => Ok(pid),
    }
}

/// [`fork_off`], and the child ends no later than this process.
pub(crate) fn spawn(child: impl FnOnce() -> i32) -> io::Result<i32> {
    let parent = std::process::id();
    fork_off(|| {
        // SAFETY: plain numbers.
        unsafe { prctl(PR_SET_PDEATHSIG, c_long::from(SIGKILL)) };
        // It may have ended before.
        if std::os::unix::process::parent_id() != parent { 1 } else { child() }
    })
}

/// Orphans below this process become its children, as they do below the first of a container.
pub(crate) fn adopt_orphans() -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { prctl(PR_SET_CHILD_SUBREAPER, 1 as c_long) }).map(drop)
}

/// prctl(2) with one number.
pub(crate) fn control(option: c_int, value: u64) -> io::Result<c_int> {
    // SAFETY: only options whose argument is a number are used.
    check(unsafe { prctl(option, value, 0 as c_long, 0 as c_long, 0 as c_long) })
}

/// A system call with numbers.
pub(crate) fn call(number: c_long, arguments: [c_long; 5]) -> io::Result<c_long> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the callers pass numbers, or addresses of what outlives the call.
    match unsafe { syscall(number, a, b, c, d, e) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Waits for the end of a child; its exit code, or none if a signal has ended it.
pub(crate) fn wait(pid: i32) -> io::Result<Option<i32>> {
    let mut status = 0;
    // SAFETY: room for the status.
    check(unsafe { waitpid(pid, &raw mut status, 0) })?;
    Ok((status & 0x7f == 0).then_some(status >> 8 & 0xff))
}

/// Ends a child.
pub(crate) fn end(pid: i32) -> io::Result<()> {
    send(pid, SIGKILL)?;
    wait(pid).map(drop)
}

/// Sends a signal.
pub(crate) fn send(pid: i32, signal: c_int) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { kill(pid, signal) }).map(drop)
}

/// Makes this process the leader of a new session.
pub(crate) fn new_session() -> io::Result<()> {
    // SAFETY: no arguments.
    check(unsafe { setsid() }).map(drop)
}

/// Puts a process into a group; 0 is this process, and a group of its own.
pub(crate) fn join_group(pid: i32, group: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { setpgid(pid, group) }).map(drop)
}

/// fcntl(2) with a number, or the address of what outlives the call.
pub(crate) fn control_fd(fd: RawFd, command: c_int, argument: c_long) -> io::Result<c_int> {
    // SAFETY: as the callers have it.
    check(unsafe { fcntl(fd, command, argument) })
}

/// ioctl(2) on `value`, which has the size that the request means.
pub(crate) fn control_device<T>(fd: RawFd, request: u64, value: &mut T) -> io::Result<c_int> {
    // SAFETY: as the callers have it.
    check(unsafe { ioctl(fd, request, std::ptr::from_mut(value)) })
}
