//! What a worker needs after its predecessor was killed: memory that keeper and workers share.
//!
//! ```text
//! words: orders of the keeper, counters │ the restore's socket │ contexts │ two event logs each
//! ```
//!
//! A context is one descriptor through which a task's faults come: those that CRIU sent (*roots*),
//! added by the keeper, and those of children they forked, added by the worker. Each side has entries
//! of its own, so nobody waits for anybody.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use super::uffd::MESSAGE;
use crate::pages::store::sys::{self, Map};

/// Tasks that a restore may have.
pub(super) const ROOTS: usize = 512;
/// Contexts altogether.
pub(super) const CONTEXTS: usize = 8192;
/// Records of one event log.
pub(super) const SLOTS: u64 = if cfg!(test) { 128 } else { 1 << 16 };
/// Messages read at once.
pub(super) const BATCH: u64 = 32;
/// Buckets of the histogram of how long faults took.
pub(super) const BUCKETS: usize = 96;

const WORDS: u64 = 512;
const CONTEXT_WORDS: u64 = 8;
const AREA: u64 = WORDS * 8;
const CONTEXT_AREA: u64 = CONTEXTS as u64 * CONTEXT_WORDS * 8;
const LOGS: u64 = AREA + CONTEXT_AREA;
const LOG: u64 = SLOTS * MESSAGE;

/// Single words.
#[derive(Clone, Copy)]
pub(super) enum Word {
    /// The memory is complete; serve.
    Final,
    /// 0: fill when the time comes, 1: fill, 2: do not.
    Fill,
    /// When the restore was over, ns of the monotonic clock; 0 before.
    Marker,
    /// All is in.
    Done,
    /// The restore's socket, plus one.
    LazyFd,
    /// What the restore sent last and has not been dealt with.
    Said,
    /// When the first descriptor came, ns.
    FirstFd,
    /// When the first fault was answered, ns.
    FirstFault,
    Left,
    Faults,
    Zeros,
    ByFault,
    Filled,
    Forks,
    Errors,
    Contexts,
    Restarts,
    #[cfg(any(test, feature = "fault-points"))]
    Point,
    #[cfg(any(test, feature = "fault-points"))]
    PointAfter,
    #[cfg(any(test, feature = "fault-points"))]
    PointTimes,
    /// The first bucket of the histogram; the others follow.
    Bucket,
    /// Control data of the restore's socket lies from here on, 8 words.
    Control = 256,
}

/// Words of a context.
#[derive(Clone, Copy)]
pub(super) enum Field {
    State,
    Fd,
    /// Inode of the descriptor: its number may have been given to another since.
    Inode,
    Space,
    /// The context that forked, plus one; 0 once that one's log says that this one is known.
    Parent,
    /// Where in the parent's log the fork is: generation of the log and record.
    Position,
    /// Generation of the event log. Odd ones lie in the second half.
    Log,
}

/// States of a context.
pub(super) const FREE: u64 = 0;
/// Being described.
pub(super) const CLAIMED: u64 = 1;
/// Served.
pub(super) const LIVE: u64 = 2;
/// Its log did not suffice: only the worker of this moment can serve it.
pub(super) const LOST: u64 = 3;
/// Its descriptor is being closed.
pub(super) const CLOSING: u64 = 4;

