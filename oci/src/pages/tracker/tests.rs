//! What a store built from the rounds holds, against the memory itself when the processes stand still.

mod measure;
mod registration;
mod store;

use std::time::{Duration, Instant};

use super::workload::{Workload, members};
use super::*;
use store::Store;

/// Writes cannot be tracked here: says so, as the counting of skipped tests wants it.
macro_rules! need_write_protect {
    ($name:literal) => {
        let found = probe();
        if !found.write_protect {
            println!("skipped: {}: {}", $name, found.write_protect_why);
            return;
        }
    };
}
use need_write_protect;

struct Tracked {
    workload: Workload,
    tracker: Tracker,
    store: Store,
}

impl Tracked {
    fn new(kind: Kind) -> Self {
        Self::of(Workload::start(), kind)
    }

    fn of(workload: Workload, kind: Kind) -> Self {
        let group = workload.pid();
        let tracker = Tracker::attach(kind, move || Ok(members(group))).unwrap();
        Self { workload, tracker, store: Store::default() }
    }

    fn tell(&mut self, command: &str) -> String {
        self.workload.tell(command)
    }

    /// A round beside the running processes, whose pages are read.
    fn round(&mut self) -> Round {
        let round = self.tracker.round(false).unwrap();
        for (pid, missing) in self.store.apply(&round) {
            self.tracker.again(pid, &missing);
        }
        round
    }

    /// The last round, after which store and memory must agree.
    fn finish(&mut self) -> Round {
        self.workload.stop();
        let round = self.tracker.round(true).unwrap();
        let missing = self.store.apply(&round);
        assert!(missing.is_empty(), "pages of stopped processes could not be read: {missing:x?}");
        let pages = self.store.assert_equal(&self.workload.pids());
        assert_eq!(round.present, pages * PAGE);
        self.workload.go_on();
        round
    }

    fn changes(round: &Round, pid: i32) -> &Changes {
        round.processes.iter().find(|c| c.pid == pid).unwrap()
    }
}

fn touches(ranges: &[Range<u64>], page: u64) -> bool {
    ranges.iter().any(|r| r.contains(&page))
}

#[test]
fn only_what_was_written_is_listed_again() {
    need_write_protect!("only_what_was_written_is_listed_again");
    let mut t = Tracked::new(Kind::WriteProtect);
    let pid = t.workload.pid();
    let a = t.workload.address("map a 1000 rw");
    t.tell("fill a 0 1000 1");
    let first = t.round();
    let changes = Tracked::changes(&first, pid);
    assert_eq!(changes.untracked, None);
    assert!((0..1000).all(|p| touches(&changes.written, a + p * PAGE)));
    t.round();
    t.tell("fill a 500 503 2");
    let round = t.round();
    let changes = Tracked::changes(&round, pid);
    let listed: Vec<_> = (0..1000).filter(|p| touches(&changes.written, a + p * PAGE)).collect();
    assert_eq!(listed, [500, 501, 502]);
    t.tell("fill a 7 8 3");
    let last = t.finish();
    let changes = Tracked::changes(&last, pid);
    let listed: Vec<_> = (0..1000).filter(|p| touches(&changes.written, a + p * PAGE)).collect();
    assert_eq!(listed, [7]);
    assert!(last.pages < 60, "{} pages", last.pages);
}

/// Commands, with a round or the end behind each; after every end store and memory agree.
fn history(name: &str, commands: &[&str]) {
    if !probe().write_protect {
        println!("skipped: {name}: {}", probe().write_protect_why);
        return;
    }
    for kind in [Kind::WriteProtect, Kind::None] {
        for mode in ["end", "round", "end, round", "round, end"] {
            let mut t = Tracked::new(kind);
            for command in commands {
                let answer = t.tell(command);
                assert!(!answer.contains(' '), "{command}: {answer}");
                for step in mode.split(", ") {
                    match step {
                        "end" => t.finish(),
                        _ => t.round(),
                    };
                }
            }
            t.finish();
        }
    }
}

#[test]
fn areas_that_grow_move_and_go_are_followed() {
    let commands = [
        "map a 300 rw",
        "fill a 0 300 1",
        "move a 200",
        "fill a 5 9 2",
        "move a 700",
        "fill a 600 700 3",
        "map b 40 rw",
        "fill b 0 40 4",
        "unmap b 10 20",
        "again b",
        "fill b 3 5 5",
        "brk 60",
        "brk 30",
        "stack 300",
        "map c 20 rw down",
        "fill c 19 20 6",
    ];
    history("areas_that_grow_move_and_go_are_followed", &commands);
}

#[test]
fn memory_that_is_mapped_anew_at_its_place_is_all_new() {
    let commands = ["map a 50 rw", "fill a 0 50 1", "again a", "fill a 10 20 2", "again a"];
    history("memory_that_is_mapped_anew_at_its_place_is_all_new", &commands);
}

