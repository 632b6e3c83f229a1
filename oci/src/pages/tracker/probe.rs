//! What the kernel offers to track writes with, found out by trying it on this process.
#![allow(unsafe_code)] // A page is mapped, and a userfaultfd made, to be tried on.

use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::Kind;
use super::uffd::Uffd;
use crate::pages::PAGE;
use crate::pages::scan::{Entry, Mode, Pagemap, Region};

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Writes can be noted by asynchronous write protection.
    pub write_protect: bool,
    /// Writes can be noted by soft-dirty bits.
    pub soft_dirty: bool,
    /// Why write protection cannot be used; empty when it can.
    pub write_protect_why: String,
    /// Why soft-dirty bits cannot be used; empty when they can.
    pub soft_dirty_why: String,
}

impl Probe {
    /// The best of what there is.
    pub fn best(&self) -> Kind {
        match self {
            Self { write_protect: true, .. } => Kind::WriteProtect,
            Self { soft_dirty: true, .. } => Kind::SoftDirty,
            _ => Kind::None,
        }
    }
}

/// Tries both ways on a page of this process. Takes less than 1 ms and changes nothing.
pub fn probe() -> Probe {
    let write_protect = try_write_protect();
    let soft_dirty = try_soft_dirty();
    let why = |outcome: &Result<(), String>| outcome.clone().err().unwrap_or_default();
    Probe {
        write_protect: write_protect.is_ok(),
        soft_dirty: soft_dirty.is_ok(),
        write_protect_why: why(&write_protect),
        soft_dirty_why: why(&soft_dirty),
    }
}

fn try_write_protect() -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        return Err("not supported on this architecture".into());
    }
    let uffd = userfaultfd().map_err(|e| format!("userfaultfd: {e}"))?;
    let uffd = Uffd::new(uffd).map_err(|e| format!("userfaultfd without WP_ASYNC: {e}"))?;
    let mut page = Area::map(PAGE as usize).map_err(|e| format!("mmap: {e}"))?;
    page.write(1);
    uffd.register(&page.range()).map_err(|e| format!("userfaultfd register: {e}"))?;
    let mut rounds = Vec::new();
    for round in 0..3u8 {
        // The third round is one with a write before it.
        if round == 2 {
            page.write(round);
        }
        let mut regions = Vec::new();
        own_pagemap()
            .and_then(|p| p.present(page.range(), Mode::Protect, &mut regions))
            .map_err(|e| format!("PAGEMAP_SCAN: {e}"))?;
        rounds.push(regions.as_slice() == [Region { range: page.range(), written: true }]);
    }
    match rounds.as_slice() {
        [true, false, true] => Ok(()),
        other => Err(format!("a written page was reported as {other:?}")),
    }
}

/// Whether [`Pagemap::unprotected`] lists what has no page table. Not every kernel does.
pub(super) fn lists_missing_tables() -> bool {
    static LISTS: OnceLock<bool> = OnceLock::new();
    *LISTS.get_or_init(|| {
        // So large that one of its tables at least has no page of anybody.
        let (Ok(area), Ok(uffd)) = (Area::map(8 << 20), userfaultfd().and_then(Uffd::new)) else {
            return false;
        };
        let mut listed = Vec::new();
        uffd.register(&area.range()).is_ok()
            && own_pagemap().and_then(|p| p.unprotected(area.range(), &mut listed)).is_ok()
            && listed.iter().map(|r| r.end - r.start).sum::<u64>() == 8 << 20
    })
}

fn try_soft_dirty() -> Result<(), String> {
    let mut page = Area::map(PAGE as usize).map_err(|e| format!("mmap: {e}"))?;
    page.write(1);
    let mut entries = [Entry::default()];
    own_pagemap()
        .and_then(|p| p.entries(page.range().start, &mut entries))
        .map_err(|e| format!("pagemap: {e}"))?;
    // A page that was just made counts as written.
    if entries[0].soft_dirty() {
        Ok(())
    } else {
        Err("the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)".into())
    }
}

fn own_pagemap() -> io::Result<Pagemap> {
    Pagemap::open(std::process::id().cast_signed())
}

fn userfaultfd() -> io::Result<OwnedFd> {
    /// `UFFD_USER_MODE_ONLY`.
    const USER_MODE_ONLY: libc::c_int = 1;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: the call takes a number and gives a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Anonymous memory of this process that nobody else uses.
struct Area {
    start: *mut u8,
    bytes: usize,
}

impl Area {
    fn map(bytes: usize) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), bytes })
    }

    /// Writes to the first page.
    fn write(&mut self, value: u8) {
        // SAFETY: the memory is mapped and writable, and only this holds it.
        unsafe { self.start.write_volatile(value) }
    }

    fn range(&self) -> Range<u64> {
        let start = self.start as u64;
        start..start + self.bytes as u64
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_one_of_the_ways_or_says_why_not() {
        let probe = probe();
        assert_eq!(probe.write_protect, probe.write_protect_why.is_empty(), "{probe:?}");
        assert_eq!(probe.soft_dirty, probe.soft_dirty_why.is_empty(), "{probe:?}");
        if probe.write_protect {
            assert_eq!(probe.best(), Kind::WriteProtect);
        } else {
            println!("skipped: write_protect: {}", probe.write_protect_why);
        }
    }

    #[test]
    fn kinds_are_named_in_lower_case() {
        let names = serde_json::to_string(&[Kind::WriteProtect, Kind::SoftDirty, Kind::None]);
        assert_eq!(names.unwrap(), r#"["write-protect","soft-dirty","none"]"#);
    }
}
