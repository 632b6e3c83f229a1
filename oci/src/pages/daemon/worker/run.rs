//! The worker's loop, and what it does when the keeper is gone.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags};
use nix::sys::time::TimeSpec;

use super::super::lazy::{self, Lazy};
use super::super::shared::{Shared, Word};
use super::super::{descriptor, meta};
use super::Worker;
use super::fill::Next;
use crate::pages::PAGE;
use crate::pages::store::bits;
use crate::pages::store::sys::Map;
use crate::pages::store::{Arena, CHUNK, Set};

/// What the keeper has made for its workers. All descriptors are in the table that they share.
pub(in crate::pages::daemon) struct Surroundings<'a> {
    pub(in crate::pages::daemon) shared: &'a Shared,
    pub(in crate::pages::daemon) arena: &'a Arena,
    /// Becomes readable when something in shared memory has changed.
    pub(in crate::pages::daemon) bell: RawFd,
    /// Becomes readable when the keeper is gone.
    pub(in crate::pages::daemon) keeper: RawFd,
    /// The store's folder.
    pub(in crate::pages::daemon) dir: &'a Path,
}

/// After so many rounds of messages comes a step of filling.
const FAIR: u32 = 8;
/// How often new pages are looked for before the memory is complete.
const WARM: Duration = Duration::from_millis(100);
/// Chunks that are mapped in one go, and in all. More would take the processor from the dump, and hold up
/// the restore: a gigabyte takes 0.1 s and more.
const WARM_STEP: u32 = 4;
const WARM_MOST: u32 = 128;

/// Serves until all is in. Then it says so in shared memory.
///
/// # Errors
/// When the store cannot be mapped or descriptors cannot be waited for.
pub(in crate::pages::daemon) fn run(around: &Surroundings<'_>) -> io::Result<()> {
    let shared = around.shared;
    shared.lock();
    let mut worker = Worker::new(shared, around.arena)?;
    worker.recover();
    let (mut serving, mut warmed, mut alone) = (false, 0, false);
    let mut known = (u64::MAX, 0);
    let mut busy = 0;
    let mut next = Next::Nothing;
    loop {
        if !serving && shared.get(Word::Final) != 0 {
            worker.index();
            serving = true;
        }
        if serving {
            // The end of the restore first: whoever sees it sees all that came before it.
            let marker = shared.get(Word::Marker);
            let seen = (shared.get(Word::Contexts), marker);
            if known != seen {
                known = seen;
                worker.take_up();
                next = Next::Step;
                if marker != 0 {
                    worker.free_all();
                }
            }
            shared.put(Word::Left, worker.left);
            if worker.finish(known.0) {
                shared.put(Word::Left, 0);
                shared.put(Word::Done, 1);
                if alone {
                    meta::remove(around.dir);
                }
                return Ok(());
            }
        } else {
            warmed = warm(around.arena, &worker.data, warmed);
        }
        let may_warm = warmed < around.arena.chunks().saturating_sub(1).min(WARM_MOST);
        let wait = match next {
            _ if !serving && may_warm => Some(Duration::ZERO),
            _ if !serving => Some(WARM),
            Next::Step => Some(Duration::ZERO),
            Next::Wait(wait) => Some(wait),
            Next::Nothing => None,
        };
        let readable = wait_for(&worker, around, serving, alone, wait)?;
        if readable.keeper {
            alone = true;
            take_over(&worker, around);
        }
        if alone && (readable.lazy && end_of_restore(shared) || is_hopeless(shared)) {
            ::log::error!(
                "the keeper is gone and no restore can come to its end: the page store ends"
            );
            lazy::hang_up(shared);
            meta::remove(around.dir);
            return Ok(());
        }
        if readable.bell {
            descriptor::drain(around.bell);
        }
        for at in &readable.contexts {
            worker.read_events(*at);
        }
        worker.serve();
        // Tasks that only ask for new pages of zeros must not keep the rest from coming in.
        busy = if readable.contexts.is_empty() { 0 } else { busy + 1 };
        next = if !serving {
            Next::Nothing
        } else if busy % FAIR == 0 {
            worker.fill_step()
        } else {
            Next::Step
        };
        // Filling may have read messages.
        worker.serve();
    }
}

