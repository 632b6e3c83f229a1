//! What a page holds: a function of who wrote it, where, and when.

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Words of a page.
pub(crate) const WORDS: usize = PAGE / 8;

/// The words of a page.
pub(crate) type Page = [u64; WORDS];

/// A page that nobody has written.
pub(crate) const ZERO: Page = [0; WORDS];

/// Who wrote a page last, and when: a process's number and its count of writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mark(u64);

impl Mark {
    /// Nobody has: the page is as it was mapped.
    pub(crate) const NONE: Self = Self(0);
    /// The page must not be accessible.
    pub(crate) const GUARD: Self = Self(u64::MAX);

    /// The write number `generation`, from 1, of `process`.
    pub(crate) fn new(process: u16, generation: u64) -> Self {
        Self((u64::from(process) << 48) | (generation & ((1 << 48) - 1)))
    }

    pub(crate) fn from_word(word: u64) -> Self {
        Self(word)
    }

    pub(crate) fn word(self) -> u64 {
        self.0
    }

    /// Its part in an area's sum, by which marks that were set back are noticed.
    pub(crate) fn part(self, area: u32, page: usize) -> u64 {
        if self == Self::NONE { 0 } else { key(u64::from(area), page as u64, self.0) }
    }

    /// What page `page` of area `area` holds after this write.
    pub(crate) fn fill(self, area: u32, page: usize) -> Page {
        fill(key(u64::from(area), page as u64, self.0))
    }
}

/// A page of words that look random, none like the next, made from `key`.
pub(crate) fn fill(key: u64) -> Page {
    let mut state = key;
    std::array::from_fn(|_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(state)
    })
}

fn key(a: u64, b: u64, c: u64) -> u64 {
    mix(mix(mix(a.wrapping_add(1)) ^ b) ^ c)
}

/// A bijection in which every bit of the input matters for every bit of the output (splitmix64).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Numbers that look random.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(0x5851_f42d_4c95_7f2d)))
    }

    /// One below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) % limit as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn pages_differ_by_process_generation_area_and_page() {
        let pages = [
            Mark::new(1, 1).fill(1, 1),
            Mark::new(2, 1).fill(1, 1),
            Mark::new(1, 2).fill(1, 1),
            Mark::new(1, 1).fill(2, 1),
            Mark::new(1, 1).fill(1, 2),
        ];
        let words: BTreeSet<_> = pages.iter().flatten().collect();
        assert_eq!(words.len(), pages.len() * WORDS);
        assert_eq!(pages[0], Mark::new(1, 1).fill(1, 1));
    }

    #[test]
    fn no_mark_is_taken_for_another() {
        assert_eq!(Mark::new(3, 7), Mark::from_word(Mark::new(3, 7).word()));
        assert_ne!(Mark::new(0, 1), Mark::NONE);
        assert_ne!(Mark::new(u16::MAX - 1, u64::MAX), Mark::GUARD);
        assert_eq!(Mark::NONE.part(1, 1), 0);
        assert_ne!(Mark::new(1, 1).part(1, 1), Mark::new(1, 1).part(1, 2));
    }

    #[test]
    fn random_numbers_stay_below_their_limit_and_reach_it() {
        let mut random = Random::new(7);
        let seen: BTreeSet<_> = (0..1000).map(|_| random.below(10)).collect();
        assert_eq!(seen, (0..10).collect());
    }
}
