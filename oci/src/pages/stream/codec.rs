//! What the page stream looks like, and how it is written.
//!
//! ```text
//!   stream   = "FERRYPGS" format:u16 page:u32   record*              numbers are little-endian
//!   record   = tag:u8 length:u32 check:u64 body[length]
//!   1 pages  = space:u32 encoding:u8 runs:u16 { addr:u64 pages:u16 }* contents (raw │ one zstd frame)
//!   2 same   = space:u32 { addr:u64 from_space:u32 from_addr:u64 pages:u16 }*
//!   3 gone   = space:u32 { start:u64 end:u64 }*
//!   4 space gone = space:u32
//!   5 round end  = round:u32 pages:u64 checks:u64
//!   6 hashes = space:u32 { addr:u64 pages:u16 hash:u128[pages] }*      the other direction
//! ```
//! `check` is the xxh3-64 of the body with the tag as seed. That of a pages record is the xxh3-64 of
//! the plain contents, seeded by that of what stands before them, so that it covers the compression
//! too. `checks` is the xxh3-64 of all checks of the round, in order; `pages` counts pages and same.

use std::hash::Hasher;
use std::ops::Range;

use twox_hash::XxHash3_64;

use crate::pages::PAGE;

/// Version of the page stream. Versioned apart from the product.
pub const FORMAT: u16 = 1;

pub(super) const MAGIC: &[u8; 8] = b"FERRYPGS";
/// Bytes before the first record.
pub(super) const HEADER: usize = 14;
/// Bytes of a record before its body.
pub(super) const HEAD: usize = 13;
/// Most pages in one record.
pub(super) const BATCH: usize = 64;
/// Longest body, bytes: a batch of single pages that did not compress is not half of it.
pub(super) const MAX_BODY: usize = 512 << 10;
/// Most ranges, or runs of repeated pages, that are written into one record.
pub(super) const MAX_LIST: usize = 4096;

pub(super) const PAGES: u8 = 1;
pub(super) const SAME: u8 = 2;
pub(super) const GONE: u8 = 3;
pub(super) const SPACE_GONE: u8 = 4;
pub(super) const ROUND_END: u8 = 5;
pub(super) const HASHES: u8 = 6;

pub(super) const RAW: u8 = 0;
pub(super) const ZSTD: u8 = 1;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Address of the first one.
    pub addr: u64,
    /// How many.
    pub pages: u16,
}

/// Pages that have the contents of others, page for page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SameRun {
    /// Address of the first one.
    pub addr: u64,
    /// Where the first one's contents are found: the process,
    pub from_space: u32,
    /// and the address.
    pub from_addr: u64,
    /// How many.
    pub pages: u16,
}

/// Adds page `addr` to `runs`.
pub(super) fn extend_runs(runs: &mut Vec<Run>, addr: u64) {
    match runs.last_mut() {
        Some(run) if run.addr + u64::from(run.pages) * PAGE == addr && run.pages < u16::MAX => {
            run.pages += 1;
        }
        _ => runs.push(Run { addr, pages: 1 }),
    }
}

/// The check of a record whose body is complete.
pub(super) fn check(tag: u8, body: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(u64::from(tag), body)
}

/// The check of a pages record: `head` is its body up to the contents.
pub(super) fn check_pages(head: &[u8], contents: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(check(PAGES, head), contents)
}

/// What both ends know of a round, to compare at its end.
pub(super) struct Tally {
    checks: XxHash3_64,
    pages: u64,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self { checks: XxHash3_64::with_seed(0), pages: 0 }
    }

    /// Counts a record.
    pub(super) fn add(&mut self, check: u64, pages: u64) {
        self.checks.write(&check.to_le_bytes());
        self.pages += pages;
    }

    /// Pages and the check of checks; begins anew.
    pub(super) fn take(&mut self) -> (u64, u64) {
        let done = std::mem::replace(self, Self::new());
        (done.pages, done.checks.finish())
    }
}

