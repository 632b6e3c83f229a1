//! What is in a store, by hash: for an attempt that takes over what an earlier one left.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::bits::{self, Bits};
use super::{Arena, CHUNK, Set, Store, StoreError, hash};
use crate::pages::PAGE;

/// Pages of a store with their hashes, in no order. See [`Store::hashes`].
#[derive(Debug)]
pub struct Hashes<'a> {
    arena: &'a Arena,
    chunk: u32,
    present: Bits,
    page: u32,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena").field("chunks", &self.chunks()).finish_non_exhaustive()
    }
}

impl Iterator for Hashes<'_> {
    type Item = (u32, u64, [u8; 16]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(page) = bits::next(&self.present, self.page) {
                self.page = page + 1;
                let (space, index) = self.arena.key(self.chunk - 1);
                let hash = stored(self.arena, self.chunk - 1, page);
                return Some((space, index * CHUNK + u64::from(page) * PAGE, hash));
            }
            if self.chunk >= self.arena.chunks() {
                return None;
            }
            self.present = self.arena.bits(self.chunk, Set::Present);
            (self.chunk, self.page) = (self.chunk + 1, 0);
        }
    }
}

fn stored(arena: &Arena, chunk: u32, page: u32) -> [u8; 16] {
    let words = arena.hash(chunk, page);
    let low = u128::from(words[0].load(Ordering::Acquire));
    (low | u128::from(words[1].load(Ordering::Acquire)) << 64).to_le_bytes()
}

impl Store {
    /// All pages: space, address, hash (see [`hash`]).
    pub fn hashes(&self) -> Hashes<'_> {
        Hashes { arena: &self.arena, chunk: 0, present: [0; 8], page: 0 }
    }

    /// Reads every page and takes out those that are not what their hash says. To be called before
    /// what an earlier attempt left is trusted. Returns how many were taken out.
    ///
    /// # Errors
    /// When pages that are wrong cannot be taken out; a page that cannot be read is wrong.
    pub fn verify(&mut self) -> Result<u64, StoreError> {
        let mut buffer = vec![0; CHUNK as usize];
        let mut wrong = 0;
        for chunk in 0..self.arena.chunks() {
            let present = self.arena.bits(chunk, Set::Present);
            let spilled = self.arena.bits(chunk, Set::Spilled);
            for on_disk in [false, true] {
                let mine: Bits = std::array::from_fn(|word| {
                    present[word] & if on_disk { spilled[word] } else { !spilled[word] }
                });
                let mut at = 0;
                while let Some(run) = bits::run(&mine, at) {
                    at = run.end;
                    let data = &mut buffer[..(run.end - run.start) as usize * PAGE as usize];
                    let offset = u64::from(chunk) * CHUNK + u64::from(run.start) * PAGE;
                    let read = self.arena.file(on_disk).and_then(|f| f.read_exact_at(data, offset));
                    for (page, data) in run.zip(data.chunks_exact(PAGE as usize)) {
                        if read.is_err() || hash(data) != stored(&self.arena, chunk, page) {
                            self.drop_page(chunk, page)?;
                            wrong += 1;
                        }
                    }
                }
            }
        }
        self.publish();
        Ok(wrong)
    }
}
