//! One fault: the page from the store with those behind it, or a page of zeros.

use super::super::points::{self, Point};
use super::super::shared::{self, Word};
use super::super::uffd;
use super::{Place, Worker};
use crate::pages::PAGE;
use crate::pages::store::{CHUNK, Set, bits};

/// What came of an attempt to fill pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many pages are in.
    Filled(u32),
    /// The first one is there already.
    Exists,
    /// The task is changing its memory: its messages come first.
    Again,
    /// Nothing that could be filled is mapped there, or it reaches beyond a mapping.
    Missing,
    /// The task is gone.
    Gone,
    /// Something else, which may pass.
    Failed(i32),
}

impl Outcome {
    fn of(result: Result<u64, i32>) -> Self {
        match result {
            Ok(bytes) => Self::Filled((bytes / PAGE) as u32),
            Err(libc::EEXIST) => Self::Exists,
            Err(libc::EAGAIN) => Self::Again,
            Err(libc::ENOENT) => Self::Missing,
            // ENOSPC is what old kernels say.
            Err(libc::ESRCH | libc::ENOSPC) => Self::Gone,
            Err(errno) => Self::Failed(errno),
        }
    }
}

/// Pages that come when a task waits for one: those behind it are likely to be next, and each fault
/// wakes two processes.
const AROUND: u32 = 16;
/// How often a task that changes its memory is asked for its messages before it is its turn again.
const ATTEMPTS: u32 = 64;

impl Worker<'_> {
    /// Fills `pages` pages of the store from `place` on at current address `run`, and marks them.
    pub(super) fn copy(&mut self, at: usize, place: Place, pages: u32, run: u64) -> Outcome {
        let Some(context) = &self.contexts[at] else { return Outcome::Gone };
        let chunk = self.spaces[place.space].chunks[place.chunk].1;
        let spilled = bits::has(self.arena.set(chunk, Set::Spilled), place.page);
        let Some(from) = self.source(chunk, place.page, pages, spilled) else {
            return Outcome::Failed(libc::EBADF);
        };
        let outcome = Outcome::of(uffd::copy(context.fd, run, from, u64::from(pages) * PAGE));
        let done = match outcome {
            Outcome::Filled(done) => done,
            // Whoever waits there came too late for the one who filled it.
            Outcome::Exists => {
                let _ = uffd::wake(context.fd, run, PAGE);
                1
            }
            _ => return outcome,
        };
        points::hit(self.shared, Point::Copied);
        self.mark(at, place.chunk, place.page..place.page + done);
        outcome
    }

    /// Answers all faults that were read.
    pub(super) fn serve(&mut self) {
        while let Some((at, addr)) = self.faults.pop_front() {
            let start = shared::now();
            self.serve_one(at, addr);
            let end = shared::now();
            self.shared.add(Word::Faults, 1);
            self.shared.buckets()[shared::bucket(end - start)]
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if self.shared.get(Word::FirstFault) == 0 {
                self.shared.put(Word::FirstFault, end);
            }
            self.fill.yield_to_faults();
        }
    }

    fn serve_one(&mut self, at: usize, addr: u64) {
        let mut most = AROUND;
        for _ in 0..ATTEMPTS {
            let Some(context) = &self.contexts[at] else { return };
            let fd = context.fd;
            let found = self.wanted(at, addr, most);
            let outcome = match found {
                Some((place, pages)) => self.copy(at, place, pages, addr),
                // Not in the store, dropped by the task, or in already.
                None => match Outcome::of(uffd::zero(fd, addr, self.zeros(at, addr, most))) {
                    Outcome::Exists => {
                        let _ = uffd::wake(fd, addr, PAGE);
                        return;
                    }
                    outcome => outcome,
                },
            };
            match outcome {
                Outcome::Filled(_) | Outcome::Exists => {
                    let word = if found.is_some() { Word::ByFault } else { Word::Zeros };
                    let pages = if let Outcome::Filled(pages) = outcome { pages } else { 1 };
                    return self.shared.add(word, u64::from(pages));
                }
                Outcome::Again => _ = self.read_events(at),
                // Those after it are not mapped with it.
                Outcome::Missing if most > 1 => most = 1,
                // Unmapped meanwhile: it looks again, and finds that out by itself.
                Outcome::Missing => {
                    let _ = uffd::wake(fd, addr, PAGE);
                    return;
                }
                Outcome::Gone => return self.close(at),
                Outcome::Failed(errno) => return self.failed(at, addr, errno),
            }
        }
        // Still changing: it asks again, and others get their turn.
        if let Some(context) = &self.contexts[at] {
            let _ = uffd::wake(context.fd, addr, PAGE);
        }
    }

    /// Length of the zeros from `addr` on, bytes: none of these pages is still to come. They take no
    /// memory, as long as nobody writes there.
    fn zeros(&self, at: usize, addr: u64, most: u32) -> u64 {
        let behind = (1..u64::from(most)).map(|n| addr + n * PAGE);
        let zeros = behind.take_while(|addr| self.wanted(at, *addr, 1).is_none()).count();
        (zeros as u64 + 1) * PAGE
    }

    /// Where the page at `addr` is if it is still to come, and how many that lie behind each other from
    /// there on, at most `most`.
    fn wanted(&self, at: usize, addr: u64, most: u32) -> Option<(Place, u32)> {
        let context = self.contexts[at].as_ref()?;
        let segment = context.segments.at(addr)?;
        let place = self.place(context.space, segment.orig)?;
        let pending = &context.pending[place.chunk];
        let spilled = self.arena.bits(self.spaces[place.space].chunks[place.chunk].1, Set::Spilled);
        let alike = |page| {
            bits::is_set(pending, page)
                && bits::is_set(&spilled, page) == bits::is_set(&spilled, place.page)
        };
        let end = (CHUNK / PAGE).min(u64::from(place.page) + segment.len / PAGE) as u32;
        let pages = (place.page..end.min(place.page + most)).take_while(|page| alike(*page));
        let pages = pages.count() as u32;
        (pages > 0).then_some((place, pages))
    }

    /// A page cannot be given now. Never zeros instead: who waits for it goes on waiting, and filling
    /// tries again.
    pub(super) fn failed(&mut self, at: usize, addr: u64, errno: i32) {
        self.shared.add(Word::Errors, 1);
        if self.fill.may_complain() {
            let error = std::io::Error::from_raw_os_error(errno);
            ::log::error!("a page cannot be filled, context {at}, address {addr:#x}: {error}");
        }
    }
}
