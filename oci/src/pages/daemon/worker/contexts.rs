//! Contexts: found in shared memory, rebuilt from their logs, changed by what their tasks do.

use std::os::fd::RawFd;

use super::super::descriptor;
use super::super::points::{self, Point};
use super::super::segments::{Segment, Segments};
use super::super::shared::{
    CLAIMED, CLOSING, CONTEXTS, FREE, Field, LIVE, LOST, ROOTS, Shared, Word,
};
use super::super::uffd::{self, Event};
use super::Worker;
use super::log::{EventLog, FORKED, SEGMENT, TABLE};
use crate::pages::PAGE;
use crate::pages::store::bits::{self, Bits, CHUNK_PAGES};
use crate::pages::store::{CHUNK, Set};

/// One descriptor and the task behind it.
pub(super) struct Context {
    /// Number in shared memory.
    pub(super) slot: usize,
    pub(super) fd: RawFd,
    pub(super) space: usize,
    pub(super) segments: Segments,
    /// Pages of the store that it still needs, by chunk of its space.
    pub(super) pending: Vec<Bits>,
    /// How many those are.
    pub(super) left: u64,
    pub(super) log: EventLog,
    /// The log did not suffice and is not kept any more.
    pub(super) lost: bool,
    /// Pages to fill at once: fewer after a step that reached beyond a mapping.
    pub(super) reach: u32,
}

impl Context {
    /// Whether it was sent by CRIU, not forked since.
    pub(super) fn is_root(&self) -> bool {
        self.slot < ROOTS
    }
}

