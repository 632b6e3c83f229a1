//! The page store: memory of a container that is on its way, on the destination.
//!
//! The agent writes pages into it while the container still runs elsewhere; the page daemon
//! ([`crate::pages::daemon`]) hands them to the restored processes. It lies in shared memory that the
//! daemon's keeper owns, so it survives the agent: an attempt that comes after it takes over what is there.
//!
//! A page is named by its *space* (the task's process id in the container) and its address. A page
//! that is not in the store is a page of zeros. Pages beyond [`Limits::memory`] lie in a file without
//! a name on disk.
//!
//! **Killed while it writes**, a writer leaves no torn page that counts: the page's bit is cleared,
//! then come data and hash, then the bit is set. What the disk or the memory did meanwhile is found by
//! [`Store::verify`].

mod arena;
pub(in crate::pages) mod bits;
mod hashes;
pub(in crate::pages) mod sys;
mod write;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub(in crate::pages) use arena::{Arena, CHUNK, Set, Word};
pub use hashes::Hashes;

use crate::pages::PAGE;

/// What a store may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of pages in memory. What is beyond lies on disk.
    pub memory: u64,
    /// Bytes of pages on disk.
    pub disk: u64,
    /// Pages altogether. Bounds the index too, which takes 17 bytes for each.
    pub max_pages: u64,
    /// How long a store is kept that nobody writes to and nobody is served from.
    pub expiry: Duration,
    /// Folder of the file for pages on disk.
    pub spill_dir: PathBuf,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: 8 << 30,
            disk: 64 << 30,
            max_pages: (256 << 30) / PAGE,
            expiry: Duration::from_secs(15 * 60),
            spill_dir: PathBuf::from("/var/lib/ferry/spill"),
        }
    }
}

/// Why the store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A limit would be exceeded. Nothing of the page in question was written.
    #[error("page store is full: {limit} allows {value}")]
    Full {
        /// The limit: `memory + disk` (bytes) or `max_pages` (pages).
        limit: &'static str,
        /// Its value.
        value: u64,
    },
    /// The memory has been declared complete, or is being served.
    #[error("page store is complete and takes no more pages")]
    Sealed,
    /// Address or length is not a multiple of the page size, or beyond any address space.
    #[error("range {addr:#x} + {len:#x} is not made of whole pages")]
    Unaligned {
        /// The address.
        addr: u64,
        /// The length, bytes.
        len: u64,
    },
    /// The files are not those of a page store of this version.
    #[error("not a page store of this version")]
    Foreign,
    /// The system refused.
    #[error("page store: {0}")]
    Io(#[from] io::Error),
}

/// The writer's side of a page store. There is one at most at any time.
pub struct Store {
    arena: Arena,
    /// Pages in memory and on disk.
    memory: u64,
    disk: u64,
    /// Keeps the role of the writer for as long as the store is open.
    lease: Option<OwnedFd>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("memory", &self.memory).field("disk", &self.disk).finish()
    }
}

impl Store {
    /// Makes a store of this process's own, that ends with it.
    ///
    /// # Errors
    /// When memory or the file for pages on disk cannot be had.
    pub fn create(limits: &Limits) -> Result<Self, StoreError> {
        Ok(Self::over(Arena::create(limits)?, None))
    }

    /// Opens a store by its files; `lease` is closed when it is dropped.
    pub(in crate::pages) fn attach(fds: Vec<OwnedFd>, lease: OwnedFd) -> Result<Self, StoreError> {
        Ok(Self::over(Arena::attach(fds)?, Some(lease)))
    }

    fn over(arena: Arena, lease: Option<OwnedFd>) -> Self {
        let mut store = Self { arena, memory: 0, disk: 0, lease };
        // Counted anew: a writer that was killed may have left a wrong count.
        for chunk in 0..store.arena.chunks() {
            let present = store.arena.bits(chunk, Set::Present);
            let spilled = store.arena.bits(chunk, Set::Spilled);
            for (present, spilled) in present.iter().zip(spilled) {
                store.memory += u64::from((present & !spilled).count_ones());
                store.disk += u64::from((present & spilled).count_ones());
            }
        }
        store.publish();
        store
    }

    /// Pages in the store.
    pub fn pages(&self) -> u64 {
        self.memory + self.disk
    }

    /// Bytes of pages in the store, in memory and on disk.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE
    }

    /// The connection that keeps the role of the writer.
    pub(in crate::pages) fn lease(&self) -> Option<&OwnedFd> {
        self.lease.as_ref()
    }

    /// Tells those who look how much there is.
    fn publish(&self) {
        self.arena.word(Word::Pages).store(self.pages(), Ordering::Relaxed);
        self.arena.word(Word::Spilled).store(self.disk, Ordering::Relaxed);
    }
}

/// The hash that a page is compared by: XXH3, 128 bits, little-endian.
pub fn hash(page: &[u8]) -> [u8; 16] {
    twox_hash::XxHash3_128::oneshot(page).to_le_bytes()
}
