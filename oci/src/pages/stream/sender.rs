//! The sending end: rounds of changes become a stream.

use std::io::Write;
use std::ops::Range;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use super::codec::{self, MAX_LIST, Tally};
use super::compress::{Chooser, Compression};
use super::error::SendError;
use super::known::Known;
use super::out::Out;
use super::pace::{Bucket, Restraint, Share};
use super::plan::{Change, Plan, each_page, in_order, pages};
use super::stats::RoundStats;
use super::worker::{Pace, PageSource, Tables, Worker, lock};

/// Nice value of workers beside a running container.
const NICE: i32 = 19;
/// Pages that are worth another thread.
const WORTH_A_THREAD: u64 = 128;

/// How memory is sent.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads that read, hash and compress, at least 1.
    pub threads: usize,
    /// Most bytes per second on the wire while the container runs; a frozen round is not slowed.
    pub bandwidth: Option<u64>,
    /// Whether pages are compressed.
    pub compression: Compression,
    /// Pages whose hashes are remembered; 20 to 24 bytes each. Pages beyond are sent each time.
    pub remember: u64,
    /// CPU time used while the container runs; `None` for as much as there is.
    pub restraint: Option<Restraint>,
}

impl Default for Options {
    /// Two threads or one per CPU, no limit of the bandwidth, compression when it pays, hashes of
    /// 64 GB, 3 to 25 % of the CPUs.
    fn default() -> Self {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        Self {
            threads: cpus.min(2),
            bandwidth: None,
            compression: Compression::Auto,
            remember: 16 << 20,
            restraint: Some(Restraint { least: cpus as f64 * 0.03, most: cpus as f64 * 0.25 }),
        }
    }
}

/// Sends memory, round after round, and knows what the destination holds.
///
/// The first round has to list every page that is there; pages from an earlier attempt that it does
/// not list are removed from the destination.
pub struct Sender {
    options: Options,
    known: Known,
    /// The destination holds more from an earlier attempt than can be remembered: processes.
    discard: Vec<u32>,
    chooser: Chooser,
    bucket: Option<Bucket>,
    share: Option<Mutex<Share>>,
    tally: Tally,
    round: u32,
    /// Pages that frozen rounds have sent, not yet marked in `known`.
    unhashed: Vec<(u32, Range<u64>)>,
    vanished: Vec<(i32, Range<u64>)>,
    began: Instant,
    failed: bool,
}

impl Sender {
    /// A sender to a destination that holds nothing.
    pub fn new(options: Options) -> Self {
        let now = Instant::now();
        Self {
            known: Known::new(options.remember),
            discard: Vec::new(),
            chooser: Chooser::new(options.compression, options.threads as f64),
            bucket: options.bandwidth.map(|rate| Bucket::new(rate, now)),
            share: options.restraint.map(|restraint| Mutex::new(Share::new(restraint, now))),
            tally: Tally::new(),
            round: 0,
            unhashed: Vec::new(),
            vanished: Vec::new(),
            began: now,
            failed: false,
            options,
        }
    }

    /// Learns of a page that the destination holds from an earlier attempt, by its xxh3-128. To be
    /// called for all of them before the first round.
    pub fn learn(&mut self, space: u32, addr: u64, hash: u128) {
        if (!self.discard.is_empty() || !self.known.learn(space, addr, hash))
            && self.discard.last() != Some(&space)
        {
            self.discard.push(space);
        }
    }

