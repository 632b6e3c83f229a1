//! Where a task's memory has gone since it was restored: current addresses against original ones.
//!
//! A task may move, cut and drop its memory before all of its pages are in. The store knows pages by
//! the addresses they had; this table leads from one to the other. What is in no segment needs no page
//! of the store any more.

use std::collections::BTreeMap;
use std::ops::Range;

/// No address is as high as this.
const TOP: u64 = 1 << 57;

/// A range of current addresses and the original address of its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Current address.
    pub(super) run: u64,
    /// Length, bytes.
    pub(super) len: u64,
    /// Original address.
    pub(super) orig: u64,
}

/// The segments of one task. No two overlap, neither by current nor by original addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segments {
    /// Length and original address by current address.
    by_run: BTreeMap<u64, (u64, u64)>,
    /// Length and current address by original address.
    by_orig: BTreeMap<u64, (u64, u64)>,
    /// Where moved memory was: mremap(2) reports that it is unmapped there, after the move. Something
    /// else may have been moved there before that report comes.
    left: Vec<Range<u64>>,
}

impl Segments {
    /// Everything is where it was.
    pub(super) fn identity() -> Self {
        let mut all = Self::empty();
        all.insert(Segment { run: 0, len: TOP, orig: 0 });
        all
    }

    /// Nothing is needed.
    pub(super) fn empty() -> Self {
        Self { by_run: BTreeMap::new(), by_orig: BTreeMap::new(), left: Vec::new() }
    }

    /// Adds a segment that overlaps no other.
    pub(super) fn insert(&mut self, segment: Segment) {
        let Segment { run, len, orig } = segment;
        self.by_run.insert(run, (len, orig));
        self.by_orig.insert(orig, (len, run));
    }

    fn take(&mut self, segment: Segment) {
        self.by_run.remove(&segment.run);
        self.by_orig.remove(&segment.orig);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.by_run.len()
    }

