//! The shared memory that pages lie in: an index that every user maps, and files for the data.
//!
//! ```text
//!  index (memory file)                            data (memory file)      spill (unlinked file)
//! ┌────────┬────────────┬───────────┬─────────┐  ┌──────────┬─────────┐  ┌──────────┬─────────┐
//! │ header │ hash table │ per chunk │ per     │  │ chunk 0  │ chunk 1 │  │ chunk 0  │ chunk 1 │
//! │ limits │ (space,    │ key, bits │ page    │  │ 2 MB     │         │  │          │         │
//! │ counts │  addr>>21) │           │ hash    │  └──────────┴─────────┘  └──────────┴─────────┘
//! └────────┴────────────┴───────────┴─────────┘   a page lies in one of them, at the same offset
//! ```
//!
//! All of it is sparse: what is not used takes no room, so the table never has to grow. Whoever
//! changes it may be killed between any two writes; the order of the writes keeps it whole.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use super::bits::{self, Bits, CHUNK_PAGES};
use super::sys::{self, Map};
use super::{Limits, StoreError};
use crate::pages::PAGE;

/// Size of a chunk, bytes.
pub(in crate::pages) const CHUNK: u64 = CHUNK_PAGES as u64 * PAGE;

const MAGIC: u64 = u64::from_le_bytes(*b"ferrypag");
const VERSION: u64 = 1;
const HEADER: u64 = 4096;
/// Words kept of one chunk: its key, flags, and five sets of bits.
const CHUNK_WORDS: u64 = 48;
const HASH: u64 = 16;

/// Words of the header.
#[derive(Clone, Copy)]
pub(in crate::pages) enum Word {
    Magic,
    Version,
    MaxChunks,
    MaxPages,
    /// Pages that may lie in memory.
    MemoryPages,
    /// Pages that may lie on disk.
    DiskPages,
    /// Not zero: complete, nothing may be written.
    Sealed,
    /// Chunks handed out so far.
    Chunks,
    /// Pages in the store; kept by the writer, for those who look.
    Pages,
    /// Those of them that lie on disk.
    Spilled,
}

/// Sets of bits that each chunk has, one bit for each page.
#[derive(Clone, Copy)]
pub(in crate::pages) enum Set {
    /// The page is there, with its hash.
    Present,
    /// It lies on disk.
    Spilled,
    /// The task itself (not a child it forked) needs it no more. A hint.
    Done,
    /// It should be filled first.
    Hot,
    /// A forked child does not get it.
    Wiped,
}

/// The files of a store, as they are handed from process to process.
#[derive(Debug)]
pub(in crate::pages) struct Files {
    pub(in crate::pages) index: File,
    pub(in crate::pages) data: File,
    pub(in crate::pages) spill: Option<File>,
}

/// A store's shared memory as this process sees it.
pub(in crate::pages) struct Arena {
    pub(in crate::pages) files: Files,
    map: Map,
    max_chunks: u64,
    slots: u64,
}

/// Chunks that a store of at most `max_pages` may have. Sparse memory needs more chunks than full
/// ones would make.
fn max_chunks(max_pages: u64) -> u64 {
    max_pages.div_ceil(u64::from(CHUNK_PAGES)).saturating_mul(4).saturating_add(16384).min(1 << 24)
}

fn slots(max_chunks: u64) -> u64 {
    (max_chunks * 2).next_power_of_two()
}

fn index_bytes(max_chunks: u64) -> u64 {
    HEADER + slots(max_chunks) * 4 + max_chunks * (CHUNK_WORDS * 8 + u64::from(CHUNK_PAGES) * HASH)
}

impl Arena {
    /// Makes the shared memory of a new store.
    pub(in crate::pages) fn create(limits: &Limits) -> io::Result<Self> {
        let chunks = max_chunks(limits.max_pages);
        let name = |name: &'static CStr, len| sys::memory_file(name, len);
        let files = Files {
            index: name(c"ferry-index", index_bytes(chunks))?,
            data: name(c"ferry-pages", chunks * CHUNK)?,
            spill: match limits.disk {
                0 => None,
                _ => Some(sys::unnamed_file(&limits.spill_dir, chunks * CHUNK)?),
            },
        };
        let arena = Self {
            map: Map::new(&files.index, index_bytes(chunks), true)?,
            files,
            max_chunks: chunks,
            slots: slots(chunks),
        };
        for (word, value) in [
            (Word::MaxChunks, chunks),
            (Word::MaxPages, limits.max_pages),
            (Word::MemoryPages, limits.memory / PAGE),
            (Word::DiskPages, limits.disk / PAGE),
            (Word::Version, VERSION),
            (Word::Magic, MAGIC),
        ] {
            arena.word(word).store(value, Ordering::Release);
        }
        Ok(arena)
    }

    /// Maps the files of a store that another process has made: index, data and maybe spill.
    pub(in crate::pages) fn attach(fds: Vec<OwnedFd>) -> Result<Self, StoreError> {
        let mut fds = fds.into_iter().map(File::from);
        let (Some(index), Some(data)) = (fds.next(), fds.next()) else {
            return Err(StoreError::Foreign);
        };
        let files = Files { index, data, spill: fds.next() };
        let head = Map::new(&files.index, HEADER, false)?;
        let head = head.words(0, HEADER / 8);
        let read = |word: Word| head[word as usize].load(Ordering::Acquire);
        let chunks = read(Word::MaxChunks);
        let len = files.index.metadata()?.len();
        let right = read(Word::Magic) == MAGIC && read(Word::Version) == VERSION;
        if !right || chunks > 1 << 24 || len != index_bytes(chunks) {
            return Err(StoreError::Foreign);
        }
        let map = Map::new(&files.index, len, true)?;
        Ok(Self { files, map, max_chunks: chunks, slots: slots(chunks) })
    }

