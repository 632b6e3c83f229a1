//! What is to be hidden: a checked view of the orders, as the driver of the dump wrote them.

use crate::format as f;

/// Orders whose every word has been checked.
#[derive(Clone, Copy)]
pub(crate) struct Orders<'a> {
    words: &'a [u64],
    tasks: usize,
}

/// A task that something is hidden of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Task<'a> {
    /// Length of the valid copy of its smaps, bytes.
    pub(crate) smaps: Option<u64>,
    pub(crate) ranges: Ranges<'a>,
}

/// Ranges in ascending order that do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ranges<'a>(&'a [u64]);

/// A hidden range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Guard pages may lie in it.
    pub(crate) guards: bool,
}

impl<'a> Orders<'a> {
    /// Checks `words`; `None` if anything at all is wrong with them.
    pub(crate) fn new(words: &'a [u64]) -> Option<Self> {
        let word = |at: usize| words.get(at).copied().map(u64::from_le);
        if word(0)? != f::ORDERS_MAGIC || word(1)? != f::ORDERS_VERSION {
            return None;
        }
        let tasks = usize::try_from(word(2)?).ok()?;
        let ranges = usize::try_from(word(3)?).ok()?;
        let size = f::HEADER_WORDS
            .checked_add(tasks.checked_mul(f::TASK_WORDS)?)?
            .checked_add(ranges.checked_mul(f::RANGE_WORDS)?)?;
        if size != words.len()
            || word(f::CHECKSUM_WORD)? != f::checksum(words.iter().copied().map(u64::from_le))
        {
            return None;
        }
        let orders = Self { words, tasks };
        let mut declared = 0_usize;
        for at in 0..tasks {
            let (pid, _, _, count) = orders.task_words(at)?;
            let task = orders.nth(at, declared)?;
            declared = declared.checked_add(count)?;
            if i32::try_from(pid).is_err() || pid == 0 || !task.ranges.are_sound() {
                return None;
            }
        }
        (declared == ranges).then_some(orders)
    }

    /// Orders that [`Orders::new`] took before.
    pub(crate) fn checked_before(words: &'a [u64]) -> Option<Self> {
        let tasks = usize::try_from(u64::from_le(*words.get(2)?)).ok()?;
        Some(Self { words, tasks })
    }

    /// What is hidden of the task that CRIU's /proc shows as `pid`.
    pub(crate) fn task(&self, pid: i32) -> Option<Task<'a>> {
        let pid = u64::try_from(pid).ok()?;
        let mut before = 0_usize;
        for at in 0..self.tasks {
            let (number, _, _, count) = self.task_words(at)?;
            if number == pid {
                return self.nth(at, before);
            }
            before = before.checked_add(count)?;
        }
        None
    }

    fn task_words(&self, at: usize) -> Option<(u64, u64, u64, usize)> {
        let first = f::HEADER_WORDS.checked_add(at.checked_mul(f::TASK_WORDS)?)?;
        let words = self.words.get(first..first.checked_add(f::TASK_WORDS)?)?;
        let [pid, flags, smaps, count] = words else { return None };
        Some((
            u64::from_le(*pid),
            u64::from_le(*flags),
            u64::from_le(*smaps),
            usize::try_from(u64::from_le(*count)).ok()?,
        ))
    }

    /// Task number `at`, which `before` ranges come before.
    fn nth(&self, at: usize, before: usize) -> Option<Task<'a>> {
        let (_, flags, length, count) = self.task_words(at)?;
        let first = f::HEADER_WORDS
            .checked_add(self.tasks.checked_mul(f::TASK_WORDS)?)?
            .checked_add(before.checked_mul(f::RANGE_WORDS)?)?;
        let end = first.checked_add(count.checked_mul(f::RANGE_WORDS)?)?;
        let ranges = Ranges(self.words.get(first..end)?);
        Some(Task { smaps: (flags & f::TASK_SMAPS != 0).then_some(length), ranges })
    }
}

impl<'a> Ranges<'a> {
    fn get(self, at: usize) -> Option<Range> {
        let first = at.checked_mul(f::RANGE_WORDS)?;
        let start = u64::from_le(*self.0.get(first)?);
        let end = u64::from_le(*self.0.get(first.checked_add(1)?)?);
        let guards = start & f::RANGE_GUARDS != 0;
        Some(Range { start: start & !f::RANGE_GUARDS, end, guards })
    }

