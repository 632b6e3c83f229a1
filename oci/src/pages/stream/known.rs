//! What the receiver holds, as the sender knows it.
//!
//! ```text
//!   (process, address of 2 MB) ──▶ slot ──▶ 512 hashes: absent │ unknown │ xxh3-128
//!                                   ▲
//!   hash ──▶ set of four places ────┘   a guess, believed only if the page there has that hash now
//! ```
//! The second table only ever guesses: a page that was overwritten since has another hash in the
//! first one, so it can never be referred to. Both are bounded. A page beyond the bound is *unknown*:
//! it is sent whenever it changes, and removed whenever it may be there.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::pages::PAGE;

/// Pages of one slot.
const SLOT: usize = 512;
const SLOT_BYTES: u64 = SLOT as u64 * PAGE;
/// Places where a hash may be found.
const WAYS: usize = 4;

/// The receiver holds nothing there. No page of the receiver is believed to have this hash.
const ABSENT: u128 = 0;
/// The receiver may hold something there.
const UNKNOWN: u128 = 1;

struct Slot {
    space: u32,
    base: u64,
    hashes: Box<[u128; SLOT]>,
    /// Pages of an earlier attempt that this one has not seen yet.
    unseen: Option<Box<[u64; SLOT / 64]>>,
}

/// What the receiver holds.
pub(super) struct Known {
    slots: Vec<Slot>,
    at: BTreeMap<(u32, u64), u32>,
    free: Vec<u32>,
    /// Most slots.
    limit: usize,
    /// Whether a page was ever beyond the limit.
    overflown: bool,
    /// Slot and page, plus one; 0 is empty.
    places: Vec<u32>,
    used: usize,
    /// The slot that was asked for last: pages come in the order of their addresses.
    recent: Option<(u32, u64, usize)>,
}

impl Known {
    /// Knows that the receiver holds nothing. At most `pages` pages are remembered: 20 to 24 bytes each.
    pub(super) fn new(pages: u64) -> Self {
        // A place is 23 bits of slot and 9 of page, and the last one is not used.
        let limit = (pages / SLOT as u64).clamp(1, (1 << 23) - 1) as usize;
        Self {
            slots: Vec::new(),
            at: BTreeMap::new(),
            free: Vec::new(),
            limit,
            overflown: false,
            places: vec![0; 1 << 12],
            used: 0,
            recent: None,
        }
    }

