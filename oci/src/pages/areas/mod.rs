//! The memory areas of a process, and which of them CRIU may be spared.
//!
//! A page can be served after the restore only where CRIU is willing to leave it out: it restores an
//! area by userfaultfd when the area is private, anonymous, neither locked nor of huge pages, and
//! none that the kernel provides. [`Area::hideable`] is that rule, said in terms of
//! `/proc/PID/smaps`, from which CRIU reads it as well. Everything else stays in CRIU's images and
//! costs pause by its size: [`Carried`] says how much that is, and [`Usage`] how much there is at all.

mod carried;
mod parse;
#[cfg(test)]
mod tests;
mod usage;

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

pub use carried::Carried;
pub use parse::ParseError;
pub use usage::Usage;

/// Flags of an area: those of the `VmFlags` line that decide something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VmFlags(u16);

impl VmFlags {
    /// `lo`: locked by mlock(2).
    pub const LOCKED: Self = Self(1);
    /// `ht`: of huge pages (hugetlbfs, not transparent ones).
    pub const HUGETLB: Self = Self(1 << 1);
    /// `io`: memory of a device.
    pub const IO: Self = Self(1 << 2);
    /// `pf`: page frames without struct page.
    pub const PFNMAP: Self = Self(1 << 3);
    /// `dp`: pages may be dropped by the kernel at any time (`MAP_DROPPABLE`).
    pub const DROPPABLE: Self = Self(1 << 4);
    /// `gu`: may hold guard pages (`MADV_GUARD_INSTALL`).
    pub const GUARD: Self = Self(1 << 5);
    /// `ss`: a shadow stack.
    pub const SHADOW_STACK: Self = Self(1 << 6);
    /// `gd`: a stack that grows downwards.
    pub const GROWS_DOWN: Self = Self(1 << 7);

    const NAMES: [(&'static [u8], Self); 8] = [
        (b"lo", Self::LOCKED),
        (b"ht", Self::HUGETLB),
        (b"io", Self::IO),
        (b"pf", Self::PFNMAP),
        (b"dp", Self::DROPPABLE),
        (b"gu", Self::GUARD),
        (b"ss", Self::SHADOW_STACK),
        (b"gd", Self::GROWS_DOWN),
    ];

    /// Whether any of `others` is set.
    pub const fn any_of(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }

    /// Both sets together.
    pub const fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// The text after `VmFlags:`. Unknown flags are passed over.
    fn parse(text: &[u8]) -> Self {
        let mut flags = Self::default();
        for word in text.split(u8::is_ascii_whitespace) {
            if let Some((_, flag)) = Self::NAMES.iter().find(|(name, _)| *name == word) {
                flags = flags.with(*flag);
            }
        }
        flags
    }
}

/// One line of `/proc/PID/maps`, with what `smaps` adds to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// First address behind the area.
    pub end: u64,
    /// Permissions as they are printed, `rwxp` or `rwxs` with `-` for what is missing.
    pub perms: [u8; 4],
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Major and minor number of the device of the file; zeros when there is no file.
    pub dev: (u32, u32),
    /// Inode of the file; 0 when there is none.
    pub inode: u64,
    /// Path or `[name]`, as it is printed (a newline in it is `\012`); empty when there is none.
    pub name: Vec<u8>,
    /// Flags; none of them is set when the area was read from `maps`.
    pub flags: VmFlags,
    /// Resident bytes, from `smaps`.
    pub rss: u64,
    /// Resident bytes, those of a page divided by how many have it, from `smaps`.
    pub pss: u64,
    /// Swapped bytes, from `smaps`.
    pub swap: u64,
    /// Swapped bytes, divided as in `pss`, from `smaps`.
    pub swap_pss: u64,
    /// Resident bytes that belong to no file, from `smaps`.
    pub anonymous: u64,
    /// Resident bytes of huge pages (hugetlbfs), which `rss` does not count, from `smaps`.
    pub hugetlb: u64,
}

impl Area {
    /// Addresses of the area.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Mapped with `MAP_PRIVATE`. Droppable memory reads so too, and is not.
    pub fn private(&self) -> bool {
        self.perms[3] == b'p' && !self.flags.any_of(VmFlags::DROPPABLE)
    }

    /// Has no file behind it. `/dev/zero`, AIO rings, memfd, huge pages and System V memory have one.
    pub fn anonymous(&self) -> bool {
        self.dev == (0, 0) && self.inode == 0
    }

