//! Filling in the background: hot pages first, some of them before the tasks run, then chunk by chunk,
//! for all contexts that need one.

use std::time::Duration;

use super::super::shared::{Word, now};
use super::fault::Outcome;
use super::{Place, Worker};
use crate::pages::PAGE;
use crate::pages::store::bits::{self, Bits};
use crate::pages::store::{CHUNK, Set};

/// Once the tasks run, faults alone are served for so long: what the tasks need to answer their clients
/// comes by these, and filling would take the processor from them.
const FAULTS_FIRST: Duration = Duration::from_millis(20);
/// Filling begins by itself this long after the restore, if nobody said anything.
const BY_ITSELF: Duration = Duration::from_secs(2);
/// And this long after it if somebody said to wait, and was not heard of again.
const AT_LAST: Duration = Duration::from_secs(30);
/// Pages of a step: few while tasks wait for faults, many when they do not.
const STEP: std::ops::RangeInclusive<u32> = 16..=128;
/// Pages that may be filled before the restore is over, when nothing is given back yet: an eighth, or
/// this many.
const EARLY: u64 = (32 << 20) / PAGE;

/// Hot pages that are filled while the restore is held, before anybody says so: tasks ask for them as
/// soon as they run. And how often it is looked whether they can be.
const HELD: u64 = 512;
const LOOK: Duration = Duration::from_millis(1);

/// Where filling has come to.
#[derive(Debug)]
pub(super) struct Fill {
    step: u32,
    hot: bool,
    space: usize,
    chunk: usize,
    /// Steps that did something since the last round began.
    progress: bool,
    early: u64,
    complained: u64,
}

impl Default for Fill {
    fn default() -> Self {
        let step = *STEP.start();
        Self { step, hot: true, space: 0, chunk: 0, progress: false, early: 0, complained: 0 }
    }
}

impl Fill {
    /// Tasks wait: steps become short.
    pub(super) fn yield_to_faults(&mut self) {
        self.step = *STEP.start();
    }

    /// Whether an error may be logged: one in a second.
    pub(super) fn may_complain(&mut self) -> bool {
        let now = now();
        let may = now - self.complained > 1_000_000_000;
        self.complained = if may { now } else { self.complained };
        may
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Another step.
    Step,
    /// Look again after this time; something is in the way.
    Wait(Duration),
    /// Nothing to fill.
    Nothing,
}

impl Worker<'_> {
    /// How long until filling may go on; `None` if nobody knows.
    fn fill_waits(&self) -> Option<Duration> {
        let marker = self.shared.get(Word::Marker);
        let since = Duration::from_nanos(now().saturating_sub(marker));
        let over = marker != 0;
        let early = self.fill.early < (self.left / 8).max(EARLY);
        match self.shared.get(Word::Fill) {
            1 if over => Some(FAULTS_FIRST.saturating_sub(since)),
            1 if early => Some(Duration::ZERO),
            0 if over => Some(BY_ITSELF.saturating_sub(since)),
            0 if self.is_held() => Some(Duration::ZERO),
            2 if over => Some(AT_LAST.saturating_sub(since)),
            _ => None,
        }
    }

    /// The restore is not over, and nobody has said anything about filling.
    fn is_held(&self) -> bool {
        let unsaid = (self.shared.get(Word::Marker), self.shared.get(Word::Fill)) == (0, 0);
        unsaid && self.fill.hot && self.fill.early < HELD
    }

    /// One step of filling.
    pub(super) fn fill_step(&mut self) -> Next {
        if self.left == 0 {
            return Next::Nothing;
        }
        match self.fill_waits() {
            None => return Next::Nothing,
            Some(Duration::ZERO) => {}
            Some(wait) => return Next::Wait(wait),
        }
        while let Some(space) = self.spaces.get(self.fill.space) {
            let Some(users) = space.users.get(self.fill.chunk) else {
                (self.fill.space, self.fill.chunk) = (self.fill.space + 1, 0);
                continue;
            };
            if *users > 0
                && let Some(next) = self.fill_chunk(self.fill.space, self.fill.chunk)
            {
                return next;
            }
            self.fill.chunk += 1;
        }
        let progress = std::mem::take(&mut self.fill.progress);
        if self.is_held() {
            // They are filled, or not mapped yet.
            (self.fill.space, self.fill.chunk) = (0, 0);
            return Next::Wait(LOOK);
        }
        (self.fill.hot, self.fill.space, self.fill.chunk) = (false, 0, 0);
        // A round without any: pages are not mapped yet, or cannot be read.
        if progress { Next::Step } else { Next::Wait(Duration::from_millis(1)) }
    }

