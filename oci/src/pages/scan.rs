//! Which pages of a process exist and which were written: `PAGEMAP_SCAN` and `/proc/PID/pagemap`.
//!
//! One walk of the kernel over its page tables answers for a whole range. Two forms are used:
//!
//! - [`Pagemap::present`] lists every page that has contents. It can protect what it lists against
//!   writing in the same step. About 2 ms for a GB.
//! - [`Pagemap::unprotected`] takes the kernel's short cut of about 0.4 ms for a GB: it lists what is
//!   not write-protected, and cannot tell a page that was written from one that does not exist.
#![allow(unsafe_code)] // ioctl(2) has no safe wrapper for PAGEMAP_SCAN.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::PAGE;

/// The area is registered for asynchronous write protection.
const WPALLOWED: u64 = 1;
/// Not write-protected.
const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
/// Maps the zero page.
const PFNZERO: u64 = 1 << 5;
const GUARD: u64 = 1 << 8;

/// Protect what is listed.
const WP_MATCHING: u64 = 1;
/// Fail with EPERM when an area is not registered.
const CHECK_WPASYNC: u64 = 1 << 1;

/// Most regions that one call gives, 384 KB of them.
const REGIONS: usize = 16384;

/// Words of the pagemap that are read at once, 512 KB of them.
const WORDS: usize = 65536;

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RawRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl =
    (3 << 30 | (size_of::<ScanArg>() << 16) | (b'f' as usize) << 8 | 16) as libc::Ioctl;

/// Neighbouring pages of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Addresses, page aligned.
    pub range: Range<u64>,
    /// Written since they were last protected, or in an area where nothing is protected.
    pub written: bool,
}

/// How to list pages that are present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Look only.
    Look,
    /// Protect what was written as it is listed, in one step, so that no write can fall between.
    /// Fails with EPERM when part of the range is not registered; then some pages may have been
    /// protected and all of them must be taken as written.
    Protect,
}

/// `/proc/PID/pagemap` of one process: of the memory that it has when this is opened.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens it. An exec makes it useless: open it anew for every round.
    ///
    /// # Errors
    /// When the process is gone or may not be looked into.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self { file: File::open(format!("/proc/{pid}/pagemap"))? })
    }

    /// Adds to `regions` every page of `range` that has contents: in memory or swapped, but neither
    /// the zero page nor a guard page.
    ///
    /// # Errors
    /// EPERM as [`Mode::Protect`] says. `regions` may have grown then.
    pub fn present(
        &self,
        range: Range<u64>,
        mode: Mode,
        regions: &mut Vec<Region>,
    ) -> io::Result<()> {
        let without = if lists_guards() { PFNZERO | GUARD } else { PFNZERO };
        let mut arg = ScanArg {
            flags: if mode == Mode::Protect { WP_MATCHING | CHECK_WPASYNC } else { 0 },
            category_inverted: without,
            category_mask: without,
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: WPALLOWED | WRITTEN,
            ..ScanArg::default()
        };
        self.scan(range, &mut arg, |raw| {
            let written = raw.categories & (WRITTEN | WPALLOWED) != WPALLOWED;
            regions.push(Region { range: raw.start..raw.end, written });
        })
    }

    /// Adds to `ranges` every page of `range` that belongs to no file: of a private mapping, those that
    /// were changed.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn own(&self, range: Range<u64>, ranges: &mut Vec<Range<u64>>) -> io::Result<()> {
        let mut arg = ScanArg {
            category_inverted: PFNZERO | FILE,
            category_mask: PFNZERO | FILE,
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: PRESENT,
            ..ScanArg::default()
        };
        self.scan(range, &mut arg, |raw| ranges.push(raw.start..raw.end))
    }

    /// Adds to `ranges` the guard pages of `range`, where the kernel can [list them](lists_guards). About
    /// 1.3 ms for a GB.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn guards(&self, range: Range<u64>, ranges: &mut Vec<Range<u64>>) -> io::Result<()> {
        let mut arg = ScanArg { category_mask: GUARD, return_mask: GUARD, ..ScanArg::default() };
        self.scan(range, &mut arg, |raw| ranges.push(raw.start..raw.end))
    }

    /// Adds to `ranges` what is not write-protected in `range`: pages that were written, guard pages, and
    /// pages that do not exist. Where there is not even a page table older kernels list nothing, so that a
    /// page that is known and not listed may have vanished with its table.
    ///
    /// # Errors
    /// EPERM when part of the range is not registered.
    pub fn unprotected(&self, range: Range<u64>, ranges: &mut Vec<Range<u64>>) -> io::Result<()> {
        // Exactly these masks make the kernel take its short cut.
        let mut arg = ScanArg {
            flags: CHECK_WPASYNC,
            category_mask: WRITTEN,
            return_mask: WRITTEN,
            ..ScanArg::default()
        };
        self.scan(range, &mut arg, |raw| ranges.push(raw.start..raw.end))
    }

    /// Whether the area at `address`, which must be in one, is registered for asynchronous write
    /// protection.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn is_registered(&self, address: u64) -> io::Result<bool> {
        let mut arg = ScanArg {
            flags: CHECK_WPASYNC,
            category_mask: WRITTEN,
            return_mask: WRITTEN,
            ..ScanArg::default()
        };
        match self.scan(address..address + PAGE, &mut arg, |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn scan(
        &self,
        range: Range<u64>,
        arg: &mut ScanArg,
        mut found: impl FnMut(&RawRegion),
    ) -> io::Result<()> {
        let pages = ((range.end - range.start) / PAGE) as usize;
        let mut buffer: Vec<RawRegion> = Vec::with_capacity(REGIONS.min(pages).max(1));
        let mut start = range.start;
        while start < range.end {
            arg.size = size_of::<ScanArg>() as u64;
            (arg.start, arg.end, arg.walk_end) = (start, range.end, 0);
            arg.vec = buffer.as_mut_ptr() as u64;
            arg.vec_len = buffer.capacity() as u64;
            // SAFETY: `arg` is the structure that the call takes, and names a buffer with room for
            // `vec_len` regions that lives longer than the call.
            let filled = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut *arg) };
            let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
            // SAFETY: the kernel has filled so many regions, at most `vec_len`.
            unsafe { buffer.set_len(filled) };
            buffer.iter().for_each(&mut found);
            if arg.walk_end <= start {
                return Err(io::Error::other("pagemap scan does not advance"));
            }
            start = arg.walk_end;
        }
        Ok(())
    }

    /// The same as [`Pagemap::present`] read word by word, for kernels without `PAGEMAP_SCAN`. Takes
    /// 4 ms for a GB of addresses, whether there are pages or not. A region counts as written when its
    /// soft-dirty bits are set, which on a kernel without such bits they are not.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn present_by_words(&self, range: Range<u64>, regions: &mut Vec<Region>) -> io::Result<()> {
        let mut entries = vec![Entry::default(); WORDS];
        let zero = zero_frame();
        let mut address = range.start;
        while address < range.end {
            let count = WORDS.min(((range.end - address) / PAGE) as usize);
            self.entries(address, &mut entries[..count])?;
            for entry in &entries[..count] {
                push(regions, address, *entry, zero);
                address += PAGE;
            }
        }
        Ok(())
    }

    /// The entries of the pages from `address` on, as many as `entries` has room for.
    ///
    /// # Errors
    /// When the process is gone, or addresses are beyond its end.
    pub fn entries(&self, address: u64, entries: &mut [Entry]) -> io::Result<()> {
        let mut bytes = vec![0; entries.len() * 8];
        self.file.read_exact_at(&mut bytes, address / PAGE * 8)?;
        for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
            *entry = Entry(u64::from_ne_bytes(bytes.try_into().unwrap_or_default()));
        }
        Ok(())
    }

    /// Whether the page at `address` exists, in memory or swapped.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn exists(&self, address: u64) -> io::Result<bool> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, address / PAGE * 8)?;
        Ok(Entry(u64::from_ne_bytes(bytes)).exists())
    }
}