#[test]
fn memory_that_may_not_be_touched_is_followed() {
    let commands = [
        "map a 50 rw",
        "fill a 0 50 1",
        "protect a none",
        "protect a r",
        "protect a rw",
        "fill a 10 20 2",
        "protect a none",
        "map b 10 none",
    ];
    history("memory_that_may_not_be_touched_is_followed", &commands);
}

#[test]
fn dropped_pages_are_forgotten_with_and_without_their_tables() {
    // 4 is MADV_DONTNEED. The second drop takes whole page tables.
    let commands = [
        "map a 3000 rw",
        "fill a 0 3000 1",
        "advise a 10 20 4",
        "advise a 0 2800 4",
        "fill a 700 701 2",
        "advise a 0 3000 4",
        "read a 0 3000",
        "fill a 5 6 3",
    ];
    history("dropped_pages_are_forgotten_with_and_without_their_tables", &commands);
}

#[test]
fn huge_pages_are_followed_when_split_and_dropped() {
    let commands = [
        "thp a 2048",
        "fill a 0 1 1",
        "fill a 600 601 2",
        "advise a 512 1024 4",
        "fill a 513 514 3",
        "advise a 0 7 4",
        "move a 1024",
        "fill a 100 110 4",
        "read a 1000 1024",
    ];
    history("huge_pages_are_followed_when_split_and_dropped", &commands);
}

#[test]
fn locked_memory_leaves_and_comes_back() {
    let commands =
        ["map a 20 rw", "fill a 0 20 1", "lock a", "fill a 3 4 2", "unlock a", "fill a 7 8 3"];
    history("locked_memory_leaves_and_comes_back", &commands);
}

#[test]
fn forked_children_are_followed() {
    let commands = [
        "map a 200 rw",
        "fill a 0 200 1",
        "fork a 50 60 2",
        "fill a 55 70 3",
        "fork a 0 200 4",
        "fill a 0 1 5",
    ];
    history("forked_children_are_followed", &commands);
}

#[test]
fn an_exec_begins_anew() {
    let commands = ["map a 200 rw", "fill a 0 200 1", "exec", "map a 20 rw", "fill a 0 20 2"];
    history("an_exec_begins_anew", &commands);
    need_write_protect!("an_exec_begins_anew");
    let mut t = Tracked::new(Kind::WriteProtect);
    t.round();
    t.round();
    assert_eq!(t.tell("exec"), "ready");
    // All of the new memory first, and then hardly anything: it is tracked again.
    let (first, second) = (t.round(), t.round());
    assert!(second.pages * 2 < first.pages, "{} {}", second.pages, first.pages);
    assert_eq!(Tracked::changes(&second, t.workload.pid()).untracked, None);
}

#[test]
fn guard_pages_are_not_listed() {
    let mut t = Tracked::new(Kind::None);
    t.tell("map a 20 rw");
    t.tell("fill a 0 20 1");
    if t.tell("advise a 5 7 102") != "ok" {
        println!("skipped: guard_pages_are_not_listed: not in this kernel");
        return;
    }
    t.finish();
    history("guard_pages_are_not_listed", &["map a 9 rw", "fill a 0 9 1", "advise a 5 7 102"]);
}

#[test]
fn guard_pages_are_found_in_the_freeze() {
    need_write_protect!("guard_pages_are_found_in_the_freeze");
    // 102 sets them, 103 takes them away.
    for kind in [Kind::WriteProtect, Kind::None] {
        let mut t = Tracked::new(kind);
        let a = t.workload.address("map a 2000 rw");
        t.tell("fill a 0 2000 1");
        if t.tell("advise a 1205 1207 102") != "ok" || !crate::pages::scan::lists_guards() {
            println!("skipped: guard_pages_are_found_in_the_freeze: not in this kernel");
            return;
        }
        let found = |t: &mut Tracked| -> Vec<u64> {
            t.finish();
            let ranges = t.tracker.guards().flat_map(|(_, ranges)| ranges);
            ranges.flat_map(|r| (r.start - a) / PAGE..(r.end - a) / PAGE).collect()
        };
        t.round();
        // After the last round beside it.
        t.tell("advise a 5 6 102");
        assert_eq!(found(&mut t), [5, 1205, 1206], "{kind:?}");
        t.tell("advise a 1205 1207 103");
        assert_eq!(found(&mut t), [5], "{kind:?}");
    }
}