    /// Forgets the segments that `keep` does not want.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(Segment) -> bool) {
        let gone: Vec<_> = self.iter().filter(|segment| !keep(*segment)).collect();
        gone.into_iter().for_each(|segment| self.take(segment));
    }

    /// All segments by current address.
    pub(super) fn iter(&self) -> impl Iterator<Item = Segment> {
        self.by_run.iter().map(|(run, (len, orig))| Segment { run: *run, len: *len, orig: *orig })
    }

    /// The rest of the segment from current address `run` on.
    pub(super) fn at(&self, run: u64) -> Option<Segment> {
        let (start, (len, orig)) = self.by_run.range(..=run).next_back()?;
        let into = run - start;
        (into < *len).then(|| Segment { run, len: len - into, orig: orig + into })
    }

    /// The rest of the segment from original address `orig` on.
    pub(super) fn of(&self, orig: u64) -> Option<Segment> {
        let (start, (len, run)) = self.by_orig.range(..=orig).next_back()?;
        let into = orig - start;
        (into < *len).then(|| Segment { run: run + into, len: len - into, orig })
    }

    /// Segments within a range of current addresses, cut to it.
    fn within(&self, range: &Range<u64>) -> Vec<Segment> {
        if range.is_empty() {
            return Vec::new();
        }
        let first =
            self.by_run.range(..=range.start).next_back().map_or(range.start, |(run, _)| *run);
        let parts = self.by_run.range(first..range.end).map(|(run, (len, orig))| {
            let (from, to) = ((*run).max(range.start), (run + len).min(range.end));
            Segment { run: from, len: to.saturating_sub(from), orig: orig + (from - run) }
        });
        parts.filter(|part| part.len > 0).collect()
    }

    /// Takes out a range of current addresses. Returns what was there.
    pub(super) fn cut(&mut self, range: Range<u64>) -> Vec<Segment> {
        let parts = self.within(&range);
        for part in &parts {
            let Some((start, (len, orig))) = self.by_run.range(..=part.run).next_back() else {
                continue;
            };
            let whole = Segment { run: *start, len: *len, orig: *orig };
            self.take(whole);
            let head = part.run - whole.run;
            if head > 0 {
                self.insert(Segment { len: head, ..whole });
            }
            let skip = head + part.len;
            if skip < whole.len {
                let (run, orig) = (whole.run + skip, whole.orig + skip);
                self.insert(Segment { run, len: whole.len - skip, orig });
            }
        }
        parts
    }

    /// Memory was unmapped. Returns what was there.
    pub(super) fn unmap(&mut self, range: Range<u64>) -> Vec<Segment> {
        if let Some(at) = self.left.iter().position(|left| *left == range) {
            self.left.swap_remove(at);
            return Vec::new();
        }
        self.left.retain(|left| left.end <= range.start || left.start >= range.end);
        self.cut(range)
    }

    /// How many reports of moved memory are awaited.
    pub(super) fn reports(&self) -> usize {
        self.left.len()
    }

    /// Memory was moved. Returns what was at its new place.
    pub(super) fn shift(&mut self, from: u64, to: u64, len: u64) -> Vec<Segment> {
        let moved = self.cut(from..from.saturating_add(len));
        let lost = self.cut(to..to.saturating_add(len));
        for part in &moved {
            self.insert(Segment { run: to + (part.run - from), ..*part });
        }
        // Bounded: reports come soon after the move.
        if self.left.len() >= 64 {
            self.left.remove(0);
        }
        self.left.push(from..from.saturating_add(len));
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(segments: &Segments) -> Vec<(u64, u64, u64)> {
        segments.iter().map(|s| (s.run, s.len, s.orig)).collect()
    }

    #[test]
    fn memory_is_found_where_it_was_moved_to() {
        let mut segments = Segments::identity();
        assert_eq!(segments.shift(100, 1000, 50), [Segment { run: 1000, len: 50, orig: 1000 }]);
        assert_eq!(segments.at(1010).map(|s| (s.orig, s.len)), Some((110, 40)));
        assert_eq!(segments.of(110).map(|s| (s.run, s.len)), Some((1010, 40)));
        assert_eq!((segments.at(120), segments.of(1010)), (None, None));
        // Moved on in part, and cut in the middle.
        segments.shift(1020, 5000, 10);
        segments.cut(5003..5006);
        assert_eq!(segments.of(122).map(|s| (s.run, s.len)), Some((5002, 1)));
        assert_eq!((segments.of(124), segments.of(126).map(|s| s.run)), (None, Some(5006)));
        assert_eq!(segments.of(130).map(|s| s.run), Some(1030));
        let shape = list(&segments);
        assert!(shape.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{shape:?}");
        assert_eq!(segments.by_run.len(), segments.by_orig.len());
    }

    #[test]
    fn the_report_that_follows_a_move_does_not_cut_what_was_moved_there_since() {
        let mut segments = Segments::identity();
        segments.shift(100, 1000, 50);
        segments.shift(300, 100, 50);
        assert_eq!(segments.unmap(100..150), []);
        assert_eq!(segments.at(100).map(|s| s.orig), Some(300));
        assert_eq!(segments.unmap(100..150).len(), 1, "the second report is about what is there");
        assert_eq!(segments.at(100), None);
    }

    #[test]
    fn any_sequence_agrees_with_a_table_of_single_addresses() {
        let mut model: Vec<Option<u64>> = (0..200).map(Some).collect();
        let mut segments = Segments::empty();
        segments.insert(Segment { run: 0, len: 200, orig: 0 });
        let mut seed = 3u64;
        let mut below = |bound: u64| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % bound
        };
        for _ in 0..500 {
            let (a, len) = (below(190), 1 + below(10));
            if below(3) == 0 {
                segments.cut(a..a + len);
                model[a as usize..(a + len) as usize].fill(None);
            } else {
                let to = below(190);
                if to < a + len && a < to + len {
                    continue;
                }
                segments.shift(a, to, len);
                for at in 0..len {
                    model[(to + at) as usize] = model[(a + at) as usize].take();
                }
            }
            for run in 0..200 {
                assert_eq!(segments.at(run).map(|s| s.orig), model[run as usize]);
                if let Some(orig) = model[run as usize] {
                    assert_eq!(segments.of(orig).map(|s| s.run), Some(run));
                }
            }
        }
    }
}