    /// Sends one round and its end. With `frozen` no process runs: then every page that is listed
    /// has to be there, and all go as they are, as soon as they are read.
    ///
    /// Pages are read and written by [`Options::threads`] threads. `out` may block: the workers
    /// wait then. It is flushed at the end.
    ///
    /// # Errors
    /// When memory cannot be read, or `out` fails. What the destination holds is unknown then, and
    /// every later round is refused.
    pub fn round(
        &mut self,
        frozen: bool,
        changes: &[Change<'_>],
        source: &dyn PageSource,
        out: &mut (dyn Write + Send),
    ) -> Result<RoundStats, SendError> {
        if std::mem::replace(&mut self.failed, true) {
            return Err(SendError::Failed);
        }
        let begin = Instant::now();
        self.round += 1;
        self.vanished.clear();
        for (space, range) in self.unhashed.drain(..) {
            each_page(&range, |addr| self.known.overwrite(space, addr));
        }
        let ranges = changes.iter().map(in_order).collect::<Result<Vec<_>, _>>()?;
        let (first, checks) = self.first(changes);
        checks.iter().for_each(|check| self.tally.add(*check, 0));
        out.write_all(&first).map_err(SendError::Write)?;
        let alive: Vec<_> = changes
            .iter()
            .zip(&ranges)
            .filter(|(change, _)| !change.exited)
            .map(|(change, written)| Change { written, ..*change })
            .collect();
        let mut stats = self.slices(frozen, &alive, source, out)?;
        stats.bytes += first.len() as u64;
        if frozen {
            self.unhashed = alive
                .iter()
                .flat_map(|change| change.written.iter().map(|range| (change.space, range.clone())))
                .collect();
        }
        stats.bytes += self.last(out).map_err(SendError::Write)?;
        stats.round = self.round;
        stats.frozen = frozen;
        stats.took = begin.elapsed();
        self.failed = false;
        Ok(stats)
    }

    /// Pages of the last round, by pid of this host, that had vanished when they were to be read. What is
    /// there now has to be listed by the next round.
    pub fn vanished(&self) -> &[(i32, Range<u64>)] {
        &self.vanished
    }

    /// What comes before all pages: what is gone. With the checks of the records.
    fn first(&mut self, changes: &[Change<'_>]) -> (Vec<u8>, Vec<u64>) {
        let (mut bytes, mut checks) = (Vec::new(), Vec::new());
        if self.round == 1 {
            codec::put_header(&mut bytes);
        }
        if !self.discard.is_empty() {
            self.known = Known::new(self.options.remember);
            self.discard.sort_unstable();
            self.discard.dedup();
            let gone = self.discard.drain(..);
            checks.extend(gone.map(|space| codec::put_space_gone(&mut bytes, space)));
        }
        for change in changes.iter().filter(|change| change.exited) {
            if self.known.clear_range(change.space, &(0..u64::MAX)) {
                checks.push(codec::put_space_gone(&mut bytes, change.space));
            }
        }
        for change in changes.iter().filter(|change| !change.exited) {
            let known = &mut self.known;
            let gone = change.absent.iter().filter(|range| known.clear_range(change.space, range));
            let gone: Vec<_> = gone.cloned().collect();
            for gone in gone.chunks(MAX_LIST) {
                checks.push(codec::put_gone(&mut bytes, change.space, gone));
            }
        }
        (bytes, checks)
    }

    /// Sends what is listed as written.
    fn slices(
        &mut self,
        frozen: bool,
        changes: &[Change<'_>],
        source: &dyn PageSource,
        out: &mut (dyn Write + Send),
    ) -> Result<RoundStats, SendError> {
        let listed = pages(changes);
        let worth = listed.div_ceil(WORTH_A_THREAD).clamp(1, self.options.threads.max(1) as u64);
        let threads = worth as usize;
        let plan = Plan::new(changes);
        let bucket = if frozen { None } else { self.bucket.as_mut() };
        let out = Out::new(out, &mut self.tally, bucket);
        let pace = if frozen {
            Pace::Frozen
        } else {
            self.chooser.resume();
            let tables = Tables { known: &mut self.known, chooser: &mut self.chooser, tickets: 0 };
            let share = self.share.as_ref();
            if let Some(share) = share {
                lock(share).resume(threads, Instant::now());
            }
            let (cpus, began) = (threads as f64, self.began);
            Pace::Live { tables: Mutex::new(tables), share, cpus, began }
        };
        let work = || Worker::new(&plan, source, &out).run(&pace);
        let results = run(threads, !frozen, &work);
        let mut stats = RoundStats { listed, ..RoundStats::default() };
        for result in results {
            if let Some((more, vanished)) = result? {
                stats.add(&more);
                self.vanished.extend(vanished);
            }
        }
        let written = out.done();
        stats.bytes = written.bytes;
        stats.blocked = written.writing;
        stats.limited = written.asleep;
        Ok(stats)
    }

    /// What comes after all pages: remnants of an earlier attempt go, and the round ends. Gives its
    /// length in bytes.
    fn last(&mut self, out: &mut (dyn Write + Send)) -> std::io::Result<u64> {
        let mut bytes = Vec::new();
        if self.round == 1 && self.known.unseen() {
            for (space, range) in self.unhashed.drain(..) {
                each_page(&range, |addr| self.known.overwrite(space, addr));
            }
            let left = self.known.take_unseen();
            for left in left.chunk_by(|a, b| a.0 == b.0) {
                let ranges: Vec<_> = left.iter().map(|(_, range)| range.clone()).collect();
                for ranges in ranges.chunks(MAX_LIST) {
                    self.tally.add(codec::put_gone(&mut bytes, left[0].0, ranges), 0);
                }
            }
        }
        codec::put_round_end(&mut bytes, self.round, self.tally.take());
        out.write_all(&bytes)?;
        out.flush()?;
        Ok(bytes.len() as u64)
    }
}

/// Runs `work` on `threads` threads, `beside` others without getting in their way.
fn run<T: Send>(threads: usize, beside: bool, work: &(impl Fn() -> T + Sync)) -> Vec<T> {
    let niced = || {
        // It can only be raised for good, so never on a thread that is not our own.
        if beside && let Err(error) = rustix::process::setpriority_process(None, NICE) {
            log::debug!("nice value of a thread that copies pages: {error}");
        }
        work()
    };
    thread::scope(|scope| {
        let spawned = threads - usize::from(!beside);
        let spawn = |_| thread::Builder::new().name("pages".into()).spawn_scoped(scope, niced).ok();
        let others: Vec<_> = (0..spawned).filter_map(spawn).collect();
        let mut results = Vec::new();
        if !beside || others.is_empty() {
            results.push(work());
        }
        for other in others {
            match other.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}