/// Writes the stream's first bytes.
pub(super) fn put_header(out: &mut Vec<u8>) {
    out.extend(MAGIC);
    out.extend(FORMAT.to_le_bytes());
    out.extend((PAGE as u32).to_le_bytes());
}

/// Writes a record but for the `contents` that follow it, and gives its check. `plain` is what
/// `contents` unpacks to: the same slice when `encoding` is [`RAW`].
pub(super) fn put_pages(
    out: &mut Vec<u8>,
    space: u32,
    runs: &[Run],
    encoding: u8,
    contents: &[u8],
    plain: &[u8],
) -> u64 {
    let at = out.len();
    out.extend([0; HEAD]);
    out.extend(space.to_le_bytes());
    out.push(encoding);
    out.extend((runs.len() as u16).to_le_bytes());
    for run in runs {
        out.extend(run.addr.to_le_bytes());
        out.extend(run.pages.to_le_bytes());
    }
    let check = check_pages(&out[at + HEAD..], plain);
    fill_head(&mut out[at..], PAGES, contents.len(), check);
    check
}

/// Writes pages that are repeated. `runs` are at most [`MAX_LIST`].
pub(super) fn put_same(out: &mut Vec<u8>, space: u32, runs: &[SameRun]) -> u64 {
    let at = out.len();
    out.extend([0; HEAD]);
    out.extend(space.to_le_bytes());
    for run in runs {
        out.extend(run.addr.to_le_bytes());
        out.extend(run.from_space.to_le_bytes());
        out.extend(run.from_addr.to_le_bytes());
        out.extend(run.pages.to_le_bytes());
    }
    seal(&mut out[at..], SAME)
}

/// Writes ranges that have become empty. `ranges` are at most [`MAX_LIST`].
pub(super) fn put_gone(out: &mut Vec<u8>, space: u32, ranges: &[Range<u64>]) -> u64 {
    let at = out.len();
    out.extend([0; HEAD]);
    out.extend(space.to_le_bytes());
    for range in ranges {
        out.extend(range.start.to_le_bytes());
        out.extend(range.end.to_le_bytes());
    }
    seal(&mut out[at..], GONE)
}

/// Writes that a process has no memory any more.
pub(super) fn put_space_gone(out: &mut Vec<u8>, space: u32) -> u64 {
    let at = out.len();
    out.extend([0; HEAD]);
    out.extend(space.to_le_bytes());
    seal(&mut out[at..], SPACE_GONE)
}

/// Writes the end of round `round`.
pub(super) fn put_round_end(out: &mut Vec<u8>, round: u32, (pages, checks): (u64, u64)) {
    let at = out.len();
    out.extend([0; HEAD]);
    out.extend(round.to_le_bytes());
    out.extend(pages.to_le_bytes());
    out.extend(checks.to_le_bytes());
    seal(&mut out[at..], ROUND_END);
}

/// Writes hashes: `hashes` are those of all pages of `runs`, in order.
pub(super) fn put_hashes(out: &mut Vec<u8>, space: u32, runs: &[Run], hashes: &[u128]) -> u64 {
    let at = out.len();
    let mut hashes = hashes.iter();
    out.extend([0; HEAD]);
    out.extend(space.to_le_bytes());
    for run in runs {
        out.extend(run.addr.to_le_bytes());
        out.extend(run.pages.to_le_bytes());
        for hash in hashes.by_ref().take(run.pages.into()) {
            out.extend(hash.to_le_bytes());
        }
    }
    seal(&mut out[at..], HASHES)
}

/// Completes a record whose body is all there, and gives its check.
fn seal(record: &mut [u8], tag: u8) -> u64 {
    let check = check(tag, &record[HEAD..]);
    fill_head(record, tag, 0, check);
    check
}

/// `outside` bytes of the body are not in `record`.
fn fill_head(record: &mut [u8], tag: u8, outside: usize, check: u64) {
    let length = record.len() - HEAD + outside;
    debug_assert!(length <= MAX_BODY);
    record[0] = tag;
    record[1..5].copy_from_slice(&(length as u32).to_le_bytes());
    record[5..13].copy_from_slice(&check.to_le_bytes());
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
