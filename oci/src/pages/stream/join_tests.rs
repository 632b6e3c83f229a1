//! Real processes are tracked and streamed into a real store, and every byte compared.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::super::*;
use super::*;
use crate::pages::areas::Layout;
use crate::pages::store::Limits;
use crate::pages::tracker::workload::{Workload, members};
use crate::pages::tracker::{Kind, Tracker, probe};

/// Processes at one end, a store at the other.
struct Move {
    workload: Workload,
    tracker: Tracker,
    sender: Sender,
    receiver: Receiver,
    store: Store,
    source: Processes,
}

fn options() -> Options {
    Options { restraint: None, ..Options::default() }
}

impl Move {
    fn new(workload: Workload) -> Self {
        let group = workload.pid();
        let tracker = Tracker::attach(Kind::WriteProtect, move || Ok(members(group))).unwrap();
        let store = Store::create(&Limits::default()).unwrap();
        let source = Processes::default();
        let (sender, receiver) = (Sender::new(options()), Receiver::new());
        Self { workload, tracker, sender, receiver, store, source }
    }

    fn round(&mut self, frozen: bool) -> RoundStats {
        let round = self.tracker.round(frozen).unwrap();
        let changes: Vec<Change<'_>> = round.processes.iter().map(Change::from).collect();
        let mut wire = Vec::new();
        let stats = self.sender.round(frozen, &changes, &self.source, &mut wire).unwrap();
        for (pid, range) in self.sender.vanished() {
            self.tracker.again(*pid, std::slice::from_ref(range));
        }
        for chunk in wire.chunks(MAX_CHUNK) {
            self.receiver.push(chunk, &mut self.store).unwrap();
        }
        self.receiver.finish().unwrap();
        stats
    }

    /// A new attempt that begins with what the store holds.
    fn second_attempt(&mut self) -> RoundStats {
        let group = self.workload.pid();
        self.tracker = Tracker::attach(Kind::WriteProtect, move || Ok(members(group))).unwrap();
        (self.sender, self.receiver) = (Sender::new(options()), Receiver::new());
        let mut wire = Vec::new();
        send_hashes(self.store.hashes(), &mut wire).unwrap();
        let mut reader = HashReader::new();
        for chunk in wire.chunks(MAX_CHUNK) {
            reader.push(chunk, |space, addr, hash| self.sender.learn(space, addr, hash)).unwrap();
        }
        reader.finish().unwrap();
        self.round(false)
    }

    /// The last round, after which every byte of the processes is in the store, and nothing else.
    fn finish(&mut self) -> RoundStats {
        self.workload.stop();
        let stats = self.round(true);
        let mut stored: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for (space, addr, _) in self.store.hashes() {
            stored.entry(space).or_default().push(addr);
        }
        let mut equal = 0;
        for pid in self.workload.pids() {
            let space = pid.unsigned_abs();
            let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
            let (mut real, mut copy) = ([0; PAGE as usize], [0; PAGE as usize]);
            let mut within = 0;
            for range in Layout::read(pid).unwrap().hideable() {
                for addr in range.clone().step_by(PAGE as usize) {
                    let there = self.store.read(space, addr, &mut copy).unwrap();
                    within += usize::from(there);
                    // A guard page cannot be read, and holds nothing.
                    if memory.read_exact_at(&mut real, addr).is_err() {
                        real.fill(0);
                    }
                    assert!(real == copy, "page {addr:#x} of process {pid} differs");
                }
            }
            let stored = stored.remove(&space).unwrap_or_default();
            assert_eq!(within, stored.len(), "pages that no area of process {pid} has");
            equal += within;
        }
        assert!(stored.is_empty(), "the store has processes that are gone");
        assert!(equal > 100, "only {equal} pages were compared");
        self.workload.go_on();
        stats
    }
}

macro_rules! need_write_protect {
    ($name:literal) => {
        let found = probe();
        if !found.write_protect {
            println!("skipped: {}: {}", $name, found.write_protect_why);
            return;
        }
    };
}

#[test]
fn every_byte_of_processes_that_write_fork_and_unmap_is_in_the_store_at_the_end() {
    need_write_protect!(
        "every_byte_of_processes_that_write_fork_and_unmap_is_in_the_store_at_the_end"
    );
    let mut m = Move::new(Workload::start());
    m.workload.address("map a 3000 rw");
    m.workload.address("map b 2000 rw");
    m.workload.address("map busy 1000 rw");
    m.workload.tell("fill a 0 3000 1");
    m.workload.tell("fill b 0 2000 2");
    m.workload.tell("threads busy 2");
    let first = m.round(false);
    assert!(first.sent() >= 5000, "{first:?}");
    m.workload.tell("protect b none");
    m.workload.tell("advise a 100 200 4");
    m.workload.tell("unmap a 300 400");
    m.workload.tell("move a 3500");
    m.round(false);
    m.workload.tell("fork busy 0 10 5");
    let forked = m.round(false);
    assert!(forked.same + forked.known > 4000, "a child has what its parent has: {forked:?}");
    m.round(false);
    let last = m.finish();
    assert!(last.frozen && last.zstd == 0);
}

#[test]
fn a_second_attempt_sends_what_was_written_since_and_ends_equal() {
    need_write_protect!("a_second_attempt_sends_what_was_written_since_and_ends_equal");
    let mut m = Move::new(Workload::start());
    m.workload.address("map a 4000 rw");
    m.workload.tell("fill a 0 4000 1");
    m.round(false);
    m.finish();
    m.workload.tell("fill a 1000 1050 7");
    m.workload.tell("unmap a 2000 2500");
    let second = m.second_attempt();
    assert!(second.known > 3300, "{second:?}");
    // The process's own stacks and heap besides.
    assert!(second.sent() < 400, "{second:?}");
    m.finish();
}

/// `cargo test --release -p ferry-oci how_fast_it_is -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn how_fast_it_is_from_a_process_into_a_store() {
    let mut m = Move::new(Workload::start());
    m.workload.address("map a 131072 rw");
    m.workload.tell("fill a 0 131072 1");
    let round = m.tracker.round(false).unwrap();
    let changes: Vec<Change<'_>> = round.processes.iter().map(Change::from).collect();
    let mut wire = Vec::new();
    let sent = m.sender.round(false, &changes, &m.source, &mut wire).unwrap();
    let begin = std::time::Instant::now();
    for chunk in wire.chunks(MAX_CHUNK) {
        m.receiver.push(chunk, &mut m.store).unwrap();
    }
    let rate = |took: std::time::Duration| (sent.read * PAGE) as f64 / took.as_secs_f64() / 1e9;
    println!("sent {:.2} GB/s, received {:.2} GB/s", rate(sent.took), rate(begin.elapsed()));
    m.workload.tell("fill a 0 5000 2");
    m.round(false);
    m.workload.tell("fill a 0 5000 3");
    m.workload.stop();
    let round = m.tracker.round(true).unwrap();
    let changes: Vec<Change<'_>> = round.processes.iter().map(Change::from).collect();
    let mut wire = Vec::with_capacity(64 << 20);
    let stats = m.sender.round(true, &changes, &m.source, &mut wire).unwrap();
    println!("frozen: scan {:?}, {} pages sent in {:?}", round.took, stats.raw, stats.took);
}