/// The shared memory.
pub(super) struct Shared {
    map: Map,
    file: File,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        let len = LOGS + CONTEXTS as u64 * 2 * LOG;
        let file = sys::memory_file(c"ferry-faults", len)?;
        Ok(Self { map: Map::new(&file, len, true)?, file })
    }

    /// The file that it lies in, which has to stay open.
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Has pages stay in memory once touched. The kernel must never have to wait when it writes a
    /// message: a kill at that moment would lose it.
    pub(super) fn lock(&self) {
        if let Err(e) = self.map.lock_on_fault(0, LOGS + CONTEXTS as u64 * 2 * LOG) {
            log::warn!("event logs may be swapped out: {e}");
        }
    }

    /// Forgets everything but the number of restarts.
    pub(super) fn reset(&self) -> io::Result<()> {
        let restarts = self.get(Word::Restarts);
        sys::punch(&self.file, 0, LOGS + CONTEXTS as u64 * 2 * LOG)?;
        self.put(Word::Restarts, restarts);
        Ok(())
    }

    pub(super) fn word(&self, word: Word) -> &AtomicU64 {
        &self.map.words(word as u64 * 8, 1)[0]
    }

    pub(super) fn get(&self, word: Word) -> u64 {
        self.word(word).load(Ordering::Acquire)
    }

    pub(super) fn put(&self, word: Word, value: u64) {
        self.word(word).store(value, Ordering::Release);
    }

    pub(super) fn add(&self, word: Word, value: u64) {
        self.word(word).fetch_add(value, Ordering::Relaxed);
    }

    /// Address and size of `count` words from `word` on, for the kernel to write to.
    pub(super) fn buffer(&self, word: Word, count: u64) -> (u64, u64) {
        (self.map.address(word as u64 * 8, count * 8), count * 8)
    }

    /// `count` words from `word` on.
    pub(super) fn words(&self, word: Word, count: u64) -> &[AtomicU64] {
        self.map.words(word as u64 * 8, count)
    }

    /// The histogram: see [`bucket`].
    pub(super) fn buckets(&self) -> &[AtomicU64] {
        self.map.words(Word::Bucket as u64 * 8, BUCKETS as u64)
    }

    /// A word of a context.
    pub(super) fn field(&self, context: usize, field: Field) -> &AtomicU64 {
        assert!(context < CONTEXTS, "no such context");
        &self.map.words(AREA + context as u64 * CONTEXT_WORDS * 8 + field as u64 * 8, 1)[0]
    }

    pub(super) fn read(&self, context: usize, field: Field) -> u64 {
        self.field(context, field).load(Ordering::Acquire)
    }

    pub(super) fn write(&self, context: usize, field: Field, value: u64) {
        self.field(context, field).store(value, Ordering::Release);
    }

    /// A free context among roots or among children. Killed before it is live, it is free again.
    pub(super) fn claim(&self, child: bool) -> Option<usize> {
        let mut among = if child { ROOTS..CONTEXTS } else { 0..ROOTS };
        let free = among.find(|at| self.read(*at, Field::State) == FREE)?;
        self.write(free, Field::State, CLAIMED);
        Some(free)
    }

    fn slot(&self, context: usize, generation: u64, slot: u64) -> u64 {
        assert!(context < CONTEXTS && slot < SLOTS, "no such record");
        LOGS + (context as u64 * 2 + generation % 2) * LOG + slot * MESSAGE
    }

    /// One record of an event log.
    pub(super) fn record(&self, context: usize, generation: u64, slot: u64) -> [u64; 4] {
        let words = self.map.words(self.slot(context, generation, slot), MESSAGE / 8);
        std::array::from_fn(|at| words[at].load(Ordering::Acquire))
    }

    /// Writes one record; its first word comes last, as it says that the record is there.
    pub(super) fn set_record(&self, context: usize, generation: u64, slot: u64, record: [u64; 4]) {
        let words = self.map.words(self.slot(context, generation, slot), MESSAGE / 8);
        for at in [3, 2, 1, 0] {
            words[at].store(record[at], Ordering::Release);
        }
    }

    /// Address of records for the kernel to write to, `count` of them. They are in memory already.
    pub(super) fn records(&self, context: usize, generation: u64, slot: u64, count: u64) -> u64 {
        assert!(slot + count <= SLOTS, "beyond the log");
        let offset = self.slot(context, generation, slot);
        for record in 0..count {
            self.map.words(offset + record * MESSAGE, 1)[0].fetch_or(0, Ordering::Relaxed);
        }
        self.map.address(offset, count * MESSAGE)
    }

    /// Empties an event log.
    pub(super) fn clear_log(&self, context: usize, generation: u64) -> io::Result<()> {
        sys::punch(&self.file, self.slot(context, generation, 0), LOG)
    }
}

/// Bucket of a time: microseconds up to 64, then by powers of two.
pub(super) fn bucket(nanos: u64) -> usize {
    let micros = nanos / 1000;
    let far = (micros / 64).checked_ilog2().map_or(0, |log| log as usize);
    if micros < 64 { micros as usize } else { (64 + far).min(BUCKETS - 1) }
}

/// The largest time of a bucket, microseconds.
pub(super) fn bucket_micros(bucket: usize) -> u64 {
    if bucket < 64 { bucket as u64 + 1 } else { 64 << (bucket - 63) }
}

/// Now, nanoseconds of the monotonic clock; never 0.
pub(super) fn now() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    let now =
        clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or(nix::sys::time::TimeSpec::new(0, 1));
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