    /// Descriptors of the files: index, data and maybe spill.
    pub(in crate::pages) fn descriptors(&self) -> Vec<RawFd> {
        let files = [Some(&self.files.index), Some(&self.files.data), self.files.spill.as_ref()];
        files.into_iter().flatten().map(AsRawFd::as_raw_fd).collect()
    }

    /// A word of the header.
    pub(in crate::pages) fn word(&self, word: Word) -> &AtomicU64 {
        &self.map.words(word as u64 * 8, 1)[0]
    }

    /// The value of a word of the header.
    pub(in crate::pages) fn get(&self, word: Word) -> u64 {
        self.word(word).load(Ordering::Acquire)
    }

    /// How many chunks have been handed out. Some may be empty.
    pub(in crate::pages) fn chunks(&self) -> u32 {
        self.get(Word::Chunks).min(self.max_chunks) as u32
    }

    /// Bytes that a mapping of the data, or of the spill file, must have.
    pub(in crate::pages) fn data_bytes(&self) -> u64 {
        self.max_chunks * CHUNK
    }

    fn chunk(&self, chunk: u32) -> &[AtomicU64] {
        let at = HEADER + self.slots * 4 + u64::from(chunk) * CHUNK_WORDS * 8;
        self.map.words(at, CHUNK_WORDS)
    }

    /// Space and index (address / 2 MB) of a chunk.
    pub(in crate::pages) fn key(&self, chunk: u32) -> (u32, u64) {
        let words = self.chunk(chunk);
        (words[0].load(Ordering::Acquire) as u32, words[1].load(Ordering::Acquire))
    }

    /// Whether the data of a chunk has been given back.
    pub(in crate::pages) fn is_freed(&self, chunk: u32) -> bool {
        self.chunk(chunk)[2].load(Ordering::Acquire) != 0
    }

    /// Says that the data of a chunk is about to be given back: nobody needs it any more.
    pub(in crate::pages) fn set_freed(&self, chunk: u32) {
        self.chunk(chunk)[2].store(1, Ordering::Release);
    }

    /// One set of bits of a chunk.
    pub(in crate::pages) fn set(&self, chunk: u32, set: Set) -> &[AtomicU64] {
        let from = 8 + set as usize * 8;
        &self.chunk(chunk)[from..from + 8]
    }

    /// A private copy of a set of bits of a chunk.
    pub(in crate::pages) fn bits(&self, chunk: u32, set: Set) -> Bits {
        bits::load(self.set(chunk, set))
    }

    /// The hash of a page, as two words.
    pub(in crate::pages) fn hash(&self, chunk: u32, page: u32) -> &[AtomicU64] {
        let hashes = HEADER + self.slots * 4 + self.max_chunks * CHUNK_WORDS * 8;
        let page = u64::from(chunk) * u64::from(CHUNK_PAGES) + u64::from(page);
        self.map.words(hashes + page * HASH, 2)
    }

    fn slot(&self, at: u64) -> &std::sync::atomic::AtomicU32 {
        &self.map.halves(HEADER + (at & (self.slots - 1)) * 4, 1)[0]
    }

    /// The chunk of `space` that begins at `index` times 2 MB, or the slot where it belongs.
    fn probe(&self, space: u32, index: u64) -> Result<u32, u64> {
        let mut at = mix(index ^ (u64::from(space) << 40));
        loop {
            match self.slot(at).load(Ordering::Acquire) {
                0 => return Err(at),
                found
                    if u64::from(found) <= self.max_chunks
                        && self.key(found - 1) == (space, index) =>
                {
                    return Ok(found - 1);
                }
                _ => at = at.wrapping_add(1),
            }
        }
    }

    /// The chunk of `space` that begins at `index` times 2 MB.
    pub(in crate::pages) fn find(&self, space: u32, index: u64) -> Option<u32> {
        self.probe(space, index).ok()
    }

    /// That chunk, made if there is none. Only the writer may call this.
    pub(in crate::pages) fn find_or_add(&self, space: u32, index: u64) -> Result<u32, StoreError> {
        let at = match self.probe(space, index) {
            Ok(chunk) => return Ok(chunk),
            Err(at) => at,
        };
        let chunk = self.get(Word::Chunks);
        if chunk >= self.max_chunks {
            return Err(StoreError::Full { limit: "max_pages", value: self.get(Word::MaxPages) });
        }
        // Counted, then described, then found: killed in between, an empty chunk is lost.
        self.word(Word::Chunks).store(chunk + 1, Ordering::Release);
        let words = self.chunk(chunk as u32);
        words[0].store(u64::from(space), Ordering::Release);
        words[1].store(index, Ordering::Release);
        self.slot(at).store(chunk as u32 + 1, Ordering::Release);
        Ok(chunk as u32)
    }

    /// The file that holds a page, by whether it was spilled.
    pub(in crate::pages) fn file(&self, spilled: bool) -> io::Result<&File> {
        match spilled {
            false => Ok(&self.files.data),
            true => self.files.spill.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into()),
        }
    }
}

/// Spreads keys over the table.
fn mix(key: u64) -> u64 {
    let key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ (key >> 31)
}