    /// The slot of a page, made if there is room.
    fn slot(&mut self, space: u32, addr: u64) -> Option<usize> {
        let base = addr & !(SLOT_BYTES - 1);
        if let Some((_, _, slot)) = self.recent.filter(|r| (r.0, r.1) == (space, base)) {
            return Some(slot);
        }
        if let Some(slot) = self.at.get(&(space, base)) {
            self.recent = Some((space, base, *slot as usize));
            return Some(*slot as usize);
        }
        let fresh = Slot { space, base, hashes: Box::new([ABSENT; SLOT]), unseen: None };
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = fresh;
            slot as usize
        } else if self.slots.len() < self.limit {
            self.slots.push(fresh);
            self.slots.len() - 1
        } else {
            self.overflown = true;
            return None;
        };
        self.at.insert((space, base), slot as u32);
        Some(slot)
    }

    /// Remembers a page that the receiver holds from an earlier attempt. Whether there is room.
    pub(super) fn learn(&mut self, space: u32, addr: u64, hash: u128) -> bool {
        let Some(slot) = self.slot(space, addr) else { return false };
        let page = page_of(addr);
        self.slots[slot].hashes[page] = hash.max(UNKNOWN);
        self.slots[slot].unseen.get_or_insert_default()[page / 64] |= 1 << (page % 64);
        self.place(slot, page, hash);
        true
    }

    /// Whether any page is there from an earlier attempt and not seen yet.
    pub(super) fn unseen(&self) -> bool {
        self.slots.iter().any(|slot| slot.unseen.is_some())
    }

    /// Forgets what earlier attempts left and this one has not seen, and says where it is.
    pub(super) fn take_unseen(&mut self) -> Vec<(u32, Range<u64>)> {
        let mut left: Vec<(u32, Range<u64>)> = Vec::new();
        for ((space, base), slot) in &self.at {
            let slot = &mut self.slots[*slot as usize];
            let Some(unseen) = slot.unseen.take() else { continue };
            for page in (0..SLOT).filter(|page| unseen[page / 64] >> (page % 64) & 1 == 1) {
                slot.hashes[page] = ABSENT;
                let start = base + page as u64 * PAGE;
                match left.last_mut() {
                    Some((last, range)) if last == space && range.end == start => {
                        range.end += PAGE;
                    }
                    _ => left.push((*space, start..start + PAGE)),
                }
            }
        }
        left
    }

    /// Says that a page is as it is now known to be: not a remnant.
    fn see(&mut self, slot: usize, page: usize) {
        if let Some(unseen) = &mut self.slots[slot].unseen {
            unseen[page / 64] &= !(1 << (page % 64));
        }
    }

    /// Whether the receiver holds exactly this page.
    pub(super) fn holds(&mut self, space: u32, addr: u64, hash: u128) -> bool {
        let Some(slot) = self.slot(space, addr) else { return false };
        let page = page_of(addr);
        self.see(slot, page);
        hash > UNKNOWN && self.slots[slot].hashes[page] == hash
    }

    /// The page is about to be sent: what it held cannot be referred to any more.
    pub(super) fn overwrite(&mut self, space: u32, addr: u64) {
        if let Some(slot) = self.slot(space, addr) {
            self.see(slot, page_of(addr));
            self.slots[slot].hashes[page_of(addr)] = UNKNOWN;
        }
    }

    /// Where the receiver holds a page with this hash, now that all that was written is applied.
    pub(super) fn find(&self, hash: u128) -> Option<(u32, u64)> {
        if hash <= UNKNOWN {
            return None;
        }
        self.set(hash).find_map(|at| {
            let (slot, page) = self.placed(at)?;
            (slot.hashes[page] == hash).then(|| (slot.space, slot.base + page as u64 * PAGE))
        })
    }

    /// The page was written to the stream.
    pub(super) fn sent(&mut self, space: u32, addr: u64, hash: u128) {
        if let Some(slot) = self.copied(space, addr, hash) {
            self.place(slot, page_of(addr), hash);
        }
    }

    /// The page was written to the stream as a repetition of another.
    pub(super) fn copied(&mut self, space: u32, addr: u64, hash: u128) -> Option<usize> {
        let slot = self.slot(space, addr)?;
        self.slots[slot].hashes[page_of(addr)] = hash.max(UNKNOWN);
        Some(slot)
    }

    /// The page is to be empty. Whether the receiver has to be told.
    pub(super) fn clear(&mut self, space: u32, addr: u64) -> bool {
        let Some(slot) = self.slot(space, addr) else { return true };
        let page = page_of(addr);
        self.see(slot, page);
        std::mem::replace(&mut self.slots[slot].hashes[page], ABSENT) != ABSENT
    }

    /// The range is to be empty. Whether the receiver has to be told.
    pub(super) fn clear_range(&mut self, space: u32, range: &Range<u64>) -> bool {
        let first = range.start & !(SLOT_BYTES - 1);
        let mut held = self.overflown;
        let mut emptied = Vec::new();
        for (&(_, base), &at) in self.at.range((space, first)..(space, range.end)) {
            let slot = &mut self.slots[at as usize];
            let from = range.start.saturating_sub(base) / PAGE;
            let to = (range.end - base).min(SLOT_BYTES) / PAGE;
            let (from, to) = (from as usize, to as usize);
            held |= slot.hashes[from..to].iter().any(|hash| *hash != ABSENT);
            slot.hashes[from..to].fill(ABSENT);
            if let Some(unseen) = &mut slot.unseen {
                (from..to).for_each(|page| unseen[page / 64] &= !(1 << (page % 64)));
            }
            if to - from == SLOT {
                emptied.push(at);
            }
        }
        for at in emptied {
            let Slot { space, base, .. } = self.slots[at as usize];
            self.slots[at as usize].unseen = None;
            self.at.remove(&(space, base));
            self.free.push(at);
            self.recent = None;
        }
        held
    }

    /// Places where `hash` may be.
    fn set(&self, hash: u128) -> Range<usize> {
        let first = hash as usize & (self.places.len() - 1) & !(WAYS - 1);
        first..first + WAYS
    }

    fn placed(&self, at: usize) -> Option<(&Slot, usize)> {
        let place = self.places[at].checked_sub(1)? as usize;
        Some((&self.slots[place / SLOT], place % SLOT))
    }

    /// Notes where a hash is. An older note may be lost for it.
    fn place(&mut self, slot: usize, page: usize, hash: u128) {
        if hash <= UNKNOWN {
            return;
        }
        if self.used > self.places.len() / 2 && self.places.len() < self.limit * SLOT * 2 {
            self.grow();
        }
        let place = (slot * SLOT + page) as u32 + 1;
        let set = self.set(hash);
        let free = set.clone().find(|at| match self.placed(*at) {
            None => true,
            // A page that has changed has its hash elsewhere now.
            Some((slot, page)) => self.set(slot.hashes[page]) != set || self.places[*at] == place,
        });
        // The upper half of the hash chooses whom to displace.
        let at = free.unwrap_or(set.start + (hash >> 64) as usize % WAYS);
        self.used += usize::from(self.places[at] == 0);
        self.places[at] = place;
    }

    fn grow(&mut self) {
        let larger = vec![0; self.places.len() * 2];
        let old = std::mem::replace(&mut self.places, larger);
        self.used = 0;
        for place in old.into_iter().filter(|place| *place != 0) {
            let (slot, page) = ((place - 1) as usize / SLOT, (place - 1) as usize % SLOT);
            self.place(slot, page, self.slots[slot].hashes[page]);
        }
    }
}

