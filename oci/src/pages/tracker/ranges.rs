//! Sets of addresses as ascending ranges that neither overlap nor touch.

use std::ops::Range;

/// A set of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in crate::pages) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// A set of `ranges` in any order, which may overlap.
    pub(in crate::pages) fn of(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.sort_unstable_by_key(|r| r.start);
        let mut set = Self::default();
        for range in ranges {
            set.push(range);
        }
        set
    }

    /// Adds a range that does not begin before the last one.
    pub(in crate::pages) fn push(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
    }

    pub(in crate::pages) fn as_slice(&self) -> &[Range<u64>] {
        &self.0
    }

    pub(in crate::pages) fn into_vec(self) -> Vec<Range<u64>> {
        self.0
    }

    /// How many bytes.
    pub(in crate::pages) fn bytes(&self) -> u64 {
        self.0.iter().map(|r| r.end - r.start).sum()
    }

    pub(in crate::pages) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all of `range` is in the set.
    pub(in crate::pages) fn covers(&self, range: &Range<u64>) -> bool {
        let next = self.0.partition_point(|r| r.end <= range.start);
        self.0.get(next).is_some_and(|r| r.start <= range.start && range.end <= r.end)
    }

    /// What is in either.
    pub(in crate::pages) fn union(&self, other: &Self) -> Self {
        if other.is_empty() {
            return self.clone();
        }
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut set = Self(Vec::with_capacity(self.0.len() + other.0.len()));
        loop {
            let first = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if y.start < x.start => b.next(),
                (Some(_), _) => a.next(),
                (None, _) => b.next(),
            };
            match first {
                Some(range) => set.push(range.clone()),
                None => return set,
            }
        }
    }

    /// What is in both.
    pub(in crate::pages) fn intersection(&self, other: &Self) -> Self {
        let (mut a, mut b) = (self.0.as_slice(), other.0.as_slice());
        let mut set = Self::default();
        while let (Some(x), Some(y)) = (a.first(), b.first()) {
            set.push(x.start.max(y.start)..x.end.min(y.end));
            if x.end <= y.end { a = &a[1..] } else { b = &b[1..] }
        }
        set
    }

    /// What is in this one only.
    pub(in crate::pages) fn difference(&self, other: &Self) -> Self {
        let mut others = other.0.as_slice();
        let mut set = Self::default();
        for range in &self.0 {
            let mut start = range.start;
            while let Some(cut) = others.first() {
                if cut.start >= range.end {
                    break;
                }
                set.push(start..cut.start.max(start));
                start = start.max(cut.end);
                if cut.end > range.end {
                    break;
                }
                others = &others[1..];
            }
            set.push(start.min(range.end)..range.end);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets of the numbers below 64 as bits, the plainest form there is.
    fn of_bits(bits: u64) -> Ranges {
        let mut set = Ranges::default();
        for n in (0..64).filter(|n| bits >> n & 1 == 1) {
            set.push(n..n + 1);
        }
        set
    }

    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // Long runs as well as single bits.
        let word = state.rotate_left(29) ^ (*state >> 7);
        if word & 1 == 0 { word } else { word & word << 1 & word << 2 | word << 40 }
    }

    #[test]
    fn set_operations_agree_with_those_on_bits() {
        let mut state = 7;
        for _ in 0..20_000 {
            let (x, y) = (random(&mut state), random(&mut state));
            let (a, b) = (of_bits(x), of_bits(y));
            assert_eq!(a.union(&b), of_bits(x | y), "{x:x} {y:x}");
            assert_eq!(a.intersection(&b), of_bits(x & y), "{x:x} {y:x}");
            assert_eq!(a.difference(&b), of_bits(x & !y), "{x:x} {y:x}");
            assert_eq!(a.bytes(), u64::from(x.count_ones()));
            let (start, end) = (y & 31, 32 + (y >> 8 & 31));
            let window = (1 << end) - (1 << start);
            assert_eq!(a.covers(&(start..end)), x & window == window, "{x:x} {start} {end}");
        }
    }

    #[test]
    fn ranges_in_any_order_make_the_same_set() {
        let set = Ranges::of(vec![8..9, 1..3, 2..5, 5..6]);
        assert_eq!(set.as_slice(), [1..6, 8..9]);
    }
}
