//! What each worker does with a slice of memory, from reading to writing.
//!
//! The order inside a slice matters. Its records go out as *gone, pages, same*, so no page of it may
//! be taken for another's source before it has its new contents: first everything that changes is
//! marked so, then it is decided what to send.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use twox_hash::XxHash3_128;
use zstd::bulk::Compressor;

use super::codec::{self, BATCH, RAW, Run, SameRun, ZSTD};
use super::compress::{Chooser, LEVEL, Measured};
use super::error::SendError;
use super::known::Known;
use super::out::{Out, Stopped};
use super::pace::{Rest, Share};
use super::plan::{Change, Plan};
use super::stats::RoundStats;
use crate::pages::PAGE;

/// A page in a buffer.
const BYTES: usize = PAGE as usize;
/// A batch that does not get smaller than this part of itself, in eighths, is sent plain.
const WORTH: usize = 7;

/// Where pages are read: the memory of a process.
pub trait PageSource: Sync {
    /// Reads `ranges` of process `pid` (of this host), and calls `each` with addresses and contents,
    /// always whole pages and in the order of their addresses. Pages that have vanished are left out.
    /// Called by several threads at once, with at most 256 KB each time.
    ///
    /// # Errors
    /// When the process cannot be read at all. One that has ended is no error.
    fn read(
        &self,
        pid: i32,
        ranges: &[Range<u64>],
        each: &mut (dyn FnMut(u64, &[u8]) + Send),
    ) -> io::Result<()>;
}

/// What the workers of a pre-copy round share.
pub(super) struct Tables<'a> {
    pub(super) known: &'a mut Known,
    pub(super) chooser: &'a mut Chooser,
    pub(super) tickets: u64,
}

/// How a round is run.
pub(super) enum Pace<'a> {
    /// Beside the container.
    Live { tables: Mutex<Tables<'a>>, share: Option<&'a Mutex<Share>>, cpus: f64, began: Instant },
    /// While it stands still: as fast as possible, and nothing is looked up.
    Frozen,
}

/// One thread's buffers.
pub(super) struct Worker<'a, 'o> {
    plan: &'a Plan<'a>,
    source: &'a dyn PageSource,
    out: &'a Out<'o>,
    ranges: Vec<Range<u64>>,
    /// Addresses of pages that are not zero, their contents and their hashes.
    pages: Vec<u64>,
    contents: Vec<u8>,
    hashes: Vec<u128>,
    zeros: Vec<u64>,
    gone: Vec<Range<u64>>,
    same: Vec<SameRun>,
    runs: Vec<Run>,
    before: Vec<u8>,
    after: Vec<u8>,
    packed: Vec<u8>,
    checks: Vec<(u64, u64)>,
    compressor: Option<Compressor<'static>>,
    measured: Measured,
    stats: RoundStats,
    vanished: Vec<(i32, Range<u64>)>,
}

/// What a worker has to tell: numbers, and pages that it could not read.
pub(super) type Told = (RoundStats, Vec<(i32, Range<u64>)>);

/// Stops all workers when one does not come to its end.
struct Guard<'a, 'o>(&'a Out<'o>);

impl Drop for Guard<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail();
        }
    }
}

impl<'a, 'o> Worker<'a, 'o> {
    pub(super) fn new(plan: &'a Plan<'a>, source: &'a dyn PageSource, out: &'a Out<'o>) -> Self {
        Self {
            plan,
            source,
            out,
            ranges: Vec::new(),
            pages: Vec::with_capacity(BATCH),
            contents: Vec::with_capacity(BATCH * BYTES),
            hashes: Vec::with_capacity(BATCH),
            zeros: Vec::new(),
            gone: Vec::new(),
            same: Vec::new(),
            runs: Vec::new(),
            before: Vec::new(),
            after: Vec::new(),
            packed: Vec::new(),
            checks: Vec::new(),
            compressor: None,
            measured: Measured::default(),
            stats: RoundStats::default(),
            vanished: Vec::new(),
        }
    }