fn page_of(addr: u64) -> usize {
    (addr / PAGE) as usize % SLOT
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7f00_0000_0000;

    #[test]
    fn a_page_that_was_overwritten_is_found_no_more() {
        let mut known = Known::new(1 << 16);
        known.sent(7, BASE, 42);
        assert_eq!(known.find(42), Some((7, BASE)));
        known.overwrite(7, BASE);
        assert_eq!(known.find(42), None);
        assert!(!known.holds(7, BASE, 42));
    }

    #[test]
    fn a_slot_that_was_given_to_another_process_does_not_answer_for_the_first() {
        let mut known = Known::new(512);
        known.sent(7, BASE, 42);
        assert!(known.clear_range(7, &(0..1 << 47)));
        known.sent(8, BASE + PAGE, 43);
        assert_eq!((known.find(42), known.find(43)), (None, Some((8, BASE + PAGE))));
    }

    #[test]
    fn the_receiver_is_told_of_a_hole_only_where_it_may_hold_something() {
        let mut known = Known::new(1 << 16);
        assert!(!known.clear(7, BASE));
        assert!(!known.clear_range(7, &(0..1 << 47)));
        known.sent(7, BASE + PAGE, 42);
        assert!(!known.clear_range(7, &(BASE..BASE + PAGE)));
        assert!(!known.clear_range(8, &(BASE..BASE + 2 * PAGE)));
        assert!(known.clear(7, BASE + PAGE));
        assert!(!known.clear(7, BASE + PAGE));
    }

    #[test]
    fn a_page_beyond_the_bound_may_be_there_and_is_never_referred_to() {
        let mut known = Known::new(512);
        known.sent(7, BASE, 42);
        known.sent(7, BASE + SLOT_BYTES, 43);
        assert_eq!(known.find(43), None);
        assert!(!known.holds(7, BASE + SLOT_BYTES, 43));
        assert!(known.clear(7, BASE + SLOT_BYTES));
        assert!(known.clear_range(9, &(BASE..BASE + PAGE)), "nobody knows what is beyond");
    }

    #[test]
    fn what_no_round_has_seen_is_left_over() {
        let mut known = Known::new(1 << 16);
        for page in 0..4 {
            known.learn(7, BASE + page * PAGE, 100 + u128::from(page));
        }
        assert!(known.holds(7, BASE + PAGE, 101));
        assert!(known.unseen());
        let left = known.take_unseen();
        assert_eq!(left, [(7, BASE..BASE + PAGE), (7, BASE + 2 * PAGE..BASE + 4 * PAGE)]);
        assert!(!known.unseen() && known.find(100).is_none());
    }

    #[test]
    fn nearly_all_of_many_hashes_are_found() {
        let mut known = Known::new(1 << 20);
        let hash =
            |page: u64| u128::from(page).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        for page in 1..200_000 {
            known.sent(7, BASE + page * PAGE, hash(page));
        }
        let found = (1..200_000).filter(|page| {
            known.find(hash(*page)).inspect(|at| assert_eq!(*at, (7, BASE + page * PAGE))).is_some()
        });
        assert!(found.count() > 190_000);
    }
}
