//! The keeper's answers to requests.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::sys::socket::SockType;

use super::keeper::{Fate, Keeper};
use super::protocol::{self, Reply, Request, State, Status};
use super::shared::{Shared, Word, bucket_micros};
use crate::pages::store;

/// Answers `request` of connection `at`.
///
/// # Errors
/// Only what the keeper cannot live with.
pub(super) fn answer(
    keeper: &mut Keeper,
    at: usize,
    request: Request,
) -> io::Result<(Reply, Fate)> {
    let refuse = |why: &str| Ok((Reply::Refused(why.to_owned()), Fate::GoOn));
    let over = keeper.shared.get(Word::Marker) != 0;
    let writing = keeper.connections.iter().position(|connection| connection.writer);
    match request {
        Request::Open { container, migration } => {
            if writing.is_some() {
                return refuse("the store has a writer already");
            }
            if keeper.arena.get(store::Word::Sealed) != 0 {
                return refuse("the memory is complete");
            }
            keeper.connections[at].writer = true;
            (keeper.meta.container, keeper.meta.migration) = (container, migration);
            // Written even if nothing else has changed.
            keeper.meta.expires = Some(0);
            keeper.tell();
            return Ok((Reply::Store, Fate::GoOn));
        }
        Request::Listen { path } => {
            if keeper.shared.get(Word::LazyFd) != 0 || keeper.has_tasks() || over {
                return refuse("a restore is under way");
            }
            match listen(&path) {
                Ok(fd) => keeper.listener = Some(fd),
                Err(e) => return refuse(&format!("{}: {e}", path.display())),
            }
            keeper.start_worker()?;
        }
        Request::Final => {
            if writing.is_some_and(|writer| writer != at) {
                return refuse("the store has a writer that is not you");
            }
            keeper.arena.word(store::Word::Sealed).store(1, Ordering::Release);
            keeper.shared.put(Word::Final, 1);
        }
        Request::Fill => keeper.shared.put(Word::Fill, 1),
        Request::HoldFill => keeper.shared.put(Word::Fill, 2),
        Request::Status => {
            let status = status(keeper);
            keeper.connections[at].told = status.state == State::Done;
            return Ok((Reply::Status(Box::new(status)), Fate::GoOn));
        }
        Request::AbortRestore if over => {
            return refuse("the restore is over: its tasks would find zeros");
        }
        Request::AbortRestore => keeper.abort_restore()?,
        Request::Drop if over && keeper.has_tasks() => {
            return refuse("the restore is over: its tasks would find zeros");
        }
        Request::Drop => return Ok((Reply::Done, Fate::End)),
        #[cfg(any(test, feature = "fault-points"))]
        Request::FaultPoint { point, after, times } => {
            keeper.shared.put(Word::PointAfter, after);
            keeper.shared.put(Word::PointTimes, times);
            keeper.shared.put(Word::Point, if times == 0 { 0 } else { point as u64 + 1 });
        }
    }
    keeper.ring();
    Ok((Reply::Done, Fate::GoOn))
}

fn listen(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    if !path.is_absolute() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    protocol::listen(path, SockType::Stream)
}

fn status(keeper: &Keeper) -> Status {
    let shared = &keeper.shared;
    let get = |word| shared.get(word);
    let state = if get(Word::Done) != 0 {
        State::Done
    } else if get(Word::Marker) != 0 {
        State::Running
    } else if get(Word::LazyFd) != 0 {
        State::Restoring
    } else if get(Word::Final) != 0 {
        State::Complete
    } else {
        State::Receiving
    };
    let (first, answered) = (get(Word::FirstFd), get(Word::FirstFault));
    Status {
        state,
        container: keeper.meta.container.clone(),
        migration: keeper.meta.migration.clone(),
        writer: keeper.connections.iter().any(|connection| connection.writer),
        pages: keeper.arena.get(store::Word::Pages),
        spilled: keeper.arena.get(store::Word::Spilled),
        tasks: get(Word::Contexts),
        pages_left: get(Word::Left),
        faults: get(Word::Faults),
        zero_pages: get(Word::Zeros),
        fault_pages: get(Word::ByFault),
        filled: get(Word::Filled),
        forks: get(Word::Forks),
        errors: get(Word::Errors),
        restarts: get(Word::Restarts),
        fault_p50: quantile(shared, 50),
        fault_p99: quantile(shared, 99),
        first_fault: (answered != 0).then(|| answered.saturating_sub(first) / 1000),
        keeper: std::process::id(),
        worker: keeper.worker.as_ref().map(|worker| worker.pid.cast_unsigned()),
    }
}

/// A quantile of the times that faults took, microseconds.
fn quantile(shared: &Shared, percent: u64) -> u64 {
    let counts: Vec<u64> =
        shared.buckets().iter().map(|count| count.load(Ordering::Relaxed)).collect();
    let wanted = (counts.iter().sum::<u64>() * percent).div_ceil(100);
    let mut seen = 0;
    let bucket = counts.iter().position(|count| {
        seen += count;
        seen >= wanted
    });
    if wanted == 0 { 0 } else { bucket.map_or(0, bucket_micros) }
}