impl Worker<'_> {
    /// Ends contexts that have all they need, once the restore is over. Returns whether none is left
    /// and none can come any more.
    fn finish(&mut self, known: u64) -> bool {
        if self.shared.get(Word::Marker) == 0 || self.shared.get(Word::Contexts) != known {
            return false;
        }
        for at in 0..self.contexts.len() {
            if self.contexts[at].as_ref().is_some_and(|context| context.left == 0) {
                // What it did last may have been to fork.
                self.read_events(at);
                self.serve();
                if self.contexts[at].as_ref().is_some_and(|context| context.left == 0) {
                    self.close(at);
                }
            }
        }
        self.contexts.iter().all(Option::is_none) && !self.any_lost()
    }
}

/// What can be read.
#[derive(Default)]
struct Readable {
    bell: bool,
    keeper: bool,
    lazy: bool,
    contexts: Vec<usize>,
}

fn wait_for(
    worker: &Worker<'_>,
    around: &Surroundings<'_>,
    serving: bool,
    alone: bool,
    wait: Option<Duration>,
) -> io::Result<Readable> {
    let lazy = worker.shared.get(Word::LazyFd);
    let first = if alone {
        [None, (lazy > 0).then(|| lazy as RawFd - 1)]
    } else {
        [Some(around.bell), Some(around.keeper)]
    };
    let mut numbers = Vec::new();
    let mut polls = Vec::new();
    let fixed = first.into_iter().enumerate().filter_map(|(at, fd)| Some((at, fd?)));
    let contexts = worker.descriptors().filter(|_| serving).map(|(at, fd)| (at + 2, fd));
    for (at, fd) in fixed.chain(contexts) {
        numbers.push(at);
        polls.push(PollFd::new(descriptor::borrow(fd), PollFlags::POLLIN));
    }
    match nix::poll::ppoll(&mut polls, wait.map(TimeSpec::from_duration), None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(e.into()),
    }
    let mut readable = Readable::default();
    for (at, poll) in numbers.into_iter().zip(&polls) {
        if !poll.any().unwrap_or(false) {
            continue;
        }
        match at {
            0 => readable.bell = true,
            1 if alone => readable.lazy = true,
            1 => readable.keeper = true,
            at => readable.contexts.push(at - 2),
        }
    }
    Ok(readable)
}

/// The keeper is gone: nobody must wait for it any more, and the restore talks to us.
fn take_over(worker: &Worker<'_>, around: &Surroundings<'_>) {
    ::log::error!("the keeper is gone; serving goes on until all is in");
    let lazy = worker.shared.get(Word::LazyFd);
    let mut wanted: Vec<RawFd> = around.arena.descriptors();
    wanted.extend([worker.shared.fd()]);
    wanted.extend((lazy > 0).then(|| lazy as RawFd - 1));
    descriptor::close_others(&wanted);
}

/// Hears the restore out. Returns whether it has ended before its time.
fn end_of_restore(shared: &Shared) -> bool {
    let closed = matches!(lazy::pump(shared), Ok(Lazy::Closed) | Err(_));
    if closed {
        lazy::hang_up(shared);
    }
    closed && shared.get(Word::Marker) == 0
}

/// Without a keeper: whether nobody can say any more that the memory is complete, or no restore is
/// connected that could be over one day. No task has run then.
fn is_hopeless(shared: &Shared) -> bool {
    shared.get(Word::Marker) == 0 && (shared.get(Word::Final) == 0 || shared.get(Word::LazyFd) == 0)
}

/// Maps pages of the store here, so that the first fault does not have to wait for that. Returns up to
/// which chunk.
fn warm(arena: &Arena, data: &Map, from: u32) -> u32 {
    // The last one is being written, most likely.
    let end = arena.chunks().saturating_sub(1).min(WARM_MOST).min(from + WARM_STEP).max(from);
    for chunk in from..end {
        let mut there = arena.bits(chunk, Set::Present);
        let spilled = arena.bits(chunk, Set::Spilled);
        there.iter_mut().zip(spilled).for_each(|(there, spilled)| *there &= !spilled);
        let mut at = 0;
        while let Some(run) = bits::run(&there, at) {
            at = run.end;
            // Holes must not be touched: they would take room. Short runs are not worth the call.
            if run.end - run.start >= 16 {
                let offset = u64::from(chunk) * CHUNK + u64::from(run.start) * PAGE;
                let len = u64::from(run.end - run.start) * PAGE;
                let _ = data.advise(offset, len, libc::MADV_POPULATE_READ);
            }
        }
    }
    end
}
