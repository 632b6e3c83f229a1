//! The one place where workers write: record after record, in the order of their tickets.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::codec::Tally;
use super::pace::Bucket;

/// A stream that several workers write to.
pub(super) struct Out<'a> {
    state: Mutex<State<'a>>,
    turn: Condvar,
}

struct State<'a> {
    writer: &'a mut (dyn Write + Send),
    tally: &'a mut Tally,
    bucket: Option<&'a mut Bucket>,
    /// Ticket whose turn it is.
    next: u64,
    failed: bool,
    bytes: u64,
    writing: Duration,
    asleep: Duration,
}

/// What a round has written.
pub(super) struct Written {
    pub(super) bytes: u64,
    /// Time in which the stream took no more.
    pub(super) writing: Duration,
    /// Time asleep for the bandwidth's sake.
    pub(super) asleep: Duration,
}

/// Another worker has failed, and says why.
pub(super) struct Stopped;

impl<'a> Out<'a> {
    pub(super) fn new(
        writer: &'a mut (dyn Write + Send),
        tally: &'a mut Tally,
        bucket: Option<&'a mut Bucket>,
    ) -> Self {
        let state = State {
            writer,
            tally,
            bucket,
            next: 0,
            failed: false,
            bytes: 0,
            writing: Duration::ZERO,
            asleep: Duration::ZERO,
        };
        Self { state: Mutex::new(state), turn: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `parts`, which are the records with these `checks` and pages, when it is the turn of
    /// `ticket`; at once without one, and then not to be kept in any buffer. How long that took,
    /// without the wait for the turn.
    pub(super) fn write(
        &self,
        ticket: Option<u64>,
        parts: &[&[u8]],
        checks: &[(u64, u64)],
    ) -> Result<io::Result<Duration>, Stopped> {
        let mut state = self.lock();
        while !state.failed && ticket.is_some_and(|ticket| ticket != state.next) {
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.failed {
            return Err(Stopped);
        }
        state.next += u64::from(ticket.is_some());
        let result = state.write(parts, checks, ticket.is_none());
        if result.is_err() {
            state.failed = true;
        }
        drop(state);
        self.turn.notify_all();
        Ok(result)
    }

    /// Lets no worker wait for a turn that will not come.
    pub(super) fn fail(&self) {
        self.lock().failed = true;
        self.turn.notify_all();
    }

    pub(super) fn done(self) -> Written {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        Written { bytes: state.bytes, writing: state.writing, asleep: state.asleep }
    }
}

impl State<'_> {
    fn write(&mut self, parts: &[&[u8]], checks: &[(u64, u64)], now: bool) -> io::Result<Duration> {
        let begin = Instant::now();
        let mut bytes = 0;
        for part in parts.iter().filter(|part| !part.is_empty()) {
            self.writer.write_all(part)?;
            bytes += part.len();
        }
        if now && bytes > 0 {
            self.writer.flush()?;
        }
        for (check, pages) in checks {
            self.tally.add(*check, *pages);
        }
        self.bytes += bytes as u64;
        self.writing += begin.elapsed();
        if let Some(bucket) = &mut self.bucket {
            let now = Instant::now();
            let wait = bucket.pay(bytes, now);
            if !wait.is_zero() {
                std::thread::sleep(wait);
                self.asleep += now.elapsed();
            }
        }
        Ok(begin.elapsed())
    }
}
