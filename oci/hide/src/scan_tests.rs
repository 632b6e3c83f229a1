//! The split scan against a model: random memory, random ranges, vectors of every length.

use super::*;
use crate::orders::Orders;
use crate::orders::tests::words;

const PAGE: u64 = 4096;
const BASE: u64 = 0x10_0000;

/// A small generator of numbers; the same seed gives the same numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888);
        (self.0 >> 33) % limit
    }
}

type Region = (u64, u64, u64);

/// The kernel: `pages` are the categories of the pages from `BASE` on.
fn kernel(pages: &[u64], arg: &mut ScanArg, out: &mut Vec<Region>) -> u64 {
    let mut regions: Vec<Region> = Vec::new();
    let mut address = arg.start;
    while address < arg.end {
        let category = pages[((address - BASE) / PAGE) as usize];
        if category != 0 {
            let full = regions.len() as u64 == arg.vec_len;
            match regions.last_mut() {
                Some(last) if last.1 == address && last.2 == category => last.1 += PAGE,
                _ if full => break,
                _ => regions.push((address, address + PAGE, category)),
            }
        }
        address += PAGE;
    }
    arg.walk_end = address;
    out.extend(&regions);
    regions.len() as u64
}

/// Scans all of `pages` as CRIU does, again and again from `walk_end`.
fn scan_all(pages: &[u64], ranges: &[(u64, u64, bool)], kind: Kind, vec_len: u64) -> Vec<Region> {
    let words = words(&[(1, None, ranges)]);
    let ranges = Orders::new(&words).unwrap().task(1).unwrap().ranges;
    let end = BASE + pages.len() as u64 * PAGE;
    let (mut start, mut all) = (BASE, Vec::new());
    while start < end {
        let asked = ScanArg { size: SIZE, start, end, vec: 1 << 40, vec_len, ..ScanArg::default() };
        let before = all.len();
        let found = around(&asked, kind, ranges, |part| {
            assert!(part.start < part.end && part.end <= end);
            let used = (all.len() - before) as u64;
            assert_eq!(part.vec, (1 << 40) + used * 24, "regions must follow each other");
            assert_eq!(part.vec_len, vec_len - used);
            Ok::<_, ()>(kernel(pages, part, &mut all))
        });
        let found = found.unwrap();
        assert_eq!(found.regions, (all.len() - before) as u64);
        assert!(found.walk_end > start, "no progress at {start:x}");
        assert!(found.walk_end == end || found.regions == vec_len, "short without a full vector");
        start = found.walk_end;
    }
    all
}

/// Regions cut at every page, so that where a full vector cut them does not matter.
fn paged(regions: &[Region]) -> Vec<(u64, u64)> {
    let pages =
        |r: &Region| (r.0..r.1).step_by(PAGE as usize).map(|a| (a, r.2)).collect::<Vec<_>>();
    regions.iter().flat_map(pages).collect()
}

fn random_ranges(numbers: &mut Numbers, pages: u64) -> Vec<(u64, u64, bool)> {
    let mut ranges = Vec::new();
    // They may begin before what is scanned and end after it.
    let mut at = numbers.below(20);
    while at < pages + 16 {
        let end = at + 1 + numbers.below(12);
        let byte = |page: u64| BASE - 8 * PAGE + page * PAGE;
        ranges.push((byte(at), byte(end), numbers.below(3) == 0));
        at = end + numbers.below(3) * numbers.below(20);
    }
    ranges
}

#[test]
fn a_split_scan_finds_all_but_what_is_hidden() {
    let mut numbers = Numbers(42);
    for round in 0..3000 {
        let count = 1 + numbers.below(90);
        let pages: Vec<u64> = (0..count).map(|_| numbers.below(3) * numbers.below(2)).collect();
        let ranges = random_ranges(&mut numbers, count);
        let kind = if round % 2 == 0 { Kind::Pages } else { Kind::Guards };
        let vec_len = 1 + numbers.below(round % 20 + 1);
        let seen = scan_all(&pages, &ranges, kind, vec_len);
        let hidden = |address: u64| {
            let skips = |r: &&(u64, u64, bool)| !(kind == Kind::Guards && r.2);
            ranges.iter().filter(skips).any(|r| r.0 <= address && address < r.1)
        };
        let plain = scan_all(&pages, &[], kind, 1000);
        let expected: Vec<_> = paged(&plain).into_iter().filter(|p| !hidden(p.0)).collect();
        assert_eq!(paged(&seen), expected, "round {round}");
        if vec_len >= count {
            let joined = seen.windows(2).all(|w| w[0].1 != w[1].0 || w[0].2 != w[1].2);
            assert!(joined, "regions that touch must be one: {seen:x?}");
        }
    }
}

#[test]
fn an_error_in_any_part_is_the_answer() {
    let words = words(&[(1, None, &[(BASE + PAGE, BASE + 2 * PAGE, false)])]);
    let ranges = Orders::new(&words).unwrap().task(1).unwrap().ranges;
    let end = BASE + 3 * PAGE;
    let asked = ScanArg { start: BASE, end, vec: 1, vec_len: 9, ..ScanArg::default() };
    let mut calls = 0;
    let done = around(&asked, Kind::Pages, ranges, |part| {
        calls += 1;
        part.walk_end = part.end;
        if calls == 2 { Err(14) } else { Ok(1) }
    });
    assert_eq!(done, Err(14));
}

#[test]
fn a_kernel_that_stands_still_does_not_hang_the_scan() {
    let words = words(&[]);
    let orders = Orders::new(&words);
    assert!(orders.is_some());
    let words = crate::orders::tests::words(&[(1, None, &[(BASE, BASE + PAGE, false)])]);
    let ranges = Orders::new(&words).unwrap().task(1).unwrap().ranges;
    let end = BASE + 3 * PAGE;
    let asked = ScanArg { start: BASE, end, vec: 1, vec_len: 9, ..ScanArg::default() };
    let found = around(&asked, Kind::Pages, ranges, |_| Ok::<_, ()>(0)).unwrap();
    assert_eq!((found.regions, found.walk_end, found.skipped), (0, BASE + PAGE, PAGE));
}

#[test]
fn only_the_scans_of_a_dump_are_touched() {
    let pages = ScanArg {
        size: 96,
        start: 0x1000,
        end: 0x2000,
        vec: 1,
        vec_len: 1,
        category_inverted: 1 << 5 | 1 << 2,
        category_mask: 1 << 5 | 1 << 2,
        category_anyof_mask: PRESENT | SWAPPED,
        return_mask: PRESENT | SWAPPED,
        ..ScanArg::default()
    };
    assert_eq!(pages.kind(), Some(Kind::Pages));
    let guards = ScanArg {
        category_inverted: 0,
        category_mask: GUARD,
        category_anyof_mask: 0,
        return_mask: GUARD,
        ..pages
    };
    assert_eq!(guards.kind(), Some(Kind::Guards));
    for other in [
        ScanArg { flags: 1, ..pages },
        ScanArg { end: 0x1000, ..pages },
        ScanArg { vec: 0, ..pages },
        ScanArg { vec_len: 0, ..pages },
        ScanArg { size: 104, ..pages },
        ScanArg { max_pages: 1, ..pages },
        ScanArg { category_anyof_mask: PRESENT, ..pages },
        ScanArg { category_mask: GUARD | 2, ..guards },
    ] {
        assert_eq!(other.kind(), None, "{other:?}");
    }
}