/// Adds the page at `address` if it has contents.
fn push(regions: &mut Vec<Region>, address: u64, entry: Entry, zero: Option<u64>) {
    let is_zero = entry.frame().is_some_and(|frame| frame != 0 && Some(frame) == zero);
    if !entry.exists() || entry.guard() || is_zero {
        return;
    }
    let written = entry.soft_dirty();
    match regions.last_mut() {
        Some(last) if last.range.end == address && last.written == written => {
            last.range.end = address + PAGE;
        }
        _ => regions.push(Region { range: address..address + PAGE, written }),
    }
}

/// Frame of the zero page; none when frames may not be seen.
fn zero_frame() -> Option<u64> {
    static ZERO: OnceLock<Option<u64>> = OnceLock::new();
    *ZERO.get_or_init(|| {
        // Memory that was read and never written is the zero page.
        let memory = vec![0u8; 4 * PAGE as usize];
        let address = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let at = (address - memory.as_ptr() as u64) as usize;
        std::hint::black_box(memory[at]);
        let mut entries = [Entry::default()];
        let pagemap = Pagemap::open(std::process::id().cast_signed()).ok()?;
        pagemap.entries(address, &mut entries).ok()?;
        entries[0].frame().filter(|frame| *frame != 0)
    })
}

/// One word of `/proc/PID/pagemap`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(pub u64);

impl Entry {
    /// In memory or swapped.
    pub fn exists(self) -> bool {
        self.0 >> 62 != 0
    }

    /// Written since the bits were last cleared by `/proc/PID/clear_refs`.
    pub fn soft_dirty(self) -> bool {
        self.0 >> 55 & 1 != 0
    }

    /// A guard page, which reads as swapped.
    pub fn guard(self) -> bool {
        self.0 >> 58 & 1 != 0
    }

    /// Frame of a page in memory. 0 without CAP_SYS_ADMIN.
    pub fn frame(self) -> Option<u64> {
        (self.0 >> 63 != 0).then_some(self.0 & ((1 << 55) - 1))
    }
}

/// Whether the kernel has `PAGEMAP_SCAN` (6.7).
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| accepts(PRESENT))
}

/// Whether it lists guard pages (6.15).
pub fn lists_guards() -> bool {
    static GUARDS: OnceLock<bool> = OnceLock::new();
    *GUARDS.get_or_init(|| accepts(GUARD))
}

/// Whether the kernel takes `category`: scans one page of this process.
fn accepts(category: u64) -> bool {
    let Ok(pagemap) = Pagemap::open(std::process::id().cast_signed()) else {
        return false;
    };
    let mut arg =
        ScanArg { category_anyof_mask: category, return_mask: category, ..ScanArg::default() };
    let page = (&raw const arg as u64) & !(PAGE - 1);
    pagemap.scan(page..page + PAGE, &mut arg, |_| {}).is_ok()
}
