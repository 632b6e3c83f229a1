//! Preloaded into CRIU for a dump: hides memory that ferry copies itself.
//!
//! ```text
//!   driver of the dump ── writes ──> FOLDER/ranges, FOLDER/smaps-PID        (before the release)
//!                                        │ read once, at the first question about another task
//!   CRIU ── ioctl(PAGEMAP_SCAN) ──> this library ── around the ranges ──> kernel
//!        ── openat(PID, "smaps") ─> this library ── FOLDER/smaps-PID, else the real one
//!                                        │
//!   driver of the dump <── reads ─── FOLDER/report                          (counters)
//! ```
//! CRIU learns by that ioctl which pages exist. Told that a range has none, it writes none, and
//! the dump takes the same time at any size. Whoever hides memory keeps it: see
//! `ferry_oci::criu::Hiding`.
//!
//! The library acts in a program called `criu` only and takes itself out of the environment
//! there, so that CRIU's children do not get it. In any doubt it does what would have been done
//! without it: missing, torn or wrong orders hide nothing.
//!
//! It runs inside of another program: it allocates nothing, never panics, and keeps the C calling
//! convention at its edges. Only `core` and the C library are used.
#![allow(unsafe_code)] // The edges are C functions with raw pointers.

mod environment;
#[allow(dead_code, reason = "the driver of the dump uses the rest")]
mod format;
mod link;
mod orders;
mod report;
mod scan;
mod state;
mod sys;
#[cfg(test)]
mod tests;

use format as f;
use scan::{Kind, ScanArg};
use std::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

/// Number of the ioctl: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 3 << 30 | (size_of::<ScanArg>() as u32) << 16 | (b'f' as u32) << 8 | 16;

#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

/// Decides whether to act in this process.
#[cfg_attr(test, allow(dead_code))]
extern "C" fn at_load() {
    if let Some(folder) = environment::folder()
        && sys::is_program(f::PROGRAM.as_bytes())
        && state::activate(folder)
    {
        environment::forget();
        report::add(f::LOADED, 1);
    }
}

/// `ioctl` of the C library.
///
/// # Safety
/// As there.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    // The kernel looks at 32 bits of the number, too.
    if request as u32 == PAGEMAP_SCAN && state::is_active() && !arg.is_null() {
        // SAFETY: the caller hands this ioctl a valid structure, which the kernel would read.
        let asked = unsafe { arg.cast::<ScanArg>().read_unaligned() };
        if let Some(done) = hidden_scan(fd, &asked) {
            if let Ok((_, walk_end)) = done {
                // SAFETY: as above; the kernel would write it.
                unsafe { (&raw mut (*arg.cast::<ScanArg>()).walk_end).write_unaligned(walk_end) };
            }
            return done.map_or(-1, |(regions, _)| regions);
        }
    }
    // SAFETY: the caller's arguments as they are.
    unsafe { sys::ioctl(fd, request, arg) }
}

/// Answers a scan of a task that something is hidden of: the number of regions and `walk_end`.
/// `None` if it is to be left alone.
fn hidden_scan(fd: c_int, asked: &ScanArg) -> Option<Result<(c_int, u64), ()>> {
    let kind = asked.kind()?;
    let orders = state::orders()?;
    let pid = link::pid_of_pagemap(fd)?;
    if kind == Kind::Pages {
        report::add(f::SCANS, 1);
    }
    let ranges = orders.task(pid)?.ranges;
    let found = scan::around(asked, kind, ranges, |part| {
        // SAFETY: a part of what the caller asked for, with room in its vector as it said.
        let regions = unsafe { sys::ioctl(fd, PAGEMAP_SCAN.into(), (&raw mut *part).cast()) };
        u64::try_from(regions).map_err(|_| ())
    });
    Some(found.map(|found| {
        if found.skipped > 0 {
            match kind {
                Kind::Pages => {
                    report::add(f::SCANS_HIDDEN, 1);
                    report::add(f::BYTES_HIDDEN, found.skipped);
                }
                Kind::Guards => report::add(f::GUARD_SCANS_HIDDEN, 1),
            }
        }
        (c_int::try_from(found.regions).unwrap_or(c_int::MAX), found.walk_end)
    }))
}

/// Opens `path`, or the copy of smaps that stands for it.
unsafe fn open(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: the caller hands a path that the kernel would read to its end.
    if state::is_active() && unsafe { sys::is_string(path, b"smaps") } && link::is_read(flags) {
        let copy = state::orders().and_then(|orders| state::smaps(&orders, link::pid_of_dir(dir)?));
        match copy {
            Some(copy) => {
                report::add(f::SMAPS_GIVEN, 1);
                return copy;
            }
            None => report::add(f::SMAPS_REAL, 1),
        }
    }
    // SAFETY: the caller's arguments as they are.
    unsafe { sys::openat(dir, path, flags, mode) }
}

/// `openat` of the C library. `mode` is read by the kernel only where the flags ask for it.
///
/// # Safety
/// As there.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn openat(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: c_uint,
) -> c_int {
    // SAFETY: the caller's arguments as they are.
    unsafe { open(dir, path, flags, mode) }
}

/// `openat64` of the C library: what programs with large files call.
///
/// # Safety
/// As [`openat`].
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: c_uint,
) -> c_int {
    // SAFETY: the caller's arguments as they are.
    unsafe { open(dir, path, flags | libc::O_LARGEFILE, mode) }
}

/// `__openat_2` of the C library: what programs built with fortification call.
///
/// # Safety
/// As [`openat`], without a file being made.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's arguments as they are.
    unsafe { open(dir, path, flags, 0) }
}

/// `__openat64_2` of the C library: both of the above.
///
/// # Safety
/// As [`openat`], without a file being made.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's arguments as they are.
    unsafe { open(dir, path, flags | libc::O_LARGEFILE, 0) }
}
