//! The system calls this needs; std has none of them, and nothing but std is linked here.

#![expect(unsafe_code, reason = "memory by its address, fork and signals")]

use std::ffi::{c_char, c_int, c_long, c_void};
use std::io;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::pattern::{PAGE, Page, ZERO};

pub(crate) const NONE: c_int = 0;
pub(crate) const READ: c_int = 1;
pub(crate) const READ_WRITE: c_int = 3;

pub(crate) const SHARED: c_int = 1;
pub(crate) const PRIVATE: c_int = 2;
pub(crate) const ANONYMOUS: c_int = 0x20;
pub(crate) const NORESERVE: c_int = 0x4000;
pub(crate) const HUGETLB: c_int = 0x4_0000;

pub(crate) const DONTNEED: c_int = 4;
pub(crate) const DONTFORK: c_int = 10;
pub(crate) const HUGEPAGE: c_int = 14;
pub(crate) const GUARD_INSTALL: c_int = 102;
pub(crate) const GUARD_REMOVE: c_int = 103;

pub(crate) const EFAULT: i32 = 14;

const MREMAP_MAYMOVE: c_int = 1;
const MREMAP_FIXED: c_int = 2;
const WNOHANG: c_int = 1;
const PR_SET_PDEATHSIG: c_int = 1;
const SIGINT: c_int = 2;
const SIGKILL: c_long = 9;
const SIGTERM: c_int = 15;
const CLOEXEC: c_int = 0o2_000_000;

