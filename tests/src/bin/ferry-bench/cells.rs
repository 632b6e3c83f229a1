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

/// What is looked at while it moves, beside the pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    /// How long a client that asks every millisecond gets no answer.
    Gap,
    /// The same, and how long a client that tries a new connection every millisecond gets none.
    NewConnections,
    /// What gets done under a fixed load, before it moves and while its memory is copied.
    Throughput,
}

/// A way, and how often a cell is moved so if the command line does not say.
pub(crate) type Times = (Way, usize);

/// One line of the benchmark, for each of its ways.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What is moved.
    pub(crate) workload: Workload,
    /// What is looked at.
    pub(crate) watch: Watch,
    /// How it is moved, one after the other.
    pub(crate) ways: Vec<Times>,
    /// Over what.
    pub(crate) link: Link,
    /// Whether it runs when no cell is named.
    pub(crate) default: bool,
}

/// Every way; those that a goal is for more often.
const EVERY: &[Times] = &[
    (Way::Hand, 6),
    (Way::HandLazy, 6),
    (Way::Podman, 4),
    (Way::Stop, 6),
    (Way::Pre, 6),
    (Way::Auto, 20),
    (Way::AutoUnix, 6),
];

/// By hand and as ferry decides, so many times each.
fn hand_and_auto(moves: usize) -> Vec<Times> {
    vec![(Way::Hand, moves), (Way::Auto, moves)]
}

/// Every cell.
pub(crate) fn all() -> Vec<Cell> {
    use Link::{Rate, Unlimited};
    use Workload::{Idle, Python, Redis, RedisLoad, RedisRandom, Tree, Writer};
    let cell = |name, workload, ways, link, default| Cell {
        name,
        workload,
        watch: Watch::Gap,
        ways,
        link,
        default,
    };
    let watched = |watch, cell| Cell { watch, ..cell };
    let auto = |moves| vec![(Way::Auto, moves)];
    let (gigabit, slow) = (Rate("1gbit"), Rate("100mbit"));
    vec![
        cell("idle", Idle, hand_and_auto(6), Unlimited, true),
        cell("redis-40", Redis { megabytes: 40 }, EVERY.to_vec(), Unlimited, true),
        cell("redis-400", Redis { megabytes: 400 }, EVERY.to_vec(), Unlimited, true),
        cell("redis-4g", Redis { megabytes: 4000 }, auto(10), Unlimited, true),
        cell("redis-4g-1gbit", Redis { megabytes: 4000 }, auto(2), gigabit, true),
        cell("writer-100-1gbit", Writer { rate: 100 }, hand_and_auto(10), gigabit, true),
        cell("redis-load", RedisLoad { megabytes: 40 }, hand_and_auto(6), Unlimited, true),
        cell("tree-50", Tree { children: 50 }, hand_and_auto(6), Unlimited, true),
        cell("python-200", Python { connections: 200 }, hand_and_auto(6), Unlimited, true),
        watched(
            Watch::NewConnections,
            cell("redis-40-new", Redis { megabytes: 40 }, hand_and_auto(6), Unlimited, true),
        ),
        watched(
            Watch::Throughput,
            cell("throughput", RedisRandom { megabytes: 400 }, auto(4), gigabit, true),
        ),
        cell("writer-10", Writer { rate: 10 }, hand_and_auto(6), Unlimited, false),
        cell("writer-100", Writer { rate: 100 }, EVERY.to_vec(), Unlimited, false),
        cell("writer-500", Writer { rate: 500 }, hand_and_auto(6), Unlimited, false),
        cell("writer-10-1gbit", Writer { rate: 10 }, hand_and_auto(6), gigabit, false),
        cell("writer-10-100mbit", Writer { rate: 10 }, hand_and_auto(4), slow, false),
        cell("redis-40-1gbit", Redis { megabytes: 40 }, hand_and_auto(10), gigabit, false),
        cell("redis-400-1gbit", Redis { megabytes: 400 }, hand_and_auto(10), gigabit, false),
        cell("redis-40-100mbit", Redis { megabytes: 40 }, hand_and_auto(4), slow, false),
        cell("redis-400-100mbit", Redis { megabytes: 400 }, hand_and_auto(2), slow, false),
    ]
}

impl Cell {
    /// This cell with what the command line says.
    pub(crate) fn with(mut self, ways: &[Way], moves: Option<usize>) -> Self {
        let usual = |way: Way| self.ways.iter().find(|(w, _)| *w == way).map_or(6, |(_, n)| *n);
        if !ways.is_empty() {
            self.ways = ways.iter().map(|&way| (way, usual(way))).collect();
        }
        for (_, times) in &mut self.ways {
            *times = moves.unwrap_or(*times);
        }
        self
    }

    /// MB of memory that must be there: the source's, the destination's, and copies on the way.
    pub(crate) fn memory_needed(&self) -> u64 {
        let copies = if self.ways.iter().all(|(way, _)| way.is_ferry()) { 3 } else { 4 };
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

    #[test]
    fn the_command_line_replaces_ways_and_moves() {
        let cell = || all().into_iter().find(|cell| cell.name == "redis-40").unwrap();
        assert_eq!(cell().with(&[], None).ways, EVERY);
        assert_eq!(cell().with(&[Way::Auto], None).ways, [(Way::Auto, 20)]);
        assert_eq!(cell().with(&[Way::Auto], Some(3)).ways, [(Way::Auto, 3)]);
        assert!(cell().with(&[], Some(2)).ways.iter().all(|(_, times)| *times == 2));
    }
}
