//! Copies of our userfaultfds in a process that has inherited them.
#![allow(unsafe_code)] // kcmp(2) has no safe wrapper.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::LINK;

/// `KCMP_FILE`.
const KCMP_FILE: libc::c_int = 0;

/// The descriptors of process `pid` that are copies of one of `known`. None when it is gone.
pub(super) fn copies(pid: i32, known: &[BorrowedFd<'_>]) -> Vec<i32> {
    if known.is_empty() {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let userfaultfds = entries.flatten().filter_map(|entry| {
        let is_one = fs::read_link(entry.path()).ok()?.as_os_str() == LINK;
        is_one.then_some(())?;
        entry.file_name().to_str()?.parse::<i32>().ok()
    });
    userfaultfds.filter(|fd| known.iter().any(|k| same_file(pid, *fd, *k))).collect()
}

fn same_file(pid: i32, theirs: i32, ours: BorrowedFd<'_>) -> bool {
    // SAFETY: the call takes numbers only.
    let order = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid,
            std::process::id(),
            KCMP_FILE,
            theirs.cast_unsigned() as libc::c_ulong,
            ours.as_raw_fd().cast_unsigned() as libc::c_ulong,
        )
    };
    order == 0
}