    fn len(self) -> usize {
        self.0.len() / f::RANGE_WORDS
    }

    fn are_sound(self) -> bool {
        let mut last = 0;
        (0..self.len()).filter_map(|at| self.get(at)).all(|range| {
            let aligned = range.start % f::ALIGN == 0 && range.end % f::ALIGN == 0;
            let sound = aligned && range.start >= last && range.start < range.end;
            last = range.end;
            sound
        })
    }

    /// The ranges that end after `address`, ascending.
    pub(crate) fn after(self, address: u64) -> impl Iterator<Item = Range> + 'a {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.get(middle) {
                Some(range) if range.end <= address => low = middle + 1,
                _ => high = middle,
            }
        }
        (low..self.len()).map_while(move |at| self.get(at))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    type Given<'a> = (u64, Option<u64>, &'a [(u64, u64, bool)]);

    /// The words of orders for (pid, length of smaps, ranges).
    pub(crate) fn words(tasks: &[Given<'_>]) -> Vec<u64> {
        let count = tasks.iter().map(|task| task.2.len() as u64).sum();
        let mut words = vec![f::ORDERS_MAGIC, f::ORDERS_VERSION, tasks.len() as u64, count, 0];
        for (pid, smaps, ranges) in tasks {
            words.extend([*pid, u64::from(smaps.is_some()), smaps.unwrap_or(0)]);
            words.push(ranges.len() as u64);
        }
        for (start, end, guards) in tasks.iter().flat_map(|task| task.2) {
            words.extend([start | u64::from(*guards), *end]);
        }
        words[f::CHECKSUM_WORD] = f::checksum(words.iter().copied());
        words.iter().map(|word| word.to_le()).collect()
    }

    #[test]
    fn each_task_has_its_own_ranges() {
        let words = words(&[
            (7, None, &[(0x1000, 0x2000, false), (0x2000, 0x9000, true)]),
            (8, Some(50), &[]),
            (9, None, &[(0x5000, 0x6000, false)]),
        ]);
        let orders = Orders::new(&words).unwrap();
        let seven: Vec<_> = orders.task(7).unwrap().ranges.after(0x1fff).collect();
        assert_eq!(seven.len(), 2);
        assert_eq!(seven[1], Range { start: 0x2000, end: 0x9000, guards: true });
        assert_eq!(orders.task(7).unwrap().ranges.after(0x2000).count(), 1);
        assert_eq!(orders.task(7).unwrap().smaps, None);
        assert_eq!(orders.task(8).unwrap().smaps, Some(50));
        assert_eq!(orders.task(9).unwrap().ranges.after(0).next().unwrap().start, 0x5000);
        assert_eq!(orders.task(10), None);
        assert_eq!(orders.task(-1), None);
    }

    #[test]
    fn torn_or_changed_orders_are_none() {
        let good = words(&[(7, None, &[(0x1000, 0x2000, false)]), (8, Some(1), &[])]);
        assert!(Orders::new(&good).is_some());
        for length in 0..good.len() {
            assert!(Orders::new(&good[..length]).is_none(), "{length} words");
        }
        for at in 0..good.len() {
            for bit in 0..64 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(Orders::new(&bad).is_none(), "word {at} bit {bit}");
            }
        }
    }

    #[test]
    fn ranges_that_overlap_or_lie_across_pages_are_refused() {
        for ranges in [
            &[(0x3000, 0x4000, false), (0x1000, 0x2000, false)][..],
            &[(0x1000, 0x3000, false), (0x2000, 0x4000, false)],
            &[(0x1000, 0x1000, false)],
            &[(0x2000, 0x1000, false)],
            &[(0x1800, 0x3000, false)],
            &[(0x1000, 0x3001, false)],
        ] {
            assert!(Orders::new(&words(&[(7, None, ranges)])).is_none(), "{ranges:x?}");
        }
        assert!(Orders::new(&words(&[(0, None, &[])])).is_none());
        assert!(Orders::new(&words(&[(1 << 40, None, &[])])).is_none());
    }

    #[test]
    fn no_tasks_are_fine() {
        let words = words(&[]);
        assert_eq!(Orders::new(&words).unwrap().task(1), None);
    }
}
