//! The event log of a context: what its task did to its memory, for the next worker to replay.
//!
//! The kernel writes messages straight into the log (it is the buffer of read(2), and empty before), so
//! a worker that is killed right after the read has lost nothing. A batch that changed nothing is
//! wiped out again. A log that is full is rewritten as the table it led to, into its other half.

use std::io;
use std::os::fd::RawFd;

use super::super::points::{self, Point};
use super::super::segments::{Segment, Segments};
use super::super::shared::{BATCH, Field, SLOTS, Shared};
use super::super::uffd::{self, MESSAGE};

/// Records of our own: the table of segments begins; one of its segments; a fork that was dealt with.
pub(super) const TABLE: u8 = 0xf0;
pub(super) const SEGMENT: u8 = 0xf1;
pub(super) const FORKED: u8 = 0xf2;

/// One log. What is in it lies in shared memory; this is where we are.
#[derive(Debug)]
pub(super) struct EventLog {
    context: usize,
    generation: u64,
    /// The first free record.
    tail: u64,
}

impl EventLog {
    /// Opens the log of `context` and returns all records.
    pub(super) fn open(shared: &Shared, context: usize) -> (Self, Vec<[u64; 4]>) {
        let generation = shared.read(context, Field::Log);
        let mut records = Vec::new();
        while let Some(slot) = Some(records.len() as u64).filter(|slot| *slot < SLOTS) {
            match shared.record(context, generation, slot) {
                [0, ..] => break,
                record => records.push(record),
            }
        }
        let log = Self { context, generation, tail: records.len() as u64 };
        // The rest of a batch that was being wiped out.
        log.discard(shared, BATCH.min(SLOTS - log.tail));
        (log, records)
    }

    /// Begins the log of a forked child with the segments it inherits. False if they do not fit.
    pub(super) fn begin(shared: &Shared, context: usize, segments: &Segments) -> io::Result<bool> {
        shared.clear_log(context, 1)?;
        shared.write(context, Field::Log, 0);
        Ok(Self::write_table(shared, context, 0, segments)?.is_some())
    }

    /// Writes `segments` as the beginning of a log. Returns the first free record, if they fit.
    fn write_table(
        shared: &Shared,
        context: usize,
        generation: u64,
        segments: &Segments,
    ) -> io::Result<Option<u64>> {
        shared.clear_log(context, generation)?;
        let tail = segments.len() as u64 + 1;
        if tail + BATCH > SLOTS {
            return Ok(None);
        }
        shared.set_record(context, generation, 0, [u64::from(TABLE), 0, 0, 0]);
        for (slot, Segment { run, len, orig }) in (1..).zip(segments.iter()) {
            shared.set_record(context, generation, slot, [u64::from(SEGMENT), run, len, orig]);
        }
        Ok(Some(tail))
    }

    /// Whether another batch fits.
    pub(super) fn has_room(&self) -> bool {
        self.tail + BATCH <= SLOTS
    }

    /// Where in the log record `at` of the batch that was just read lies.
    pub(super) fn position(&self, at: u64) -> u64 {
        self.generation << 32 | (self.tail + at)
    }

    /// Position of any record.
    pub(super) fn position_of(&self, slot: u64) -> u64 {
        self.generation << 32 | slot
    }

    /// Reads a batch of messages. It is neither kept nor wiped out yet.
    pub(super) fn read(&self, shared: &Shared, fd: RawFd) -> io::Result<Vec<[u64; 4]>> {
        let buffer = shared.records(self.context, self.generation, self.tail, BATCH);
        let count = uffd::read(fd, buffer, BATCH * MESSAGE)? / MESSAGE;
        Ok((0..count)
            .map(|at| shared.record(self.context, self.generation, self.tail + at))
            .collect())
    }

    /// Keeps the batch.
    pub(super) fn keep(&mut self, count: u64) {
        self.tail += count;
    }

    /// Wipes the batch out, last record first: what is left of it is always a part that was read.
    pub(super) fn discard(&self, shared: &Shared, count: u64) {
        for at in (0..count).rev() {
            shared.set_record(self.context, self.generation, self.tail + at, [0; 4]);
        }
    }

    /// Rewrites the log as a table of segments. False if they do not fit.
    pub(super) fn rewrite(&mut self, shared: &Shared, segments: &Segments) -> io::Result<bool> {
        let next = self.generation + 1;
        let Some(tail) = Self::write_table(shared, self.context, next, segments)? else {
            return Ok(false);
        };
        points::hit(shared, Point::Compacted);
        shared.write(self.context, Field::Log, next);
        (self.generation, self.tail) = (next, tail);
        Ok(true)
    }

    /// Goes back to the beginning of a log that did not suffice. Nothing in it counts any more.
    pub(super) fn give_up(&mut self, shared: &Shared) -> io::Result<()> {
        self.tail = 0;
        shared.clear_log(self.context, self.generation)
    }
}