unsafe extern "C" {
    fn mmap(a: *mut c_void, n: usize, p: c_int, f: c_int, fd: c_int, o: i64) -> *mut c_void;
    fn munmap(a: *mut c_void, n: usize) -> c_int;
    fn mprotect(a: *mut c_void, n: usize, p: c_int) -> c_int;
    fn madvise(a: *mut c_void, n: usize, advice: c_int) -> c_int;
    fn mlock(a: *const c_void, n: usize) -> c_int;
    fn mremap(a: *mut c_void, old: usize, new: usize, f: c_int, ...) -> *mut c_void;
    fn sbrk(n: isize) -> *mut c_void;
    fn memfd_create(name: *const c_char, flags: u32) -> c_int;
    fn pipe2(fds: *mut c_int, flags: c_int) -> c_int;
    fn read(fd: c_int, at: *mut c_void, n: usize) -> isize;
    fn write(fd: c_int, at: *const c_void, n: usize) -> isize;
    fn fork() -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn _exit(code: c_int) -> !;
    fn prctl(option: c_int, ...) -> c_int;
    fn signal(number: c_int, handler: extern "C" fn(c_int)) -> usize;
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_map(at: *mut c_void) -> io::Result<*mut c_void> {
    if at.addr() == usize::MAX { Err(io::Error::last_os_error()) } else { Ok(at) }
}

/// A range of memory in pages. Only this program's own functions touch it, always by copying.
#[derive(Debug)]
pub(crate) struct Memory {
    at: *mut u8,
    pages: usize,
    mapped: bool,
}

// SAFETY: it is a range of addresses, valid in every thread.
unsafe impl Send for Memory {}

impl Memory {
    /// Maps `pages` with flags and protection of mmap(2); `fd` is -1 without a file.
    pub(crate) fn map(
        pages: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
    ) -> io::Result<Self> {
        // SAFETY: the kernel chooses where, so nothing that is in use is touched.
        let at = check_map(unsafe { mmap(null_mut(), pages * PAGE, protection, flags, fd, 0) })?;
        Ok(Self { at: at.cast(), pages, mapped: true })
    }

    /// Memory by brk(2), never given back.
    pub(crate) fn by_brk(pages: usize) -> io::Result<Self> {
        // SAFETY: only moves the end of the heap; malloc copes with others that do.
        let at = check_map(unsafe { sbrk(((pages + 1) * PAGE).cast_signed()) })?;
        let start = at.addr().next_multiple_of(PAGE);
        Ok(Self { at: at.with_addr(start).cast(), pages, mapped: false })
    }

    /// Memory that belongs to the caller, such as on its stack; it must outlive this.
    pub(crate) fn borrowed(bytes: &mut [u8]) -> Self {
        assert_eq!(bytes.as_ptr().addr() % PAGE, 0);
        Self { at: bytes.as_mut_ptr(), pages: bytes.len() / PAGE, mapped: false }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    fn place(&self, range: &Range<usize>) -> (*mut c_void, usize) {
        assert!(range.start <= range.end && range.end <= self.pages, "{range:?} is outside");
        (self.at.wrapping_add(range.start * PAGE).cast(), range.len() * PAGE)
    }

    pub(crate) fn protect(&self, range: Range<usize>, protection: c_int) -> io::Result<()> {
        let (at, length) = self.place(&range);
        // SAFETY: the range is ours, and nothing holds a reference into it.
        check(unsafe { mprotect(at, length, protection) }).map(drop)
    }

    pub(crate) fn advise(&self, range: Range<usize>, advice: c_int) -> io::Result<()> {
        let (at, length) = self.place(&range);
        // SAFETY: as in `protect`.
        check(unsafe { madvise(at, length, advice) }).map(drop)
    }

    pub(crate) fn lock(&self) -> io::Result<()> {
        let (at, length) = self.place(&(0..self.pages));
        // SAFETY: changes nothing that is read or written.
        check(unsafe { mlock(at, length) }).map(drop)
    }

    /// Moves all of it elsewhere and gives it another size. New pages are zero.
    pub(crate) fn remap(&mut self, pages: usize) -> io::Result<()> {
        let target = Self::map(pages, NONE, PRIVATE | ANONYMOUS | NORESERVE, -1)?;
        let (old, new) = (self.pages * PAGE, pages * PAGE);
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        // SAFETY: both ranges are ours, and nothing holds a reference into either.
        let at = check_map(unsafe { mremap(self.at.cast(), old, new, flags, target.at) })?;
        std::mem::forget(target);
        (self.at, self.pages) = (at.cast(), pages);
        Ok(())
    }

    /// A copy of a page, which must be readable.
    pub(crate) fn read(&self, page: usize) -> Page {
        let (at, length) = self.place(&(page..page + 1));
        let mut copy = ZERO;
        // SAFETY: the page is ours and readable, the copy as long as it.
        unsafe { std::ptr::copy_nonoverlapping(at.cast::<u8>(), copy.as_mut_ptr().cast(), length) };
        copy
    }

    /// Writes a page, which must be writable.
    pub(crate) fn write(&self, page: usize, words: &Page) {
        let (at, length) = self.place(&(page..page + 1));
        // SAFETY: the page is ours and writable, the source as long as it.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr().cast::<u8>(), at.cast(), length) };
    }

    /// The word number `n` from the start.
    pub(crate) fn word(&self, n: usize) -> *mut u64 {
        assert!(n < self.pages * PAGE / 8);
        self.at.cast::<u64>().wrapping_add(n)
    }

    pub(crate) fn get(&self, n: usize) -> u64 {
        // SAFETY: within the range, aligned, and readable.
        unsafe { self.word(n).read_volatile() }
    }

    pub(crate) fn set(&self, n: usize, value: u64) {
        // SAFETY: within the range, aligned, and writable.
        unsafe { self.word(n).write_volatile(value) }
    }

    /// Whether the kernel can read the page; asks it, so that no signal comes if not.
    pub(crate) fn accessible(&self, page: usize) -> bool {
        static PIPE: OnceLock<(c_int, c_int)> = OnceLock::new();
        let (from, to) = *PIPE.get_or_init(|| {
            let mut ends = [0; 2];
            // SAFETY: the array has room for the two ends.
            check(unsafe { pipe2(ends.as_mut_ptr(), CLOEXEC) }).expect("make a pipe");
            (ends[0], ends[1])
        });
        let (at, _) = self.place(&(page..page + 1));
        // SAFETY: the kernel answers EFAULT instead of reading what it cannot.
        let readable = unsafe { write(to, at, 1) } == 1;
        if readable {
            let mut byte = 0_u8;
            // SAFETY: one byte of room.
            unsafe { read(from, (&raw mut byte).cast(), 1) };
        }
        readable
    }

    /// Forgets it without unmapping: it is not there in this process.
    pub(crate) fn forget(mut self) {
        self.mapped = false;
    }

    /// The whole range as a value of type `T`, shared by all who map it.
    pub(crate) fn shared<T: Shared>(self) -> &'static T {
        assert!(size_of::<T>() <= self.pages * PAGE);
        let at: *const T = self.at.cast();
        std::mem::forget(self);
        // SAFETY: zeroed, aligned to a page, large enough, and never unmapped.
        unsafe { &*at }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.mapped {
            // SAFETY: the range is ours, and nothing holds a reference into it.
            unsafe { munmap(self.at.cast(), self.pages * PAGE) };
        }
    }
}

/// Types that may lie in memory shared between processes.
///
/// # Safety
/// All zeros must be a valid value, and every change must be atomic.
pub(crate) unsafe trait Shared: Sync {}

// SAFETY: made of atomic numbers only.
unsafe impl Shared for crate::turn::Board {}

/// A file that is only memory.
pub(crate) fn memory_file() -> io::Result<std::fs::File> {
    use std::os::fd::FromRawFd;
    // SAFETY: a text that ends with a zero.
    let fd = check(unsafe { memfd_create(c"ferry-memory".as_ptr(), 1) })?;
    // SAFETY: just made, so nobody else's.
    Ok(unsafe { std::fs::File::from_raw_fd(fd) })
}

/// Runs `child` in a new process that ends with it, with its exit code, and no later than this one.
pub(crate) fn spawn(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: only called where other threads hold no lock that the child takes; malloc's are
    // taken care of by the C library.
    match check(unsafe { fork() })? {
        0 => {
            // SAFETY: plain numbers.
            unsafe { prctl(PR_SET_PDEATHSIG, SIGKILL) };
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
            // SAFETY: ends this process.
            unsafe { _exit(code) }
        }
        pid => Ok(pid),
    }
}

/// The end of process `pid`, a child: none while it runs, else whether it ended well.
pub(crate) fn ended(pid: i32) -> Option<bool> {
    let mut status = 0;
    // SAFETY: room for the status.
    match unsafe { waitpid(pid, &raw mut status, WNOHANG) } {
        0 => None,
        found => Some(found == pid && status == 0),
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Whether SIGTERM or SIGINT came.
pub(crate) fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Ends at SIGTERM and SIGINT. Process 1 of a container gets neither without this.
pub(crate) fn stop_at_signal() {
    extern "C" fn handler(_: c_int) {
        STOP.store(true, Ordering::Relaxed);
    }
    for number in [SIGINT, SIGTERM] {
        // SAFETY: the handler stores to an atomic, which is safe at any time.
        unsafe { signal(number, handler) };
    }
}