#[test]
fn the_zero_page_is_never_listed() {
    need_write_protect!("the_zero_page_is_never_listed");
    let mut t = Tracked::new(Kind::WriteProtect);
    let a = t.workload.address("map a 100 rw");
    t.tell("read a 0 100");
    for _ in 0..2 {
        let round = t.round();
        let changes = Tracked::changes(&round, t.workload.pid());
        assert!((0..100).all(|p| !touches(&changes.written, a + p * PAGE)));
    }
    t.tell("fill a 3 4 1");
    let round = t.finish();
    let changes = Tracked::changes(&round, t.workload.pid());
    assert!((0..100).all(|p| touches(&changes.written, a + p * PAGE) == (p == 3)));
}

#[test]
fn a_new_child_is_listed_whole_and_then_tracked() {
    need_write_protect!("a_new_child_is_listed_whole_and_then_tracked");
    let mut t = Tracked::new(Kind::WriteProtect);
    let a = t.workload.address("map a 500 rw");
    t.tell("fill a 0 500 1");
    t.round();
    t.workload.send("fork a 3 4 2");
    // The child answers, too, and either may be the first.
    let child = [t.workload.answer(), t.workload.answer()];
    let child: i32 = child.iter().find_map(|c| c.parse().ok()).unwrap();
    let listed = |round: &Round| {
        let changes = Tracked::changes(round, child);
        assert_eq!(changes.untracked, None);
        (0..500).filter(|p| touches(&changes.written, a + p * PAGE)).count()
    };
    assert_eq!(listed(&t.round()), 500);
    assert_eq!(listed(&t.round()), 0);
    workload::kill(child, libc::SIGKILL);
    let deadline = Instant::now() + Duration::from_secs(10);
    while t.workload.pids().contains(&child) {
        assert!(Instant::now() < deadline);
    }
    let round = t.round();
    let gone = Tracked::changes(&round, child);
    assert!(gone.exited && (0..500).all(|p| touches(&gone.absent, a + p * PAGE)));
    assert_eq!(gone, &round.processes[0]);
    t.finish();
    assert!(t.round().processes.iter().all(|c| c.pid != child));
}

#[test]
fn a_child_that_shares_the_memory_waits_for_the_freeze() {
    need_write_protect!("a_child_that_shares_the_memory_waits_for_the_freeze");
    let mut t = Tracked::new(Kind::WriteProtect);
    t.tell("map a 100 rw");
    t.tell("fill a 0 100 1");
    t.round();
    let child: i32 = t.tell("vfork").parse().unwrap();
    t.tell("fill a 0 50 2");
    let round = t.round();
    assert!(round.processes.iter().all(|c| c.pid != child));
    assert!(Tracked::changes(&round, t.workload.pid()).written.len() < 100);
    let round = t.finish();
    assert!(round.processes.iter().any(|c| c.pid == child));
}

#[test]
fn a_process_that_cannot_be_attached_to_is_listed_whole() {
    need_write_protect!("a_process_that_cannot_be_attached_to_is_listed_whole");
    let mut t = Tracked::new(Kind::WriteProtect);
    let a = t.workload.address("map a 100 rw");
    t.tell("fill a 0 100 1");
    t.workload.stop();
    for _ in 0..2 {
        let round = t.round();
        let changes = Tracked::changes(&round, t.workload.pid());
        assert!(changes.untracked.as_deref().unwrap().contains("stopped"));
        assert!((0..100).all(|p| touches(&changes.written, a + p * PAGE)));
    }
    t.finish();
    t.round();
    let round = t.round();
    let changes = Tracked::changes(&round, t.workload.pid());
    assert!(changes.untracked.is_none() && !touches(&changes.written, a));
}

#[test]
fn without_tracking_every_round_lists_everything() {
    let mut t = Tracked::new(Kind::None);
    let a = t.workload.address("map a 100 rw");
    t.tell("fill a 0 100 1");
    for _ in 0..2 {
        let round = t.round();
        let changes = Tracked::changes(&round, t.workload.pid());
        assert!((0..100).all(|p| touches(&changes.written, a + p * PAGE)));
    }
    t.finish();
}

#[test]
fn pages_that_may_be_written_by_devices_are_listed_twice() {
    need_write_protect!("pages_that_may_be_written_by_devices_are_listed_twice");
    let mut t = Tracked::new(Kind::WriteProtect);
    let a = t.workload.address("map a 100 rw");
    if t.tell("direct") != "ok" {
        println!("skipped: pages_that_may_be_written_by_devices_are_listed_twice: no O_DIRECT");
        return;
    }
    t.round();
    t.tell("fill a 4 5 1");
    let mut listed =
        || touches(&Tracked::changes(&t.round(), t.workload.pid()).written, a + 4 * PAGE);
    assert_eq!([listed(), listed(), listed()], [true, true, false]);
}

