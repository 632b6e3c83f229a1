//! Reads pages of another process.
//!
//! process_vm_readv(2) takes many ranges in one call and reads 3 to 4 GB/s; it cannot read what the
//! process itself may not read (PROT_NONE), for which there is `/proc/PID/mem`. A page that has
//! vanished since it was listed is no error: it is reported, and the next round will say why.
#![allow(unsafe_code)] // process_vm_readv(2) takes addresses of another process.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::PAGE;

/// Most that one call reads, bytes.
const BATCH: usize = 4 << 20;

/// Most ranges of one call.
const RANGES: usize = 512;

/// What became of a read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReadPages {
    /// How much was read and handed on, bytes.
    pub bytes: u64,
    /// Pages that could not be read: they are gone, or so is the process. Ascending.
    pub missing: Vec<Range<u64>>,
}

/// Reads `ranges` (page aligned) of process `pid` with up to `threads` threads, and hands every piece
/// to `sink` with its addresses. Pieces of one thread come in ascending order; with several threads
/// the sink is called by all of them at once.
///
/// # Errors
/// The first error of the sink: nothing more is read then. Or no thread could be started.
pub fn read_pages(
    pid: i32,
    ranges: &[Range<u64>],
    threads: usize,
    sink: impl Fn(Range<u64>, &[u8]) -> io::Result<()> + Sync,
) -> io::Result<ReadPages> {
    let batches = batches(ranges);
    let threads = threads.clamp(1, batches.len().max(1));
    let mem = OnceLock::new();
    let next = AtomicUsize::new(0);
    let total = Mutex::new(ReadPages::default());
    let work = || -> io::Result<()> {
        let mut batch = Batch { pid, mem: &mem, buffer: Vec::new(), done: ReadPages::default() };
        let outcome = loop {
            let Some(ranges) = batches.get(next.fetch_add(1, Ordering::Relaxed)) else {
                break Ok(());
            };
            if let Err(error) = batch.read(ranges, &sink) {
                next.store(batches.len(), Ordering::Relaxed);
                break Err(error);
            }
        };
        let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
        total.bytes += batch.done.bytes;
        total.missing.append(&mut batch.done.missing);
        outcome
    };
    std::thread::scope(|scope| {
        let others = (1..threads)
            .map(|_| std::thread::Builder::new().name("pages".into()).spawn_scoped(scope, work))
            .collect::<io::Result<Vec<_>>>();
        let mut outcome = work();
        for other in others? {
            let theirs = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(theirs);
        }
        outcome
    })?;
    let mut total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    total.missing.sort_by_key(|r| r.start);
    Ok(total)
}

/// Cuts `ranges` into pieces for one call each.
fn batches(ranges: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
    let mut batches: Vec<Vec<Range<u64>>> = Vec::new();
    let mut room = 0;
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            if room == 0 || batches.last().is_none_or(|b| b.len() == RANGES) {
                batches.push(Vec::new());
                room = BATCH as u64;
            }
            let end = range.end.min(start + room);
            room -= end - start;
            if let Some(batch) = batches.last_mut() {
                batch.push(start..end);
            }
            start = end;
        }
    }
    batches
}

/// One thread's share.
struct Batch<'a> {
    pid: i32,
    /// `/proc/PID/mem`, opened by whoever needs it first.
    mem: &'a OnceLock<Option<File>>,
    buffer: Vec<u8>,
    done: ReadPages,
}

impl Batch<'_> {
    fn read(
        &mut self,
        ranges: &[Range<u64>],
        sink: &impl Fn(Range<u64>, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut ranges = ranges.to_vec();
        while !ranges.is_empty() {
            let size = ranges.iter().map(len).sum::<usize>();
            self.buffer.resize(size.max(self.buffer.len()), 0);
            let mut read = readv(self.pid, &ranges, &mut self.buffer[..size]);
            // Only whole pages count.
            read -= read % PAGE as usize;
            let mut at = 0;
            let mut left = Vec::new();
            for range in &ranges {
                let here = (read - at).min(len(range));
                let middle = range.start + here as u64;
                self.hand_on(range.start..middle, at, sink)?;
                at += here;
                if middle < range.end {
                    left.push(middle..range.end);
                }
            }
            // The first of what is left is where the call gave up.
            if let Some(first) = left.first().cloned() {
                left.remove(0);
                self.read_by_mem(first, sink)?;
            }
            ranges = left;
        }
        Ok(())
    }

    /// Reads a range that process_vm_readv(2) could not read.
    fn read_by_mem(
        &mut self,
        range: Range<u64>,
        sink: &impl Fn(Range<u64>, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mem = self.mem.get_or_init(|| File::open(format!("/proc/{}/mem", self.pid)).ok());
        let mut start = range.start;
        while start < range.end {
            let size = len(&(start..range.end));
            self.buffer.resize(size.max(self.buffer.len()), 0);
            let read = match mem {
                Some(mem) => mem.read_at(&mut self.buffer[..size], start),
                None => Ok(0),
            };
            let (read, missing) = match read {
                // The whole memory is gone.
                Ok(0) => (0, size as u64),
                // A rest of a page cannot be.
                Ok(read) => ((read as u64).next_multiple_of(PAGE), 0),
                Err(_) => (0, PAGE),
            };
            if read > 0 {
                self.hand_on(start..start + read, 0, sink)?;
                start += read;
            } else {
                let pages = start..start + missing;
                start = pages.end;
                match self.done.missing.last_mut() {
                    Some(last) if last.end == pages.start => last.end = pages.end,
                    _ => self.done.missing.push(pages),
                }
            }
        }
        Ok(())
    }

    fn hand_on(
        &mut self,
        range: Range<u64>,
        at: usize,
        sink: &impl Fn(Range<u64>, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.done.bytes += range.end - range.start;
        let bytes = &self.buffer[at..at + len(&range)];
        sink(range, bytes)
    }
}

fn len(range: &Range<u64>) -> usize {
    (range.end - range.start) as usize
}

/// Reads `ranges` one behind the other into `buffer`, which has room for them. Gives how many bytes
/// were read before the first that could not.
fn readv(pid: i32, ranges: &[Range<u64>], buffer: &mut [u8]) -> usize {
    let remote: Vec<libc::iovec> = ranges
        .iter()
        .map(|r| libc::iovec { iov_base: r.start as *mut _, iov_len: len(r) })
        .collect();
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the only local address is that of `buffer`, with its length; the others are read in
    // the other process, and checked there.
    let read = unsafe {
        libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as _, 0)
    };
    usize::try_from(read).unwrap_or(0)
}
