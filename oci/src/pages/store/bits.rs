//! Bits of the pages of one chunk, in shared memory and in private copies.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of one chunk.
pub(in crate::pages) const CHUNK_PAGES: u32 = 512;

/// Bits of the pages of a chunk, a private copy.
pub(in crate::pages) type Bits = [u64; 8];

/// The bits of `pages` that lie in word `word`.
fn mask(pages: &Range<u32>, word: u32) -> u64 {
    let from = pages.start.clamp(word * 64, word * 64 + 64) - word * 64;
    let to = pages.end.clamp(word * 64, word * 64 + 64) - word * 64;
    if from >= to { 0 } else { (u64::MAX >> (64 - (to - from))) << from }
}

/// Sets the bits of `pages`; whoever sees them sees what was written before.
pub(in crate::pages) fn set(bits: &[AtomicU64], pages: Range<u32>) {
    for (word, bits) in (0u32..).zip(bits) {
        match mask(&pages, word) {
            0 => {}
            mask => _ = bits.fetch_or(mask, Ordering::Release),
        }
    }
}

/// Clears the bits of `pages` and says how many were set.
pub(in crate::pages) fn clear(bits: &[AtomicU64], pages: Range<u32>) -> u64 {
    let mut cleared = 0;
    for (word, bits) in (0u32..).zip(bits) {
        match mask(&pages, word) {
            0 => {}
            mask => {
                cleared += u64::from((bits.fetch_and(!mask, Ordering::AcqRel) & mask).count_ones())
            }
        }
    }
    cleared
}

/// Clears the bits of `pages` in a private copy and says how many were set.
pub(in crate::pages) fn take(bits: &mut Bits, pages: Range<u32>) -> u64 {
    let mut cleared = 0;
    for (word, bits) in (0u32..).zip(bits) {
        let mask = mask(&pages, word);
        cleared += u64::from((*bits & mask).count_ones());
        *bits &= !mask;
    }
    cleared
}

/// Whether the bit of `page` is set.
pub(in crate::pages) fn has(bits: &[AtomicU64], page: u32) -> bool {
    bits[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1
}

/// Whether the bit of `page` is set in a private copy.
pub(in crate::pages) fn is_set(bits: &Bits, page: u32) -> bool {
    bits[(page / 64) as usize] >> (page % 64) & 1 == 1
}

/// A private copy.
pub(in crate::pages) fn load(bits: &[AtomicU64]) -> Bits {
    std::array::from_fn(|word| bits[word].load(Ordering::Acquire))
}

/// How many bits are set.
pub(in crate::pages) fn count(bits: &Bits) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The first set bit from `page` on.
pub(in crate::pages) fn next(bits: &Bits, page: u32) -> Option<u32> {
    let mut word = page / 64;
    if word >= 8 {
        return None;
    }
    let mut rest = bits[word as usize] & (u64::MAX << (page % 64));
    loop {
        if rest != 0 {
            return Some(word * 64 + rest.trailing_zeros());
        }
        word += 1;
        if word == 8 {
            return None;
        }
        rest = bits[word as usize];
    }
}

/// The first run of set bits from `page` on.
pub(in crate::pages) fn run(bits: &Bits, page: u32) -> Option<Range<u32>> {
    let first = next(bits, page)?;
    let clear = bits.map(|word| !word);
    Some(first..next(&clear, first).unwrap_or(CHUNK_PAGES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_ranges_agree_with_a_plain_model() {
        let shared: [AtomicU64; 8] = Default::default();
        let mut model = [false; 512];
        for (from, to, on) in [
            (0, 512, true),
            (63, 65, false),
            (0, 1, false),
            (511, 512, false),
            (128, 192, false),
            (130, 131, true),
            (7, 7, true),
        ] {
            if on {
                set(&shared, from..to)
            } else {
                _ = clear(&shared, from..to)
            }
            model[from as usize..to as usize].fill(on);
            let bits = load(&shared);
            assert_eq!(count(&bits), model.iter().filter(|on| **on).count() as u64);
            let mut seen = [false; 512];
            let mut at = 0;
            while let Some(run) = run(&bits, at) {
                seen[run.start as usize..run.end as usize].fill(true);
                assert!(run.end == 512 || !model[run.end as usize]);
                at = run.end;
            }
            assert_eq!(seen, model);
        }
        let mut copy = load(&shared);
        assert_eq!(take(&mut copy, 60..70), 10 - 2);
        assert!(!is_set(&copy, 62) && is_set(&copy, 59) && has(&shared, 62));
    }
}
