//! The worker: answers page faults from the store, and fills the rest in the background.
//!
//! ```text
//!          ┌─ messages of the tasks ─▶ events first (they move segments), then faults
//!  poll ───┤
//!          └─ nothing to read ───────▶ one step of filling: hot pages, then chunk by chunk
//! ```
//!
//! It may be killed at any moment. The keeper starts another one, which learns from shared memory what
//! the tasks did (`log.rs`), and wakes everybody who waits: who still lacks a page asks again. What is
//! filled already answers `EEXIST`.

mod contexts;
mod events;
mod fault;
mod fill;
mod log;
mod run;

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use self::contexts::Context;
use self::fill::Fill;
use super::points::{self, Point};
use super::shared::{Shared, Word};
use crate::pages::PAGE;
use crate::pages::store::bits;
use crate::pages::store::sys::{self, Map};
use crate::pages::store::{Arena, CHUNK, Set};

pub(super) use self::run::{Surroundings, run};

/// The chunks of one space, by address.
struct Space {
    id: u32,
    /// Index (address / 2 MB) and chunk.
    chunks: Vec<(u64, u32)>,
    /// How many contexts need pages of each.
    users: Vec<u32>,
}

/// Where a page of the store is: space, number of the chunk in it, page of the chunk.
#[derive(Debug, Clone, Copy)]
struct Place {
    space: usize,
    chunk: usize,
    page: u32,
}

struct Worker<'a> {
    shared: &'a Shared,
    arena: &'a Arena,
    data: Map,
    spill: Option<Map>,
    spaces: Vec<Space>,
    contexts: Vec<Option<Context>>,
    /// Faults that were read: context and address.
    faults: VecDeque<(usize, u64)>,
    fill: Fill,
    /// Pages that contexts still need, all together.
    left: u64,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared, arena: &'a Arena) -> io::Result<Self> {
        let bytes = arena.data_bytes();
        let spill =
            arena.files.spill.as_ref().map(|file| Map::new(file, bytes, false)).transpose()?;
        Ok(Self {
            shared,
            arena,
            data: Map::new(&arena.files.data, bytes, false)?,
            spill,
            spaces: Vec::new(),
            contexts: Vec::new(),
            faults: VecDeque::new(),
            fill: Fill::default(),
            left: 0,
        })
    }

    /// Sorts the chunks of the complete store by space and address.
    fn index(&mut self) {
        for chunk in 0..self.arena.chunks() {
            if bits::count(&self.arena.bits(chunk, Set::Present)) > 0 {
                let (space, index) = self.arena.key(chunk);
                let space = self.space(space);
                self.spaces[space].chunks.push((index, chunk));
            }
        }
        for space in &mut self.spaces {
            space.chunks.sort_unstable();
            space.users = vec![0; space.chunks.len()];
        }
    }

    /// The number of space `id`, which may have no pages.
    fn space(&mut self, id: u32) -> usize {
        self.spaces.iter().position(|space| space.id == id).unwrap_or_else(|| {
            self.spaces.push(Space { id, chunks: Vec::new(), users: Vec::new() });
            self.spaces.len() - 1
        })
    }

    /// Where the page with an original address is, if the store has its surroundings.
    fn place(&self, space: usize, orig: u64) -> Option<Place> {
        let chunks = &self.spaces[space].chunks;
        let chunk = chunks.binary_search_by_key(&(orig / CHUNK), |(index, _)| *index).ok()?;
        Some(Place { space, chunk, page: (orig % CHUNK / PAGE) as u32 })
    }

    /// Address in this process of pages of a chunk, all of which lie in memory or all on disk.
    fn source(&self, chunk: u32, page: u32, pages: u32, spilled: bool) -> Option<u64> {
        let map = if spilled { self.spill.as_ref()? } else { &self.data };
        let offset = u64::from(chunk) * CHUNK + u64::from(page) * PAGE;
        Some(map.address(offset, u64::from(pages) * PAGE))
    }

    /// Gives the data of a chunk back, once the restore is over and if nobody needs it.
    fn free(&self, space: usize, chunk: usize) {
        let space = &self.spaces[space];
        let number = space.chunks[chunk].1;
        let over = self.shared.get(Word::Marker) != 0;
        if !over || space.users[chunk] > 0 || self.arena.is_freed(number) {
            return;
        }
        points::hit(self.shared, Point::Marked);
        self.arena.set_freed(number);
        points::hit(self.shared, Point::Freed);
        self.punch(number);
    }

    fn punch(&self, chunk: u32) {
        for file in [Some(&self.arena.files.data), self.arena.files.spill.as_ref()] {
            let Some(file) = file else { continue };
            if let Err(e) = sys::punch(file, u64::from(chunk) * CHUNK, CHUNK) {
                ::log::warn!("page store: memory is not given back: {e}");
            }
        }
    }

    /// Gives back all that nobody needs.
    fn free_all(&self) {
        for space in 0..self.spaces.len() {
            for chunk in 0..self.spaces[space].chunks.len() {
                self.free(space, chunk);
            }
        }
    }

    /// Descriptors of all contexts, with their numbers.
    fn descriptors(&self) -> impl Iterator<Item = (usize, RawFd)> {
        let open = self.contexts.iter().enumerate();
        open.filter_map(|(at, context)| context.as_ref().map(|context| (at, context.fd)))
    }
}
