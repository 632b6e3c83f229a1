//! Writing into a store, and taking out again.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::bits::{self, CHUNK_PAGES};
use super::{CHUNK, Set, Store, StoreError, Word, hash, sys};
use crate::pages::PAGE;

/// Addresses below this may be used; no address space is larger.
const TOP: u64 = 1 << 57;

/// What becomes of a page that is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    Memory,
    Disk,
}

impl Store {
    /// Writes pages of `space` from `addr` on, over what is there. `data` is a multiple of 4096 bytes
    /// long. Pages of zeros take no room.
    ///
    /// # Errors
    /// [`StoreError::Full`] names the limit; pages before the one that did not fit are written.
    pub fn write(&mut self, space: u32, addr: u64, data: &[u8]) -> Result<(), StoreError> {
        check(addr, data.len() as u64)?;
        self.writable()?;
        let mut result = Ok(());
        let mut at = addr;
        let mut rest = data;
        while !rest.is_empty() && result.is_ok() {
            let first = (at % CHUNK / PAGE) as u32;
            let room = ((CHUNK_PAGES - first) as usize * PAGE as usize).min(rest.len());
            let (now, later) = rest.split_at(room);
            result = self.write_chunk(space, at / CHUNK, first, now);
            at += room as u64;
            rest = later;
        }
        self.publish();
        result
    }

    /// Writes pages that lie in one chunk, from page `first` on.
    fn write_chunk(
        &mut self,
        space: u32,
        index: u64,
        first: u32,
        data: &[u8],
    ) -> Result<(), StoreError> {
        let chunk = match self.arena.find(space, index) {
            Some(chunk) => chunk,
            None if is_zero(data) => return Ok(()),
            None => self.arena.find_or_add(space, index)?,
        };
        let page = |at: u32| &data[((at - first) as usize * PAGE as usize)..][..PAGE as usize];
        let end = first + (data.len() as u64 / PAGE) as u32;
        let mut at = first;
        while at < end {
            // A run of pages that go to the same place.
            let from = at;
            let mut fresh = 0;
            let place = self.place(chunk, at, page(at), &mut fresh)?;
            at += 1;
            while at < end && self.place(chunk, at, page(at), &mut fresh).is_ok_and(|p| p == place)
            {
                at += 1;
            }
            match place {
                Place::Nowhere => self.clear(chunk, from..at)?,
                _ => {
                    let data = &data[((from - first) as usize * PAGE as usize)..];
                    let data = &data[..(at - from) as usize * PAGE as usize];
                    self.put(chunk, from, data, place == Place::Disk)?;
                }
            }
        }
        Ok(())
    }

    /// Where a page goes. `fresh` counts pages that were given a place and are not written yet.
    fn place(
        &self,
        chunk: u32,
        page: u32,
        data: &[u8],
        fresh: &mut u64,
    ) -> Result<Place, StoreError> {
        if is_zero(data) {
            return Ok(Place::Nowhere);
        }
        if bits::has(self.arena.set(chunk, Set::Present), page) {
            let spilled = bits::has(self.arena.set(chunk, Set::Spilled), page);
            return Ok(if spilled { Place::Disk } else { Place::Memory });
        }
        let limit = |word| self.arena.get(word);
        if self.pages() + *fresh >= limit(Word::MaxPages) {
            return Err(StoreError::Full { limit: "max_pages", value: limit(Word::MaxPages) });
        }
        let place = if self.memory + *fresh < limit(Word::MemoryPages) {
            Place::Memory
        } else if self.disk + *fresh < limit(Word::DiskPages) {
            Place::Disk
        } else {
            let value = (limit(Word::MemoryPages) + limit(Word::DiskPages)) * PAGE;
            return Err(StoreError::Full { limit: "memory + disk", value });
        };
        *fresh += 1;
        Ok(place)
    }

