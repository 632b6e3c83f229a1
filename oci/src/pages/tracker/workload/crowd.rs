//! Threads and processes that count in the first word of an area as long as they run.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::{PAGE, map, prot};

fn count(at: u64) {
    // SAFETY: the area is mapped as long as the process lives; others count there as well.
    unsafe { (*(at as *const AtomicU64)).fetch_add(1, Ordering::SeqCst) };
}

/// So many threads that count.
pub(super) fn counters(at: u64, threads: u64) {
    for _ in 0..threads {
        thread::spawn(move || {
            loop {
                count(at);
            }
        });
    }
}

/// So many threads that sleep.
pub(super) fn sleepers(threads: u64) {
    for _ in 0..threads {
        thread::spawn(|| {
            loop {
                thread::park();
            }
        });
    }
}

/// Threads that count for a moment and make another one before they end.
pub(super) fn relays(at: u64, threads: u64) {
    for _ in 0..threads {
        thread::spawn(move || {
            (0..50).for_each(|_| count(at));
            relays(at, 1);
        });
    }
}

/// A thread in vfork(2), whose child does not come to an end, and counts.
pub(super) fn vfork(at: u64) {
    extern "C" fn child(at: *mut c_void) -> i32 {
        loop {
            count(at as u64);
        }
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let stack = map(0, 16, prot("rw"), flags).unwrap();
    thread::spawn(move || {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let top = (stack + 16 * PAGE) as *mut c_void;
        // SAFETY: the child has a stack of its own and touches nothing else than `at`.
        unsafe { libc::clone(child, top, flags, at as *mut c_void) };
    });
}
