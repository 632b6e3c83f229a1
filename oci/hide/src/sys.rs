//! System calls, made directly: this library stands in front of the C library's functions.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};

/// The system call behind `ioctl`.
///
/// # Safety
/// As there.
pub(crate) unsafe fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    // SAFETY: as the caller promises.
    let done = unsafe { libc::syscall(libc::SYS_ioctl, c_long::from(fd), request, arg) };
    c_int::try_from(done).unwrap_or(-1)
}

/// The system call behind `openat`.
///
/// # Safety
/// As there.
pub(crate) unsafe fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: as the caller promises.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat, c_long::from(dir), path, c_long::from(flags), mode as usize)
    };
    c_int::try_from(fd).unwrap_or(-1)
}

/// Opens `path` close-on-exec.
pub(crate) fn open(path: &CStr, flags: c_int) -> Option<c_int> {
    // SAFETY: a string that ends.
    let fd = unsafe { openat(libc::AT_FDCWD, path.as_ptr(), flags | libc::O_CLOEXEC, 0o600) };
    (fd >= 0).then_some(fd)
}

/// Closes `fd`.
pub(crate) fn close(fd: c_int) {
    // SAFETY: a descriptor that only the caller knows of.
    unsafe { libc::close(fd) };
}

/// `fd`'s stat.
pub(crate) fn stat(fd: c_int) -> Option<libc::stat> {
    // SAFETY: a structure of numbers; the kernel fills it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    (unsafe { libc::fstat(fd, &raw mut stat) } == 0).then_some(stat)
}

/// `fd` is on a proc file system.
pub(crate) fn is_proc(fd: c_int) -> bool {
    // SAFETY: a structure of numbers; the kernel fills it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::fstatfs(fd, &raw mut stat) == 0 && stat.f_type == libc::PROC_SUPER_MAGIC }
}

/// Reads the link `path` into `buffer`; `None` if it does not fit.
pub(crate) fn read_link<'a>(path: &CStr, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    // SAFETY: a string that ends, and a buffer of the length given.
    let length = unsafe { libc::readlink(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    let length = usize::try_from(length).ok().filter(|length| *length < buffer.len())?;
    buffer.get(..length)
}

/// This process runs the program called `name`.
pub(crate) fn is_program(name: &[u8]) -> bool {
    let mut buffer = [0; 4096];
    let link = read_link(c"/proc/self/exe", &mut buffer).unwrap_or_default();
    let link = link.strip_suffix(b" (deleted)").unwrap_or(link);
    link.rsplit(|byte| *byte == b'/').next() == Some(name)
}

/// The string at `at` is `text`.
///
/// # Safety
/// `at` is null or a string that ends.
pub(crate) unsafe fn is_string(at: *const c_char, text: &[u8]) -> bool {
    if at.is_null() {
        return false;
    }
    for (offset, byte) in text.iter().enumerate() {
        // SAFETY: no byte before this one was the end.
        if unsafe { at.add(offset).read() }.to_ne_bytes() != [*byte] {
            return false;
        }
    }
    // SAFETY: as above.
    unsafe { at.add(text.len()).read() == 0 }
}

/// Memory of `length` bytes that stays: of `fd`, shared, or without a file.
pub(crate) fn map(length: usize, fd: Option<c_int>) -> Option<*mut u64> {
    let flags = match fd {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping wherever the kernel likes.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, fd.unwrap_or(-1), 0) };
    (at != libc::MAP_FAILED).then_some(at.cast())
}

/// Makes `fd` at least `length` bytes long.
pub(crate) fn make_long(fd: c_int, length: usize) -> bool {
    let size = stat(fd).and_then(|stat| usize::try_from(stat.st_size).ok()).unwrap_or(0);
    let Ok(wanted) = libc::off_t::try_from(length) else { return false };
    // SAFETY: numbers only.
    size >= length || unsafe { libc::ftruncate(fd, wanted) } == 0
}

/// Fills `buffer` from `fd`; `false` if the file is shorter or longer.
pub(crate) fn read_whole(fd: c_int, buffer: &mut [u8]) -> bool {
    let mut rest = buffer;
    loop {
        let mut beyond = [0_u8; 1];
        let at_end = rest.is_empty();
        let target = if at_end { &mut beyond[..] } else { &mut *rest };
        // SAFETY: a buffer of the length given.
        let count = unsafe { libc::read(fd, target.as_mut_ptr().cast(), target.len()) };
        match usize::try_from(count) {
            Ok(0) => return at_end,
            Ok(count) if !at_end => match rest.get_mut(count..) {
                Some(left) => rest = left,
                None => return false,
            },
            _ => return false,
        }
    }
}
