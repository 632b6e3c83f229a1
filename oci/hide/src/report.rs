//! Counters in shared memory, which outlive the process and can be read at any time.

use crate::{format as f, sys};
use std::ffi::CStr;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

static COUNTERS: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());

/// Counts in the file `path` from now on. Several processes may count in the same one.
pub(crate) fn open(path: &CStr) {
    let length = f::REPORT_WORDS * size_of::<u64>();
    let Some(fd) = sys::open(path, libc::O_RDWR | libc::O_CREAT) else { return };
    let words = if sys::make_long(fd, length) { sys::map(length, Some(fd)) } else { None };
    sys::close(fd);
    if let Some(words) = words {
        COUNTERS.store(words.cast(), Ordering::Release);
        set(0, |word| word.store(f::REPORT_MAGIC.to_le(), Ordering::Relaxed));
        set(1, |word| word.store(f::REPORT_VERSION.to_le(), Ordering::Relaxed));
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: usize, amount: u64) {
    // Counters are little-endian in the file; adding needs the machine's own order.
    set(counter.saturating_add(2), |word| {
        let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
            Some(u64::from_le(old).wrapping_add(amount).to_le())
        });
    });
}

fn set(at: usize, change: impl FnOnce(&AtomicU64)) {
    let words = COUNTERS.load(Ordering::Acquire);
    if !words.is_null() && at < f::REPORT_WORDS {
        // SAFETY: memory of that many words that stays. Were the file cut short meanwhile, this
        // would end the process; nobody but the driver of the dump can, and it does not.
        change(unsafe { &*words.add(at) });
    }
}