    /// Writes a run of pages: bits off, data, hashes, bits on.
    fn put(&mut self, chunk: u32, from: u32, data: &[u8], spilled: bool) -> Result<(), StoreError> {
        let run = from..from + (data.len() as u64 / PAGE) as u32;
        self.forget(chunk, run.clone());
        point("store-after-clear");
        let at = u64::from(chunk) * CHUNK + u64::from(from) * PAGE;
        let file = self.arena.file(spilled)?;
        if cfg!(any(test, feature = "fault-points")) {
            // In two parts, so that a test can end the writer in the middle.
            let (head, tail) = data.split_at(data.len() / 2);
            file.write_all_at(head, at)?;
            point("store-in-data");
            file.write_all_at(tail, at + head.len() as u64)?;
        } else {
            // Written, not copied through a mapping: a full disk is an error then, not a signal.
            file.write_all_at(data, at)?;
        }
        point("store-after-data");
        for (page, data) in run.clone().zip(data.chunks_exact(PAGE as usize)) {
            let hash = u128::from_le_bytes(hash(data));
            let words = self.arena.hash(chunk, page);
            words[0].store(hash as u64, Ordering::Release);
            words[1].store((hash >> 64) as u64, Ordering::Release);
        }
        point("store-after-hash");
        let count = u64::from(run.end - run.start);
        if spilled {
            bits::set(self.arena.set(chunk, Set::Spilled), run.clone());
            self.disk += count;
        } else {
            bits::clear(self.arena.set(chunk, Set::Spilled), run.clone());
            self.memory += count;
        }
        bits::set(self.arena.set(chunk, Set::Present), run);
        Ok(())
    }

    /// Counts out pages that are about to be written or removed.
    fn forget(&mut self, chunk: u32, pages: Range<u32>) {
        let (present, spilled) = (Set::Present, Set::Spilled);
        let there = self.arena.bits(chunk, present);
        let on_disk = self.arena.bits(chunk, spilled);
        let mut both: bits::Bits = std::array::from_fn(|word| there[word] & on_disk[word]);
        let disk = bits::take(&mut both, pages.clone());
        let all = bits::clear(self.arena.set(chunk, present), pages);
        self.disk -= disk;
        self.memory -= all - disk;
    }

    /// Takes pages out of a chunk and gives back their room.
    fn clear(&mut self, chunk: u32, pages: Range<u32>) -> io::Result<()> {
        let mut there = self.arena.bits(chunk, Set::Present);
        let before = bits::count(&there);
        bits::take(&mut there, pages.clone());
        if bits::count(&there) == before {
            return Ok(());
        }
        self.forget(chunk, pages.clone());
        let at = u64::from(chunk) * CHUNK + u64::from(pages.start) * PAGE;
        let len = u64::from(pages.end - pages.start) * PAGE;
        sys::punch(&self.arena.files.data, at, len)?;
        match &self.arena.files.spill {
            Some(spill) => sys::punch(spill, at, len),
            None => Ok(()),
        }
    }

    /// Takes out one page, as one that did not pass a check.
    pub(super) fn drop_page(&mut self, chunk: u32, page: u32) -> io::Result<()> {
        self.clear(chunk, page..page + 1)
    }

    /// Copies a page from one (space, address) to another. A page that is not there is one of zeros.
    ///
    /// # Errors
    /// As [`Store::write`].
    pub fn copy_page(&mut self, from: (u32, u64), to: (u32, u64)) -> Result<(), StoreError> {
        let mut page = [0; PAGE as usize];
        self.read(from.0, from.1, &mut page)?;
        self.write(to.0, to.1, &page)
    }

    /// Reads a page; false and zeros if it is not there.
    ///
    /// # Errors
    /// When `addr` is not that of a page, or the disk cannot be read.
    pub fn read(
        &self,
        space: u32,
        addr: u64,
        page: &mut [u8; PAGE as usize],
    ) -> Result<bool, StoreError> {
        check(addr, PAGE)?;
        let at = (addr % CHUNK / PAGE) as u32;
        page.fill(0);
        let Some(chunk) = self.arena.find(space, addr / CHUNK) else { return Ok(false) };
        if !bits::has(self.arena.set(chunk, Set::Present), at) {
            return Ok(false);
        }
        let file = self.arena.file(bits::has(self.arena.set(chunk, Set::Spilled), at))?;
        file.read_exact_at(page, u64::from(chunk) * CHUNK + u64::from(at) * PAGE)?;
        Ok(true)
    }

