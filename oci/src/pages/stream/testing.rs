//! What the tests of the page stream share: random numbers, memory that changes, a store.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Mutex;

use twox_hash::XxHash3_128;

use super::apply::PageSink;
use super::plan::Change;
use super::worker::{PageSource, lock};
use crate::pages::PAGE;

/// Numbers that look random and are the same each time (xorshift64*).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(count).collect()
    }
}

pub(super) type Pages = BTreeMap<(u32, u64), Vec<u8>>;

/// A container's memory, with what has changed since the last round. A page of zeros and no page
/// read the same.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) pages: Pages,
    written: BTreeMap<u32, Vec<Range<u64>>>,
    absent: BTreeMap<u32, Vec<Range<u64>>>,
    exited: Vec<u32>,
}

/// A process, what it has written, what it has no more, and whether it has ended.
type One = (u32, Vec<Range<u64>>, Vec<Range<u64>>, bool);

/// What a round gives to the sender.
#[derive(Default)]
pub(super) struct Changed(Vec<One>);

impl Changed {
    pub(super) fn list(&self) -> Vec<Change<'_>> {
        let each = self.0.iter();
        each.map(|(space, written, absent, exited)| Change {
            pid: *space as i32 + 1000,
            space: *space,
            written,
            absent,
            exited: *exited,
        })
        .collect()
    }
}

impl Memory {
    pub(super) fn write(&mut self, space: u32, addr: u64, page: Vec<u8>) {
        self.pages.insert((space, addr), page);
        self.written.entry(space).or_default().push(addr..addr + PAGE);
    }

    pub(super) fn unmap(&mut self, space: u32, range: Range<u64>) {
        self.pages.retain(|(of, addr), _| *of != space || !range.contains(addr));
        self.absent.entry(space).or_default().push(range);
    }

    pub(super) fn exit(&mut self, space: u32) {
        self.pages.retain(|(of, _), _| *of != space);
        self.written.remove(&space);
        self.absent.remove(&space);
        self.exited.push(space);
    }

    /// What has changed since this was asked last. What was unmapped after it was written is listed
    /// as absent alone.
    pub(super) fn round(&mut self) -> Changed {
        let mut changed = Changed::default();
        changed.0.extend(self.exited.drain(..).map(|space| (space, vec![], vec![], true)));
        let (written, mut absent) =
            (std::mem::take(&mut self.written), std::mem::take(&mut self.absent));
        for (space, mut written) in written {
            written.retain(|range| self.pages.contains_key(&(space, range.start)));
            changed.0.push((space, written, absent.remove(&space).unwrap_or_default(), false));
        }
        changed.0.extend(absent.into_iter().map(|(space, absent)| (space, vec![], absent, false)));
        changed
    }

    /// Everything, as the first round of a tracker lists it.
    pub(super) fn all(&mut self) -> Changed {
        self.round();
        let mut spaces: BTreeMap<u32, Vec<Range<u64>>> = BTreeMap::new();
        for (space, addr) in self.pages.keys() {
            spaces.entry(*space).or_default().push(*addr..*addr + PAGE);
        }
        Changed(spaces.into_iter().map(|(space, all)| (space, all, vec![], false)).collect())
    }

    /// What the destination has to hold at the end.
    pub(super) fn wanted(&self) -> Pages {
        let pages = self.pages.iter().filter(|(_, page)| page.iter().any(|byte| *byte != 0));
        pages.map(|(at, page)| (*at, page.clone())).collect()
    }
}

/// Memory that is read, and that may change while it is.
pub(super) struct Source<F> {
    pub(super) memory: Mutex<Memory>,
    /// Called before each slice.
    pub(super) meanwhile: F,
}

impl<F: Fn(&mut Memory) + Sync> PageSource for Source<F> {
    fn read(
        &self,
        pid: i32,
        ranges: &[Range<u64>],
        each: &mut (dyn FnMut(u64, &[u8]) + Send),
    ) -> io::Result<()> {
        let mut memory = lock(&self.memory);
        (self.meanwhile)(&mut memory);
        for range in ranges {
            for addr in range.clone().step_by(PAGE as usize) {
                if let Some(page) = memory.pages.get(&(pid as u32 - 1000, addr)) {
                    each(addr, page);
                }
            }
        }
        Ok(())
    }
}

/// A store that is nothing but pages.
#[derive(Default)]
pub(super) struct Store {
    pub(super) pages: Pages,
    /// Calls of `remove` and `remove_space`.
    pub(super) removed: usize,
}

impl Store {
    pub(super) fn hashes(&self) -> impl Iterator<Item = (u32, u64, [u8; 16])> {
        let hash = |page: &Vec<u8>| XxHash3_128::oneshot(page).to_le_bytes();
        self.pages.iter().map(move |((space, addr), page)| (*space, *addr, hash(page)))
    }
}

impl PageSink for Store {
    fn write(&mut self, space: u32, addr: u64, pages: &[u8]) -> io::Result<()> {
        for (page, addr) in pages.chunks(PAGE as usize).zip((addr..).step_by(PAGE as usize)) {
            assert!(page.iter().any(|byte| *byte != 0), "a page of zeros was sent");
            self.pages.insert((space, addr), page.to_vec());
        }
        Ok(())
    }

    fn copy(&mut self, from: (u32, u64), to: (u32, u64)) -> io::Result<()> {
        let page = self.pages.get(&from).ok_or_else(|| io::Error::other("no such page"))?;
        self.pages.insert(to, page.clone());
        Ok(())
    }

    fn remove(&mut self, space: u32, start: u64, end: u64) -> io::Result<()> {
        self.removed += 1;
        self.pages.retain(|(of, addr), _| *of != space || !(start..end).contains(addr));
        Ok(())
    }

    fn remove_space(&mut self, space: u32) -> io::Result<()> {
        self.removed += 1;
        self.pages.retain(|(of, _), _| *of != space);
        Ok(())
    }
}
