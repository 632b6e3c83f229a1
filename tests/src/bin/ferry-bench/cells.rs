//! The cells: what is moved, in which ways, over which link.

use crate::ways::Way;
use crate::workloads::Workload;

/// Bandwidth between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// What the machine can do: all hosts are on it.
    Unlimited,
    /// A rate that `tc` knows.
    Rate(&'static str),
}

impl Link {
    /// For tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unlimited => "unlimited",
            Self::Rate(rate) => rate,
        }
    }

    /// A shell command that makes the host's end of the link so.
    pub(crate) fn command(self) -> String {
        let clear = "tc qdisc del dev eth0 root 2>/dev/null";
        match self {
            Self::Unlimited => format!("{clear}; true"),
            // A burst below what the link carries in a tick of the kernel would never reach the
            // rate; 256 KB are 2 ms of 1 Gbit/s.
            Self::Rate(rate) => format!(
                "{clear}; tc qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 20ms"
            ),
        }
    }
}

/// One line of the benchmark, for each of its ways.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What is moved.
    pub(crate) workload: Workload,
    /// How, one after the other.
    pub(crate) ways: &'static [Way],
    /// Over what.
    pub(crate) link: Link,
    /// How often in each way, if the command line does not say.
    pub(crate) moves: usize,
    /// Whether it runs when no cell is named.
    pub(crate) default: bool,
}

const ALL_WAYS: &[Way] = &[Way::Hand, Way::Stop, Way::Pre, Way::Auto];
const HAND_AND_AUTO: &[Way] = &[Way::Hand, Way::Auto];
const AUTO: &[Way] = &[Way::Auto];

/// Every cell.
pub(crate) fn all() -> Vec<Cell> {
    use Link::{Rate, Unlimited};
    use Workload::{Idle, Python, Redis, RedisLoad, Tree, Writer};
    let cell = |name, workload, ways, link, moves, default| Cell {
        name,
        workload,
        ways,
        link,
        moves,
        default,
    };
    let gigabit = Rate("1gbit");
    vec![
        cell("idle", Idle, ALL_WAYS, Unlimited, 6, true),
        cell("redis-40", Redis { megabytes: 40 }, ALL_WAYS, Unlimited, 20, true),
        cell("redis-400", Redis { megabytes: 400 }, ALL_WAYS, Unlimited, 20, true),
        cell("redis-4g", Redis { megabytes: 4000 }, AUTO, Unlimited, 10, true),
        cell("redis-4g-1gbit", Redis { megabytes: 4000 }, AUTO, gigabit, 2, true),
        cell("writer-100-1gbit", Writer { rate: 100 }, HAND_AND_AUTO, gigabit, 10, true),
        cell("redis-load", RedisLoad { megabytes: 40 }, HAND_AND_AUTO, Unlimited, 6, true),
        cell("tree-50", Tree { children: 50 }, HAND_AND_AUTO, Unlimited, 6, true),
        cell("python-200", Python { connections: 200 }, HAND_AND_AUTO, Unlimited, 6, true),
        cell("writer-10", Writer { rate: 10 }, HAND_AND_AUTO, Unlimited, 6, false),
        cell("writer-100", Writer { rate: 100 }, ALL_WAYS, Unlimited, 6, false),
        cell("writer-500", Writer { rate: 500 }, HAND_AND_AUTO, Unlimited, 6, false),
        cell("writer-10-1gbit", Writer { rate: 10 }, HAND_AND_AUTO, gigabit, 6, false),
        cell("writer-10-100mbit", Writer { rate: 10 }, HAND_AND_AUTO, Rate("100mbit"), 4, false),
        cell("redis-40-1gbit", Redis { megabytes: 40 }, HAND_AND_AUTO, gigabit, 10, false),
        cell("redis-400-1gbit", Redis { megabytes: 400 }, HAND_AND_AUTO, gigabit, 10, false),
        cell("redis-40-100mbit", Redis { megabytes: 40 }, HAND_AND_AUTO, Rate("100mbit"), 4, false),
    ]
}

impl Cell {
    /// MB of memory that must be there: the source's, the destination's, and copies on the way.
    pub(crate) fn memory_needed(&self) -> u64 {
        let copies = if self.ways.contains(&Way::Hand) { 4 } else { 3 };
        self.workload.megabytes() * copies + 1024
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_cells_are_their_own() {
        let mut names: Vec<_> = all().iter().map(|cell| cell.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