    /// Works until nothing is left. `None` when another worker has failed.
    pub(super) fn run(mut self, pace: &Pace<'_>) -> Result<Option<Told>, SendError> {
        let _guard = Guard(self.out);
        let mut rest = Rest::default();
        while let Some(change) = self.plan.next(&mut self.ranges) {
            let begin = Instant::now();
            let done = match pace {
                Pace::Live { tables, share, cpus, began } => {
                    let cpus = share.map_or(*cpus, |share| lock(share).cpus());
                    self.live(change, tables, cpus, *began)
                }
                Pace::Frozen => self.frozen(change),
            };
            let idle = match done {
                Ok(Ok(idle)) => idle,
                Ok(Err(Stopped)) => return Ok(None),
                Err(error) => {
                    self.out.fail();
                    return Err(error);
                }
            };
            if let Pace::Live { share: Some(share), .. } = pace {
                let now = Instant::now();
                let due = lock(share).worked((now - begin).saturating_sub(idle), now);
                rest.take(due);
            }
        }
        Ok(Some((self.stats, self.vanished)))
    }

    /// One slice of a container that runs. How much time was not spent on a CPU.
    fn live(
        &mut self,
        change: &Change<'_>,
        tables: &Mutex<Tables<'_>>,
        cpus: f64,
        began: Instant,
    ) -> Result<Result<Duration, Stopped>, SendError> {
        let begin = Instant::now();
        self.read(change, true)?;
        self.measured.reading = begin.elapsed();
        let (ticket, pack) = {
            let mut tables = lock(tables);
            let Tables { known, chooser, tickets } = &mut *tables;
            self.decide(change.space, known);
            let pack = chooser.next(&self.measured, began.elapsed(), cpus);
            *tickets += 1;
            (*tickets - 1, pack)
        };
        self.measured = Measured { reading: self.measured.reading, ..Measured::default() };
        self.encode(change.space, pack)?;
        let waiting = Instant::now();
        let written = match self.write(Some(ticket)) {
            Ok(written) => written.map_err(SendError::Write)?,
            Err(stopped) => return Ok(Err(stopped)),
        };
        self.measured.writing = written;
        Ok(Ok(waiting.elapsed()))
    }

    /// One slice of a container that stands still.
    fn frozen(&mut self, change: &Change<'_>) -> Result<Result<Duration, Stopped>, SendError> {
        self.read(change, false)?;
        if self.stats.vanished > 0 {
            return Err(SendError::Unread { pid: change.pid, pages: self.stats.vanished });
        }
        self.gone.clear();
        self.zeros.iter().for_each(|addr| extend(&mut self.gone, *addr));
        self.same.clear();
        self.encode(change.space, false)?;
        match self.write(None) {
            Ok(written) => written.map(|_| Ok(Duration::ZERO)).map_err(SendError::Write),
            Err(stopped) => Ok(Err(stopped)),
        }
    }

    /// Reads the slice, and tells pages of zeros from others.
    fn read(&mut self, change: &Change<'_>, hash: bool) -> Result<(), SendError> {
        let Self { pages, contents, hashes, zeros, ranges, .. } = self;
        pages.clear();
        contents.clear();
        hashes.clear();
        zeros.clear();
        let mut each = |addr: u64, bytes: &[u8]| {
            for (page, addr) in bytes.chunks_exact(BYTES).zip((addr..).step_by(BYTES)) {
                if is_zero(page) {
                    zeros.push(addr);
                } else {
                    pages.push(addr);
                    contents.extend_from_slice(page);
                    if hash {
                        // 0 marks pages that are known, below; it and 1 mean no hash in the table.
                        hashes.push(XxHash3_128::oneshot(page).max(2));
                    }
                }
            }
        };
        self.source
            .read(change.pid, ranges, &mut each)
            .map_err(|source| SendError::Read { pid: change.pid, source })?;
        let listed: u64 = ranges.iter().map(|range| (range.end - range.start) / PAGE).sum();
        let read = (pages.len() + zeros.len()) as u64;
        self.stats.read += read;
        self.stats.zero += zeros.len() as u64;
        if read < listed {
            self.stats.vanished += listed - read;
            self.note_vanished(change.pid);
        }
        Ok(())
    }

    /// Notes what was listed and neither came as zeros nor as anything else.
    fn note_vanished(&mut self, pid: i32) {
        let mut gone = Vec::new();
        for range in &self.ranges {
            let addresses = (range.start..range.end).step_by(BYTES);
            let missing = addresses.filter(|addr| {
                self.pages.binary_search(addr).is_err() && self.zeros.binary_search(addr).is_err()
            });
            missing.for_each(|addr| extend(&mut gone, addr));
        }
        self.vanished.extend(gone.into_iter().map(|range| (pid, range)));
    }