    /// One step within a chunk, `None` when nothing can be done there now.
    fn fill_chunk(&mut self, space: usize, chunk: usize) -> Option<Next> {
        for at in 0..self.contexts.len() {
            let Some(context) = self.contexts[at].as_ref().filter(|context| context.space == space)
            else {
                continue;
            };
            let Some((page, pages, run)) = self.next_run(at, space, chunk, context.reach) else {
                continue;
            };
            let place = Place { space, chunk, page };
            match self.copy(at, place, pages, run) {
                Outcome::Filled(done) => {
                    self.filled(at, done, pages);
                    return Some(Next::Step);
                }
                Outcome::Exists => {
                    self.fill.progress = true;
                    return Some(Next::Step);
                }
                Outcome::Again => {
                    let waits = self.read_events(at) == 0;
                    return Some(if waits {
                        Next::Wait(Duration::from_micros(50))
                    } else {
                        Next::Step
                    });
                }
                Outcome::Gone => {
                    self.close(at);
                    return Some(Next::Step);
                }
                Outcome::Missing => {
                    if let Some(next) = self.missing(at, place, pages) {
                        return Some(next);
                    }
                }
                Outcome::Failed(errno) => self.failed(at, run, errno),
            }
        }
        None
    }

    /// The next pages of a chunk that a context needs: first, count, current address. They lie in one
    /// segment, and all in memory or all on disk.
    fn next_run(
        &self,
        at: usize,
        space: usize,
        chunk: usize,
        reach: u32,
    ) -> Option<(u32, u32, u64)> {
        let context = self.contexts[at].as_ref()?;
        let (index, number) = self.spaces[space].chunks[chunk];
        let mut wanted = context.pending[chunk];
        if self.fill.hot {
            wanted = and(&wanted, &self.arena.bits(number, Set::Hot), false);
        }
        let first = bits::next(&wanted, 0)?;
        let spilled = self.arena.bits(number, Set::Spilled);
        let same = and(&wanted, &spilled, !bits::is_set(&spilled, first));
        let run = bits::run(&same, first)?;
        let segment = context.segments.of(index * CHUNK + u64::from(first) * PAGE)?;
        let most = self.fill.step.min(reach).min((segment.len / PAGE).min(512) as u32);
        Some((first, (run.end - run.start).min(most), segment.run))
    }

    fn filled(&mut self, at: usize, done: u32, asked: u32) {
        self.shared.add(Word::Filled, u64::from(done));
        self.fill.progress = true;
        self.fill.step = (self.fill.step * 2).min(*STEP.end());
        if self.shared.get(Word::Marker) == 0 {
            self.fill.early += u64::from(done);
        }
        if let Some(context) = &mut self.contexts[at]
            && done == asked
        {
            context.reach = (context.reach * 2).min(*STEP.end());
        }
    }

    /// Nothing is mapped there, or not for all of it: less at once; a single page is not needed, if the
    /// restore is over. Before, it may be mapped later.
    fn missing(&mut self, at: usize, place: Place, pages: u32) -> Option<Next> {
        if pages > 1 {
            if let Some(context) = &mut self.contexts[at] {
                context.reach = pages / 2;
            }
            return Some(Next::Step);
        }
        if self.shared.get(Word::Marker) == 0 {
            return None;
        }
        self.mark(at, place.chunk, place.page..place.page + 1);
        self.fill.progress = true;
        Some(Next::Step)
    }
}

/// Bits that are in both; with `not`, in the first and not in the second.
fn and(a: &Bits, b: &Bits, not: bool) -> Bits {
    std::array::from_fn(|word| a[word] & if not { !b[word] } else { b[word] })
}