impl Worker<'_> {
    /// Clears up after a worker that was killed.
    pub(super) fn recover(&self) {
        for slot in 0..CONTEXTS {
            let fd = self.shared.read(slot, Field::Fd) as RawFd;
            match self.shared.read(slot, Field::State) {
                CLAIMED if slot >= ROOTS => self.shared.write(slot, Field::State, FREE),
                CLOSING => {
                    let taken = |at: usize| {
                        matches!(self.shared.read(at, Field::State), CLAIMED | LIVE | LOST)
                            && self.shared.read(at, Field::Fd) as RawFd == fd
                    };
                    let ours = descriptor::inode(fd) == Some(self.shared.read(slot, Field::Inode));
                    if ours && !(0..CONTEXTS).any(taken) {
                        descriptor::close(fd);
                    }
                    self.shared.write(slot, Field::State, FREE);
                }
                _ => {}
            }
        }
        for chunk in (0..self.arena.chunks()).filter(|chunk| self.arena.is_freed(*chunk)) {
            self.punch(chunk);
        }
    }

    /// Takes up all contexts that are in shared memory and not known here, and wakes their tasks:
    /// what was read of them may have been lost.
    pub(super) fn take_up(&mut self) {
        loop {
            let known = |slot| self.contexts.iter().flatten().any(|context| context.slot == slot);
            let live = |slot: &usize| self.shared.read(*slot, Field::State) == LIVE;
            let Some(slot) = (0..CONTEXTS).filter(live).find(|slot| !known(*slot)) else { break };
            let at = self.replay(slot);
            if let Some(context) = &self.contexts[at] {
                uffd::wake_all(context.fd);
            }
        }
        // Every fork in every log is dealt with by now.
        for slot in ROOTS..CONTEXTS {
            if self.shared.read(slot, Field::State) != FREE {
                self.shared.write(slot, Field::Parent, 0);
            }
        }
    }

    /// Whether there are contexts that nobody can serve any more.
    pub(super) fn any_lost(&self) -> bool {
        let known = |slot| self.contexts.iter().flatten().any(|context| context.slot == slot);
        (0..CONTEXTS).any(|slot| self.shared.read(slot, Field::State) == LOST && !known(slot))
    }

    /// Rebuilds a context from its log.
    fn replay(&mut self, slot: usize) -> usize {
        let (log, records) = EventLog::open(self.shared, slot);
        let mut segments = Segments::identity();
        for (at, record) in (0..).zip(&records) {
            match record[0] as u8 {
                TABLE => segments = Segments::empty(),
                SEGMENT => {
                    segments.insert(Segment { run: record[1], len: record[2], orig: record[3] });
                }
                FORKED => {}
                _ => match Event::parse(*record) {
                    Some(Event::Fork(fd)) => {
                        self.adopt(slot, log.position_of(at), fd, &segments);
                    }
                    Some(event) => _ = apply(&mut segments, event),
                    None => {}
                },
            }
            points::hit(self.shared, Point::Replayed);
        }
        let space = self.space(self.shared.read(slot, Field::Space) as u32);
        let pending = self.needed(space, &segments, slot < ROOTS);
        let fd = self.shared.read(slot, Field::Fd) as RawFd;
        self.add(Context {
            slot,
            fd,
            space,
            segments,
            pending,
            left: 0,
            log,
            lost: false,
            reach: 64,
        })
    }

    /// Pages of the store that a context with these segments may need.
    fn needed(&self, space: usize, segments: &Segments, root: bool) -> Vec<Bits> {
        let chunks = &self.spaces[space].chunks;
        let mut needed = vec![[0; 8]; chunks.len()];
        for Segment { len, orig, .. } in segments.iter() {
            let from = chunks.partition_point(|(index, _)| (index + 1) * CHUNK <= orig);
            for (at, (index, chunk)) in chunks.iter().enumerate().skip(from) {
                let base = index * CHUNK;
                if base >= orig + len {
                    break;
                }
                let pages = pages_of(base, orig, len);
                let mut rest = self.arena.bits(*chunk, Set::Present);
                bits::take(&mut rest, 0..pages.start);
                bits::take(&mut rest, pages.end..CHUNK_PAGES);
                let without = if root { Set::Done } else { Set::Wiped };
                let without = self.arena.bits(*chunk, without);
                for word in 0..if self.arena.is_freed(*chunk) { 0 } else { 8 } {
                    needed[at][word] |= rest[word] & !without[word];
                }
            }
        }
        needed
    }

    /// Adds a context and counts what it needs.
    pub(super) fn add(&mut self, mut context: Context) -> usize {
        context.left = context.pending.iter().map(bits::count).sum();
        self.left += context.left;
        let users = &mut self.spaces[context.space].users;
        for (users, pending) in users.iter_mut().zip(&context.pending) {
            *users += u32::from(*pending != [0; 8]);
        }
        let free = self.contexts.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            self.contexts.push(None);
            self.contexts.len() - 1
        });
        self.contexts[at] = Some(context);
        at
    }

    /// Makes a forked child known to workers to come. `position` is where its parent's log says so.
    pub(super) fn adopt(
        &self,
        parent: usize,
        position: u64,
        fd: RawFd,
        segments: &Segments,
    ) -> Option<usize> {
        let shared = self.shared;
        let known = |slot: &usize| {
            matches!(shared.read(*slot, Field::State), LIVE | LOST | CLOSING)
                && shared.read(*slot, Field::Parent) == parent as u64 + 1
                && shared.read(*slot, Field::Position) == position
        };
        let child = (ROOTS..CONTEXTS)
            .find(known)
            .or_else(|| publish(shared, parent, position, fd, segments));
        points::hit(shared, Point::ForkPublished);
        let (generation, slot) = (position >> 32, position & 0xffff_ffff);
        if child.is_some() {
            let [_, a, b, c] = shared.record(parent, generation, slot);
            shared.set_record(parent, generation, slot, [u64::from(FORKED), a, b, c]);
        } else {
            shared.add(Word::Errors, 1);
            ::log::error!("no room for another forked task: it waits for its pages for ever");
        }
        child.inspect(|child| shared.write(*child, Field::Parent, 0))
    }

    /// A context needs a range of original addresses no more.
    pub(super) fn forget(&mut self, at: usize, orig: u64, len: u64) {
        let Some(context) = &self.contexts[at] else { return };
        let chunks = &self.spaces[context.space].chunks;
        let from = chunks.partition_point(|(index, _)| (index + 1) * CHUNK <= orig);
        let to = chunks.partition_point(|(index, _)| index * CHUNK < orig + len);
        let bases: Vec<u64> = chunks[from..to].iter().map(|(index, _)| index * CHUNK).collect();
        for (chunk, base) in (from..).zip(bases) {
            self.mark(at, chunk, pages_of(base, orig, len));
        }
    }

    /// Pages are in, or not needed: nothing of them is left to do for this context.
    pub(super) fn mark(&mut self, at: usize, chunk: usize, pages: std::ops::Range<u32>) {
        let Some(context) = &mut self.contexts[at] else { return };
        let count = bits::take(&mut context.pending[chunk], pages.clone());
        if count == 0 {
            return;
        }
        context.left -= count;
        self.left -= count;
        let space = context.space;
        if context.is_root() {
            let number = self.spaces[space].chunks[chunk].1;
            bits::set(self.arena.set(number, Set::Done), pages);
        }
        if context.pending[chunk] == [0; 8] {
            self.spaces[space].users[chunk] -= 1;
            self.free(space, chunk);
        }
    }

    /// Ends a context: all is in, or its task is gone.
    pub(super) fn close(&mut self, at: usize) {
        let Some(context) = self.contexts[at].take() else { return };
        self.left -= context.left;
        self.shared.write(context.slot, Field::State, CLOSING);
        points::hit(self.shared, Point::Closing);
        descriptor::close(context.fd);
        self.shared.write(context.slot, Field::State, FREE);
        self.faults.retain(|(of, _)| *of != at);
        for (chunk, pending) in context.pending.iter().enumerate() {
            if *pending != [0; 8] {
                self.spaces[context.space].users[chunk] -= 1;
                self.free(context.space, chunk);
            }
        }
    }
}

