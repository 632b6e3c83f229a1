//! Descriptors in the table that keeper and workers share. They belong to no Rust value: a worker that
//! is killed leaves them to the next one.
#![allow(unsafe_code)] // Descriptors by number; a fork that shares their table.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// A descriptor by its number, for a call.
pub(super) fn borrow<'a>(fd: RawFd) -> BorrowedFd<'a> {
    assert!(fd >= 0, "no descriptor");
    // SAFETY: not -1. Whether it is open is for the call to say: numbers are kept in shared memory, and
    // closed only by the process that uses them.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Closes a descriptor by its number.
pub(super) fn close(fd: RawFd) {
    // SAFETY: callers own the number, as shared memory says.
    unsafe { libc::close(fd) };
}

/// Gives a descriptor up to the shared table.
pub(super) fn give(fd: OwnedFd) -> RawFd {
    std::os::fd::IntoRawFd::into_raw_fd(fd)
}

/// Inode of what a descriptor refers to; every userfaultfd has one of its own.
pub(super) fn inode(fd: RawFd) -> Option<u64> {
    nix::sys::stat::fstat(borrow(fd)).ok().map(|stat| stat.st_ino)
}

/// Whether a descriptor is a userfaultfd.
pub(super) fn is_uffd(fd: RawFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{fd}"))
        .is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
}

/// All open descriptors of this process.
pub(super) fn all() -> io::Result<Vec<RawFd>> {
    let names = std::fs::read_dir("/proc/self/fd")?.filter_map(Result::ok);
    Ok(names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Reading shall never wait. CRIU's descriptors are like that already.
pub(super) fn never_wait(fd: RawFd) {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let _ = fcntl(borrow(fd), FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
}

/// Closes every userfaultfd. What waits for its pages then gets zeros: only for tasks that never ran.
pub(super) fn close_uffds() -> io::Result<()> {
    all()?.into_iter().filter(|fd| is_uffd(*fd)).for_each(close);
    Ok(())
}

/// Closes all but standard ones, userfaultfds, and `wanted`.
pub(super) fn close_others(wanted: &[RawFd]) {
    for fd in all().unwrap_or_default() {
        if fd > 2 && !wanted.contains(&fd) && !is_uffd(fd) {
            close(fd);
        }
    }
}

/// Empties an eventfd.
pub(super) fn drain(fd: RawFd) {
    let _ = nix::unistd::read(borrow(fd), &mut [0; 8]);
}

/// A new eventfd.
pub(super) fn eventfd() -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the call takes no pointers.
    match unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: a descriptor that we have just been given.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

/// Rings an eventfd.
pub(super) fn ring(fd: &OwnedFd) {
    let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
}

/// Lets this process have as many open files as it may.
pub(super) fn allow_many() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a struct rlimit.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Signals of a terminal or of a service manager must not end who holds a task's memory.
pub(super) fn ignore_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE] {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Standard input, output and error become /dev/null.
pub(super) fn close_stdio() -> io::Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    for fd in 0..3 {
        // SAFETY: the call takes no pointers; standard streams are nobody's own.
        if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Forks a process that shares our table of descriptors: what it opens survives it. `child` never
/// returns; its result is the process's exit status. Returns the process's id.
///
/// To be called by a process of one thread.
pub(super) fn fork_sharing(child: impl FnOnce() -> i32) -> io::Result<i32> {
    let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD);
    // SAFETY: without CLONE_VM this is fork(2); a process of one thread leaves no lock taken by another.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // Nothing of the parent may be dropped here: it would close the parent's descriptors.
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(status.unwrap_or(101)) }
        }
        pid => Ok(pid as i32),
    }
}