    /// Takes out the pages of `space` from `start` to `end`.
    ///
    /// # Errors
    /// When the range is not made of whole pages, or the store is complete.
    pub fn remove(&mut self, space: u32, start: u64, end: u64) -> Result<(), StoreError> {
        let len = end.checked_sub(start).ok_or(StoreError::Unaligned { addr: start, len: 0 })?;
        check(start, len)?;
        self.writable()?;
        for chunk in self.within(space, start, end) {
            let base = self.arena.key(chunk).1 * CHUNK;
            self.clear(chunk, pages_of(base, start, end))?;
        }
        self.publish();
        Ok(())
    }

    /// Takes out all pages of `space`.
    ///
    /// # Errors
    /// When the store is complete.
    pub fn remove_space(&mut self, space: u32) -> Result<(), StoreError> {
        self.remove(space, 0, TOP)
    }

    /// Says that the pages of `space` from `start` to `end` will be wanted first. Only pages whose
    /// surroundings (2 MB) are in the store already are remembered.
    ///
    /// # Errors
    /// When the range is not made of whole pages.
    pub fn mark_hot(&mut self, space: u32, start: u64, end: u64) -> Result<(), StoreError> {
        self.mark(Set::Hot, space, start, end)
    }

    /// Says that children forked by `space` do not get the pages from `start` to `end`: the memory is
    /// wiped on fork, or not inherited (`wf` or `dc` in smaps). Only pages whose surroundings (2 MB) are
    /// in the store already are remembered.
    ///
    /// # Errors
    /// When the range is not made of whole pages.
    pub fn mark_wiped_on_fork(
        &mut self,
        space: u32,
        start: u64,
        end: u64,
    ) -> Result<(), StoreError> {
        self.mark(Set::Wiped, space, start, end)
    }

    fn mark(&mut self, set: Set, space: u32, start: u64, end: u64) -> Result<(), StoreError> {
        let len = end.checked_sub(start).ok_or(StoreError::Unaligned { addr: start, len: 0 })?;
        check(start, len)?;
        for chunk in self.within(space, start, end) {
            let base = self.arena.key(chunk).1 * CHUNK;
            bits::set(self.arena.set(chunk, set), pages_of(base, start, end));
        }
        Ok(())
    }

    /// Chunks of `space` that have to do with a range.
    fn within(&self, space: u32, start: u64, end: u64) -> Vec<u32> {
        let indexes = start / CHUNK..end.div_ceil(CHUNK);
        if indexes.end - indexes.start < u64::from(self.arena.chunks()) {
            return indexes.filter_map(|index| self.arena.find(space, index)).collect();
        }
        let here = |chunk: &u32| {
            let (of, index) = self.arena.key(*chunk);
            of == space && indexes.contains(&index)
        };
        (0..self.arena.chunks()).filter(here).collect()
    }

    fn writable(&self) -> Result<(), StoreError> {
        match self.arena.get(Word::Sealed) {
            0 => Ok(()),
            _ => Err(StoreError::Sealed),
        }
    }
}

/// The pages of the chunk at `base` that lie between `start` and `end`.
fn pages_of(base: u64, start: u64, end: u64) -> Range<u32> {
    let page = |addr: u64| (addr.clamp(base, base + CHUNK) - base) / PAGE;
    page(start) as u32..page(end) as u32
}

fn check(addr: u64, len: u64) -> Result<(), StoreError> {
    let whole = addr.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
    match whole && addr.checked_add(len).is_some_and(|end| end <= TOP) {
        true => Ok(()),
        false => Err(StoreError::Unaligned { addr, len }),
    }
}

fn is_zero(data: &[u8]) -> bool {
    // By words, and most pages show early that they are not.
    let (head, words) = data.as_chunks::<16>();
    head.iter().all(|word| u128::from_ne_bytes(*word) == 0) && words.iter().all(|byte| *byte == 0)
}

/// Ends this process here if a test asks for it.
fn point(name: &str) {
    #[cfg(any(test, feature = "fault-points"))]
    {
        use std::sync::OnceLock;
        static WANTED: OnceLock<Option<String>> = OnceLock::new();
        let wanted = WANTED.get_or_init(|| std::env::var("FERRY_STORE_FAULT").ok());
        if wanted.as_deref() == Some(name) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL);
        }
    }
    #[cfg(not(any(test, feature = "fault-points")))]
    let _ = name;
}
