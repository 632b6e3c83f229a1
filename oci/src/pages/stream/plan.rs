//! What a round has to send, cut into slices.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;

use super::codec::BATCH;
use super::error::SendError;
use super::worker::lock;
use crate::pages::PAGE;

/// What has changed in one process since the last round.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// Pid on this host, to read it.
    pub pid: i32,
    /// Pid inside the container, as the destination knows it.
    pub space: u32,
    /// Pages that are there and may have changed.
    pub written: &'a [Range<u64>],
    /// Ranges that hold nothing any more.
    pub absent: &'a [Range<u64>],
    /// The process has ended: it has no memory.
    pub exited: bool,
}

/// Slices of all changes, handed out one by one.
pub(super) struct Plan<'a> {
    changes: &'a [Change<'a>],
    at: Mutex<(usize, usize, u64)>,
}

impl<'a> Plan<'a> {
    /// The ranges have to be in order and apart from each other.
    pub(super) fn new(changes: &'a [Change<'a>]) -> Self {
        Self { changes, at: Mutex::new((0, 0, 0)) }
    }

    /// Puts the next slice, at most a batch of one process, into `ranges`.
    pub(super) fn next(&self, ranges: &mut Vec<Range<u64>>) -> Option<&Change<'a>> {
        let mut at = lock(&self.at);
        let (change, index, done) = &mut *at;
        ranges.clear();
        let mut room = BATCH as u64 * PAGE;
        loop {
            let of = self.changes.get(*change)?;
            let Some(range) = of.written.get(*index) else {
                if !ranges.is_empty() {
                    return Some(of);
                }
                (*change, *index, *done) = (*change + 1, 0, 0);
                continue;
            };
            let start = range.start + *done;
            let end = range.end.min(start + room);
            ranges.push(start..end);
            room -= end - start;
            *done += end - start;
            if end == range.end {
                (*index, *done) = (*index + 1, 0);
            }
            if room == 0 {
                return Some(of);
            }
        }
    }
}

/// Pages that are listed as written.
pub(super) fn pages(changes: &[Change<'_>]) -> u64 {
    let ranges = changes.iter().flat_map(|change| change.written);
    ranges.map(|range| (range.end - range.start) / PAGE).sum()
}

/// Calls `each` with the address of every page of `range`.
pub(super) fn each_page(range: &Range<u64>, mut each: impl FnMut(u64)) {
    let mut addr = range.start;
    while addr < range.end {
        each(addr);
        addr += PAGE;
    }
}

/// What a process has written, in order and no page twice.
pub(super) fn in_order<'a>(change: &Change<'a>) -> Result<Cow<'a, [Range<u64>]>, SendError> {
    let on_pages = |range: &&Range<u64>| {
        range.start < range.end && (range.start | range.end).is_multiple_of(PAGE)
    };
    let mut all = change.written.iter().chain(change.absent);
    if let Some(Range { start, end }) = all.find(|range| !on_pages(range)).cloned() {
        return Err(SendError::Range { pid: change.pid, start, end });
    }
    if change.written.is_sorted_by(|a, b| a.end <= b.start) {
        return Ok(Cow::Borrowed(change.written));
    }
    let mut sorted = change.written.to_vec();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    Ok(Cow::Owned(merged))
}