    /// Provided by the kernel, and by another kernel provided anew.
    fn special(&self) -> bool {
        let has = |wanted: &[u8]| wanted.iter().all(|p| self.perms.contains(p));
        match self.name.as_slice() {
            b"[vsyscall]" | b"[vectors]" | b"[uprobes]" => true,
            // CRIU tells these two by their protection as well as by their name.
            b"[vdso]" => has(b"rx"),
            b"[vvar]" | b"[vvar_vclock]" => has(b"r"),
            _ => false,
        }
    }

    /// Hideable as far as `maps` can tell, which does not know the flags.
    pub fn candidate(&self) -> bool {
        self.private() && self.anonymous() && !self.special()
    }

    /// Whether CRIU restores this area without its pages, by userfaultfd, so that they may be hidden
    /// from its dump. The same answer as CRIU's `vma_entry_can_be_lazy`; of areas that CRIU refuses
    /// to dump at all (memory of a device) the answer is no.
    pub fn hideable(&self) -> bool {
        const NEVER: VmFlags =
            VmFlags::LOCKED.with(VmFlags::HUGETLB).with(VmFlags::IO).with(VmFlags::PFNMAP);
        self.candidate() && !self.flags.any_of(NEVER)
    }
}

/// Whether memory of process `pid` is still to be filled by somebody: a page daemon after a restore, or
/// the process itself by a userfaultfd of its own. A dump would take what is missing for zeros.
///
/// # Errors
/// When the process is gone.
pub fn is_being_filled(pid: i32) -> io::Result<bool> {
    let smaps = std::fs::read(format!("/proc/{pid}/smaps"))?;
    Ok(has_missing(&smaps))
}

/// Looks for the flag `um`, a userfaultfd for missing pages.
fn has_missing(smaps: &[u8]) -> bool {
    let mut lines = smaps.split(|byte| *byte == b'\n');
    lines.any(|line| {
        let flags = line.strip_prefix(b"VmFlags:");
        flags.is_some_and(|flags| flags.split(u8::is_ascii_whitespace).any(|flag| flag == b"um"))
    })
}

/// The areas of one process at one moment, and the texts that they were read from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    /// Text of `/proc/PID/maps`: the first lines of the entries of `smaps`.
    pub maps: Vec<u8>,
    /// Text of `/proc/PID/smaps`.
    pub smaps: Vec<u8>,
    /// The same, parsed.
    pub areas: Vec<Area>,
}

impl Layout {
    /// Reads the areas of process `pid`. Takes about 12 ms for each GB that is resident.
    ///
    /// A process that runs may change its areas meanwhile; then the text is that of no single
    /// moment, and `maps` will differ from the real one, which is how it is noticed.
    ///
    /// # Errors
    /// When the process is gone, or the text is not understood.
    pub fn read(pid: i32) -> io::Result<Self> {
        let mut smaps = Vec::new();
        read_proc(pid, "smaps", &mut smaps)?;
        let areas = parse::smaps(&smaps).map_err(io::Error::other)?;
        Ok(Self { maps: parse::headers(&smaps), smaps, areas })
    }

    /// The hideable areas, with neighbours joined.
    pub fn hideable(&self) -> Vec<Range<u64>> {
        join(self.areas.iter().filter(|a| a.hideable()))
    }
}

/// Reads the areas of `/proc/PID/maps`, which has no flags and no sizes, and is quick (0.1 ms).
///
/// # Errors
/// When the text is not understood.
pub fn parse_maps(text: &[u8]) -> Result<Vec<Area>, ParseError> {
    parse::maps(text)
}

/// Reads the areas of `/proc/PID/smaps`.
///
/// # Errors
/// When the text is not understood.
pub fn parse_smaps(text: &[u8]) -> Result<Vec<Area>, ParseError> {
    parse::smaps(text)
}

/// Replaces `text` by that of `/proc/PID/maps`.
///
/// # Errors
/// When the process is gone.
pub fn read_maps(pid: i32, text: &mut Vec<u8>) -> io::Result<()> {
    read_proc(pid, "maps", text)
}

/// Ranges of `areas`, which are ascending, with neighbours joined.
pub(super) fn join<'a>(areas: impl Iterator<Item = &'a Area>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for area in areas {
        match runs.last_mut() {
            Some(last) if last.end == area.start => last.end = area.end,
            _ => runs.push(area.range()),
        }
    }
    runs
}

fn read_proc(pid: i32, name: &str, text: &mut Vec<u8>) -> io::Result<()> {
    text.clear();
    File::open(format!("/proc/{pid}/{name}"))?.read_to_end(text)?;
    Ok(())
}
