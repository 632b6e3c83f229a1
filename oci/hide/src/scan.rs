//! A scan around hidden ranges.
//!
//! ```text
//! asked for   |-----------------------------------------|
//! hidden            ######        ###          ######
//! scanned     |-----|    |--------| |----------|    |---|   regions one after the other
//! ```
//! The answer is one that the kernel could give: the regions found, in order, and `walk_end` at
//! the address up to which all is known. CRIU asks again from there when its vector was full.

use crate::orders::Ranges;

/// `struct pm_scan_arg` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ScanArg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

const SIZE: u64 = size_of::<ScanArg>() as u64;
/// Bytes of a `struct page_region`.
const REGION: u64 = 24;

const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const GUARD: u64 = 1 << 8;

/// What a scan looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Pages that hold something.
    Pages,
    /// Guard pages.
    Guards,
}

/// What came of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Regions in the vector.
    pub(crate) regions: u64,
    /// Where the scan stopped.
    pub(crate) walk_end: u64,
    /// Bytes of address space that were skipped.
    pub(crate) skipped: u64,
}

impl ScanArg {
    /// The two scans of a dump; all others are none of our business.
    pub(crate) fn kind(&self) -> Option<Kind> {
        let plain = self.size == SIZE && self.flags == 0 && self.max_pages == 0;
        if !plain || self.vec == 0 || self.vec_len == 0 || self.start >= self.end {
            return None;
        }
        if self.category_anyof_mask == PRESENT | SWAPPED && self.category_mask & GUARD == 0 {
            return Some(Kind::Pages);
        }
        let guards = self.category_mask == GUARD && self.category_inverted == 0;
        (guards && self.category_anyof_mask == 0).then_some(Kind::Guards)
    }
}

/// Runs `scan` on the parts of `asked` that are not hidden. `scan` is the kernel: it returns the
/// number of regions it wrote to `vec` and sets `walk_end`.
///
/// # Errors
/// The first error of `scan`.
pub(crate) fn around<E>(
    asked: &ScanArg,
    kind: Kind,
    ranges: Ranges<'_>,
    mut scan: impl FnMut(&mut ScanArg) -> Result<u64, E>,
) -> Result<Found, E> {
    let mut hidden = ranges
        .after(asked.start)
        .filter(|range| !(kind == Kind::Guards && range.guards))
        .peekable();
    let mut found = Found { regions: 0, walk_end: asked.start, skipped: 0 };
    while found.walk_end < asked.end {
        let next = hidden.peek().filter(|range| range.start < asked.end);
        if let Some(range) = next
            && range.start <= found.walk_end
        {
            let end = range.end.min(asked.end);
            found.skipped = found.skipped.saturating_add(end.saturating_sub(found.walk_end));
            found.walk_end = found.walk_end.max(end);
            hidden.next();
            continue;
        }
        let room = asked.vec_len.saturating_sub(found.regions);
        if room == 0 {
            break;
        }
        let stop = next.map_or(asked.end, |range| range.start);
        let mut part = ScanArg {
            start: found.walk_end,
            end: stop,
            walk_end: 0,
            vec: asked.vec.saturating_add(found.regions.saturating_mul(REGION)),
            vec_len: room,
            ..*asked
        };
        let regions = scan(&mut part)?.min(room);
        found.regions = found.regions.saturating_add(regions);
        found.walk_end = part.walk_end.clamp(found.walk_end, stop);
        if found.walk_end < stop {
            break;
        }
    }
    Ok(found)
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
