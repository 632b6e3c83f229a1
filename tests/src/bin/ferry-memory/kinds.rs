//! The kinds of memory a process can have.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use crate::area::{Area, file_page};
use crate::pattern::PAGE;
use crate::sys::{self, Memory};

/// Pages of a huge page.
const HUGE: usize = 512;

/// Most pages of [`Kind::Changing`].
pub(crate) const MOST_CHANGING: usize = 64;
/// Pages of [`Kind::TmpfsFile`]: ferry carries what is small.
const MOST_IN_TMPFS: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Every page written.
    Dense,
    /// One page of 16 written.
    Sparse,
    ReadOnly,
    /// Protection NONE.
    NoAccess,
    /// Three areas side by side, the one in the middle read-only.
    Adjacent,
    /// A file mapped privately, pages of it changed.
    File,
    /// Locked in memory.
    Locked,
    /// From the pool of huge pages.
    HugeTlb,
    /// Anonymous, shared with children.
    Shared,
    /// A file that is only memory, shared with children.
    MemoryFile,
    /// A file in a file system in memory, shared with children.
    TmpfsFile,
    /// Some pages are guards.
    Guarded,
    /// Huge pages where the kernel has them at hand.
    HugePages,
    /// Children do not inherit it.
    NotForked,
    /// The heap.
    Heap,
    /// Replaced, moved and resized again and again.
    Changing,
    /// The stack of a thread.
    Stack,
}

impl Kind {
    /// All that [`make`] makes.
    pub(crate) const ALL: [Self; 16] = [
        Self::Dense,
        Self::Sparse,
        Self::ReadOnly,
        Self::NoAccess,
        Self::Adjacent,
        Self::File,
        Self::Locked,
        Self::HugeTlb,
        Self::Shared,
        Self::MemoryFile,
        Self::TmpfsFile,
        Self::Guarded,
        Self::HugePages,
        Self::NotForked,
        Self::Heap,
        Self::Changing,
    ];

    /// How far apart pages are that are written.
    pub(crate) fn stride(self) -> usize {
        if self == Self::Sparse { 16 } else { 1 }
    }

    pub(crate) fn is_shared(self) -> bool {
        matches!(self, Self::Shared | Self::MemoryFile | Self::TmpfsFile)
    }

    /// Whether children have it. Copies of pages from the pool could find it empty.
    pub(crate) fn is_inherited(self) -> bool {
        !matches!(self, Self::NotForked | Self::HugeTlb | Self::Stack)
    }

    /// Whether its pages may be freed: they read as the file, or as zero, then.
    pub(crate) fn can_be_freed(self) -> bool {
        use Kind::{Changing, Dense, File, HugePages, NotForked, Sparse};
        matches!(self, Changing | Dense | File | HugePages | NotForked | Sparse)
    }

    /// Protection of `page` of `pages` while nobody writes it.
    pub(crate) fn protection(self, page: usize, pages: usize) -> i32 {
        match self {
            Self::ReadOnly => sys::READ,
            Self::NoAccess => sys::NONE,
            Self::Adjacent if (pages / 3..pages / 3 * 2).contains(&page) => sys::READ,
            _ => sys::READ_WRITE,
        }
    }
}

/// Makes an area of about `pages` pages, none of them written.
///
/// # Errors
/// When the kernel or the container has no such memory.
pub(crate) fn make(kind: Kind, id: u32, pages: usize) -> io::Result<Area> {
    let map =
        |pages, more| Memory::map(pages, sys::READ_WRITE, sys::PRIVATE | sys::ANONYMOUS | more, -1);
    let pages = match kind {
        Kind::HugeTlb => HUGE,
        Kind::HugePages => pages.next_multiple_of(HUGE) + HUGE,
        Kind::Changing => pages.min(MOST_CHANGING),
        Kind::TmpfsFile => pages.min(MOST_IN_TMPFS),
        _ => pages,
    };
    let whole = 0..pages;
    let memory = match kind {
        Kind::Dense | Kind::Changing => map(pages, 0)?,
        Kind::Sparse => map(pages, sys::NORESERVE)?,
        Kind::ReadOnly | Kind::NoAccess | Kind::Adjacent => {
            let memory = map(pages, 0)?;
            for page in whole {
                memory.protect(page..page + 1, kind.protection(page, pages))?;
            }
            memory
        }
        Kind::File => {
            let file = file(pages)?;
            Memory::map(pages, sys::READ_WRITE, sys::PRIVATE, file.as_raw_fd())?
        }
        Kind::Locked => {
            let memory = map(pages, 0)?;
            memory.lock()?;
            memory
        }
        Kind::HugeTlb => {
            let memory = map(pages, sys::HUGETLB)?;
            memory.advise(whole, sys::DONTFORK)?;
            memory
        }
        Kind::Shared => Memory::map(pages, sys::READ_WRITE, sys::SHARED | sys::ANONYMOUS, -1)?,
        Kind::MemoryFile => {
            let file = sys::memory_file()?;
            file.set_len((pages * PAGE) as u64)?;
            Memory::map(pages, sys::READ_WRITE, sys::SHARED, file.as_raw_fd())?
        }
        Kind::TmpfsFile => {
            let mut file = File::options();
            let file = file.read(true).write(true).create(true).truncate(true);
            let file = file.open(tmpfs_path(std::process::id()))?;
            file.set_len((pages * PAGE) as u64)?;
            Memory::map(pages, sys::READ_WRITE, sys::SHARED, file.as_raw_fd())?
        }
        Kind::Guarded => {
            let memory = map(pages, 0)?;
            // Asks whether the kernel knows guards.
            memory.advise(0..1, sys::GUARD_INSTALL)?;
            memory.advise(0..1, sys::GUARD_REMOVE)?;
            memory
        }
        Kind::HugePages => {
            let memory = map(pages, 0)?;
            memory.advise(whole, sys::HUGEPAGE)?;
            memory
        }
        Kind::NotForked => {
            let memory = map(pages, 0)?;
            memory.advise(whole, sys::DONTFORK)?;
            memory
        }
        Kind::Heap => Memory::by_brk(pages)?,
        Kind::Stack => return Err(io::Error::other("a stack belongs to its thread")),
    };
    let most = if kind == Kind::Changing { MOST_CHANGING } else { pages };
    Area::new(id, kind, memory, most)
}

/// Where the file of [`Kind::File`] of process `pid` is.
fn file_path(pid: u32) -> PathBuf {
    std::env::temp_dir().join(format!("ferry-memory-{pid}"))
}

/// Where that of [`Kind::TmpfsFile`] is.
fn tmpfs_path(pid: u32) -> PathBuf {
    format!("/dev/shm/ferry-memory-{pid}").into()
}

/// Removes the files of process `pid`.
pub(crate) fn remove_files(pid: u32) {
    let _ = std::fs::remove_file(file_path(pid));
    let _ = std::fs::remove_file(tmpfs_path(pid));
}

fn file(pages: usize) -> io::Result<File> {
    let path = file_path(std::process::id());
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    for page in 0..pages {
        let words = file_page(page);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        file.write_all(&bytes)?;
    }
    Ok(file)
}