/// Describes a forked child in shared memory. Killed before the last line, none of it counts.
fn publish(
    shared: &Shared,
    parent: usize,
    position: u64,
    fd: RawFd,
    segments: &Segments,
) -> Option<usize> {
    let child = shared.claim(true)?;
    descriptor::never_wait(fd);
    for (field, value) in [
        (Field::Fd, fd as u64),
        (Field::Inode, descriptor::inode(fd).unwrap_or(0)),
        (Field::Space, shared.read(parent, Field::Space)),
        (Field::Parent, parent as u64 + 1),
        (Field::Position, position),
    ] {
        shared.write(child, field, value);
    }
    let fits = EventLog::begin(shared, child, segments).unwrap_or_else(|e| {
        ::log::error!("event log of a forked task: {e}");
        false
    });
    shared.write(child, Field::State, if fits { LIVE } else { LOST });
    Some(child)
}

/// Pages of the chunk at `base` that lie within `len` bytes from `orig` on.
pub(super) fn pages_of(base: u64, orig: u64, len: u64) -> std::ops::Range<u32> {
    let page = |addr: u64| ((addr.clamp(base, base + CHUNK) - base) / PAGE) as u32;
    page(orig)..page(orig + len)
}

/// Follows a change of memory. Returns what is not needed any more, and whether a worker to come has
/// to know.
pub(super) fn apply(segments: &mut Segments, event: Event) -> (Vec<Segment>, bool) {
    match event {
        Event::Remove(start, end) => {
            let gone = segments.cut(start..end);
            let keep = !gone.is_empty();
            (gone, keep)
        }
        Event::Unmap(start, end) => {
            let reports = segments.reports();
            let gone = segments.unmap(start..end);
            let keep = !gone.is_empty() || segments.reports() != reports;
            (gone, keep)
        }
        Event::Remap { from, to, len } => (segments.shift(from, to, len), true),
        Event::Fault(_) | Event::Fork(_) => (Vec::new(), false),
    }
}