    /// Leaves in `pages` and `contents` what has to be sent, in `same` what is repeated, in `gone`
    /// what has become zero.
    fn decide(&mut self, space: u32, known: &mut Known) {
        self.gone.clear();
        self.same.clear();
        for addr in &self.zeros {
            if known.clear(space, *addr) {
                extend(&mut self.gone, *addr);
            }
        }
        for (addr, hash) in self.pages.iter().zip(&mut self.hashes) {
            if known.holds(space, *addr, *hash) {
                *hash = 0;
            } else {
                known.overwrite(space, *addr);
            }
        }
        let mut kept = 0;
        for at in 0..self.pages.len() {
            let (addr, hash) = (self.pages[at], self.hashes[at]);
            if hash == 0 {
                self.stats.known += 1;
            } else if let Some(from) = known.find(hash) {
                known.copied(space, addr, hash);
                extend_same(&mut self.same, addr, from);
                self.stats.same += 1;
            } else {
                known.sent(space, addr, hash);
                if kept != at {
                    self.pages[kept] = addr;
                    self.contents.copy_within(at * BYTES..(at + 1) * BYTES, kept * BYTES);
                }
                kept += 1;
            }
        }
        self.pages.truncate(kept);
        self.contents.truncate(kept * BYTES);
    }

    /// Makes the slice's records.
    fn encode(&mut self, space: u32, pack: bool) -> Result<(), SendError> {
        self.before.clear();
        self.after.clear();
        self.packed.clear();
        self.checks.clear();
        if !self.gone.is_empty() {
            let check = codec::put_gone(&mut self.before, space, &self.gone);
            self.checks.push((check, 0));
        }
        if !self.pages.is_empty() {
            if pack {
                self.pack()?;
            }
            self.runs.clear();
            self.pages.iter().for_each(|addr| codec::extend_runs(&mut self.runs, *addr));
            let pages = self.pages.len() as u64;
            let (encoding, contents, sent) = if self.packed.is_empty() {
                (RAW, &self.contents, &mut self.stats.raw)
            } else {
                (ZSTD, &self.packed, &mut self.stats.zstd)
            };
            *sent += pages;
            let before = &mut self.before;
            let check =
                codec::put_pages(before, space, &self.runs, encoding, contents, &self.contents);
            self.checks.push((check, pages));
        }
        if !self.same.is_empty() {
            let check = codec::put_same(&mut self.after, space, &self.same);
            let pages = self.same.iter().map(|run| u64::from(run.pages)).sum();
            self.checks.push((check, pages));
        }
        Ok(())
    }

    /// Compresses the contents, if that is worth it.
    fn pack(&mut self) -> Result<(), SendError> {
        let begin = Instant::now();
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(LEVEL).map_err(SendError::Compress)?),
        };
        let most = self.contents.len() * WORTH / 8;
        self.packed.resize(zstd::zstd_safe::compress_bound(self.contents.len()), 0);
        let length = compressor
            .compress_to_buffer(&self.contents, &mut self.packed[..])
            .map_err(SendError::Compress)?;
        self.packed.truncate(if length <= most { length } else { 0 });
        let wire = length.min(self.contents.len());
        self.measured.packed = (self.contents.len() as u64, wire as u64);
        self.measured.packing = begin.elapsed();
        Ok(())
    }

    fn write(&mut self, ticket: Option<u64>) -> Result<io::Result<Duration>, Stopped> {
        let contents: &[u8] = if self.packed.is_empty() { &self.contents } else { &self.packed };
        let parts = [&self.before[..], contents, &self.after];
        self.measured.plain = self.contents.len() as u64;
        self.measured.wire = parts.iter().map(|part| part.len() as u64).sum();
        self.out.write(ticket, &parts, &self.checks)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether all bytes are zero. Most pages that are not show it in their first bytes.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(128).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Adds page `addr` to `ranges`.
fn extend(ranges: &mut Vec<Range<u64>>, addr: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == addr => last.end += PAGE,
        _ => ranges.push(addr..addr + PAGE),
    }
}

/// Adds page `addr`, a copy of `from`, to `runs`.
fn extend_same(runs: &mut Vec<SameRun>, addr: u64, from: (u32, u64)) {
    if let Some(run) = runs.last_mut() {
        let bytes = u64::from(run.pages) * PAGE;
        if (run.addr + bytes, run.from_space, run.from_addr + bytes) == (addr, from.0, from.1) {
            run.pages += 1;
            return;
        }
    }
    runs.push(SameRun { addr, from_space: from.0, from_addr: from.1, pages: 1 });
}