#[test]
fn pages_that_did_not_arrive_are_listed_again() {
    need_write_protect!("pages_that_did_not_arrive_are_listed_again");
    let mut t = Tracked::new(Kind::WriteProtect);
    let a = t.workload.address("map a 100 rw");
    t.tell("fill a 0 50 1");
    t.round();
    let pid = t.workload.pid();
    t.tracker.again(pid, std::slice::from_ref(&(a + 40 * PAGE..a + 60 * PAGE)));
    let round = t.round();
    let written = &Tracked::changes(&round, pid).written;
    let listed: Vec<_> = (0..100).filter(|p| touches(written, a + p * PAGE)).collect();
    assert_eq!(listed, (40..50).collect::<Vec<_>>());
    t.finish();
}

#[test]
fn changed_areas_are_noticed_before_the_scan() {
    need_write_protect!("changed_areas_are_noticed_before_the_scan");
    let mut t = Tracked::new(Kind::WriteProtect);
    t.tell("map a 10 rw");
    t.tell("fill a 0 10 1");
    t.round();
    let check = |t: &Tracked| {
        t.workload.stop();
        let check = t.tracker.check_areas().unwrap();
        t.workload.go_on();
        check.changed
    };
    let pid = t.workload.pid();
    t.tell("fill a 0 10 2");
    assert!(check(&t).is_empty());
    t.tell("lock a");
    assert_eq!(check(&t), [pid]);
    t.round();
    t.tell("protect a r");
    assert_eq!(check(&t), [pid]);
    t.round();
    assert!(check(&t).is_empty());
    let child = t.tell("vfork").parse().unwrap();
    // The stack of the child is a new area.
    assert_eq!(check(&t), [child, pid]);
    let layouts = t.tracker.layouts();
    assert!(layouts.iter().any(|l| l.pid == pid && !l.layout.smaps.is_empty()));
}

#[test]
fn nothing_stays_behind_in_the_processes() {
    need_write_protect!("nothing_stays_behind_in_the_processes");
    let mut t = Tracked::new(Kind::WriteProtect);
    t.tell("map a 100 rw");
    t.tell("fill a 0 100 1");
    let pid = t.workload.pid();
    let tracked = |pid| {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        smaps.lines().filter(|l| l.starts_with("VmFlags:") && l.contains(" uw")).count()
    };
    let fds = |pid| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = fds(pid);
    t.round();
    assert!(tracked(pid) > 0 && fds(pid) == before);
    drop(t.tracker);
    assert_eq!((tracked(pid), fds(pid)), (0, before));
    assert_eq!(t.workload.tell("fill a 0 100 2"), "ok");
}

#[test]
fn a_process_in_a_namespace_goes_by_its_number_there() {
    need_write_protect!("a_process_in_a_namespace_goes_by_its_number_there");
    let workload = Workload::start_by(&["unshare", "--pid", "--fork", "--kill-child"]);
    let inner = *workload.pids().iter().find(|p| **p != workload.pid()).unwrap();
    let mut tracker = Tracker::attach(Kind::WriteProtect, move || Ok(vec![inner])).unwrap();
    let round = tracker.round(false).unwrap();
    let spaces: Vec<_> = round.processes.iter().map(|c| (c.pid, c.space)).collect();
    assert_eq!(spaces, [(inner, 1)]);
}

#[test]
fn swapped_pages_are_listed() {
    need_write_protect!("swapped_pages_are_listed");
    if fs::read_to_string("/proc/swaps").is_ok_and(|s| s.lines().count() < 2) {
        println!("skipped: swapped_pages_are_listed: no swap");
        return;
    }
    // 21 is MADV_PAGEOUT.
    let mut t = Tracked::new(Kind::WriteProtect);
    let a = t.workload.address("map a 500 rw");
    t.tell("fill a 0 500 1");
    t.tell("advise a 100 400 21");
    let swap = Layout::read(t.workload.pid()).unwrap();
    let swap = swap.areas.iter().find(|x| x.range().contains(&a)).unwrap().swap;
    println!("{swap} bytes are swapped");
    t.round();
    t.tell("advise a 0 500 21");
    t.tell("fill a 200 210 2");
    let round = t.finish();
    let written = &Tracked::changes(&round, t.workload.pid()).written;
    let listed: Vec<_> = (0..500).filter(|p| touches(written, a + p * PAGE)).collect();
    assert_eq!(listed, (200..210).collect::<Vec<_>>());
}

/// Several seconds of everything at once, with a different number of rounds before every end.
#[test]
fn no_history_leads_store_and_memory_apart() {
    need_write_protect!("no_history_leads_store_and_memory_apart");
    let mut t = Tracked::new(Kind::WriteProtect);
    t.tell("stress 2");
    let begin = Instant::now();
    let mut ends = 0;
    while begin.elapsed() < Duration::from_secs(6) || ends < 4 {
        for _ in 0..ends % 4 {
            t.round();
        }
        // What happens between the last round and the end is the hardest part.
        std::thread::sleep(Duration::from_millis(ends * 7 % 20));
        t.finish();
        ends += 1;
    }
}
