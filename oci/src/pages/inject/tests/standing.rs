//! Whether all stand still, and go on after it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::freezer::Freezer;

/// The first word of an area of another process.
struct Count(File, u64);

impl Count {
    fn of(workload: &Workload, at: u64) -> Self {
        Self(File::open(format!("/proc/{}/mem", workload.pid())).unwrap(), at)
    }

    fn get(&self) -> u64 {
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, self.1).unwrap();
        u64::from_ne_bytes(word)
    }

    /// Waits until it has changed.
    fn goes_on(&self) {
        let (before, begin) = (self.get(), Instant::now());
        while self.get() == before {
            assert!(begin.elapsed() < Duration::from_secs(10), "nobody counts");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Everything that counts stands still in the work, again and again.
fn stands(commands: &[&str]) {
    let mut workload = Workload::start();
    let at = workload.address("map a 1 rw");
    workload.tell("fill a 0 1 0");
    let count = Count::of(&workload, at);
    for command in commands {
        assert_eq!(workload.tell(command), "ok");
    }
    let pid = workload.pid();
    for _ in 0..50 {
        count.goes_on();
        let mut stops = 0;
        let standing = while_standing(
            pid,
            &[],
            |_| stops += 1,
            || {
                let before = count.get();
                thread::sleep(Duration::from_micros(500));
                (before, count.get())
            },
        );
        let (before, after) = standing.unwrap();
        assert_eq!(before, after, "{commands:?}");
        assert!(stops > 0);
    }
    count.goes_on();
    let tracers = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().map(|task| {
        Status::read(task.file_name().to_str().unwrap().parse().unwrap()).map_or(0, |s| s.tracer)
    });
    assert!(tracers.into_iter().all(|tracer| tracer == 0));
    assert_eq!(workload.tell("map b 1 rw").len(), 12);
}

#[test]
fn all_threads_stand_still_and_go_on() {
    stands(&["counters a 3", "sleepers 5"]);
}

#[test]
fn threads_that_are_just_made_stand_still_too() {
    stands(&["relays a 4"]);
}

#[test]
fn a_child_in_vfork_stands_still_with_its_parent() {
    stands(&["vforker a"]);
}

#[test]
fn no_signal_is_lost_by_standing_still() {
    loses_no_signal(|pid| while_standing(pid, &[], |_| {}, || ()).unwrap());
}

#[test]
fn who_is_stopped_stays_stopped_and_who_has_ended_is_gone() {
    let mut workload = Workload::start();
    let pid = workload.pid();
    workload.stop();
    while_standing(pid, &[], |_| {}, || ()).unwrap();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(Status::read(pid).unwrap().state, 'T');
    workload.go_on();
    assert_eq!(workload.tell("map a 1 rw").len(), 12);
    drop(workload);
    let error = while_standing(pid, &[], |_| {}, || ()).unwrap_err();
    assert!(matches!(error, InjectError::Gone(_)), "{error}");
}

#[test]
fn one_that_is_traced_is_refused_with_the_tracer_and_the_others_go_on() {
    let mut workload = Workload::start();
    let at = workload.address("map a 1 rw");
    workload.tell("fill a 0 1 0");
    workload.tell("counters a 2");
    let pid = workload.pid();
    let Ok(Seized { tracee, .. }) = Tracee::seize(pid) else {
        panic!("not seized");
    };
    let error = while_standing(pid, &[], |_| {}, || ()).unwrap_err();
    assert!(matches!(error, InjectError::Traced { by, .. } if by != 0), "{error}");
    Count::of(&workload, at).goes_on();
    tracee.stop(STOP).unwrap();
    assert!(tracee.release(RESTORE));
}

/// How long it takes by ptrace(2) and by the freezer. Prints it. Run by hand:
/// `cargo test --release -p ferry-oci --lib measure_standing -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn measure_standing_still() {
    for (busy, asleep) in [(0, 0), (2, 0), (0, 16), (0, 64), (2, 64), (0, 256)] {
        let mut workload = Workload::start();
        workload.tell("map a 1 rw");
        workload.tell("fill a 0 1 0");
        workload.tell(&format!("counters a {busy}"));
        workload.tell(&format!("sleepers {asleep}"));
        let pid = workload.pid();
        let cgroup = Cgroup::new("freezer").or_else(|| Cgroup::new(".")).unwrap();
        cgroup.write("cgroup.procs", &pid.to_string());
        let freezer = Freezer::of(pid.unsigned_abs()).unwrap();
        let (mut traced, mut frozen) = (Vec::new(), Vec::new());
        for _ in 0..201 {
            while_standing(pid, &[], |took| traced.push(took), || ()).unwrap();
            thread::sleep(Duration::from_millis(2));
            let begin = Instant::now();
            freezer.freeze(Duration::from_secs(5)).unwrap();
            freezer.thaw(Duration::from_secs(5)).unwrap();
            frozen.push(begin.elapsed());
            thread::sleep(Duration::from_millis(2));
        }
        for (name, mut times) in [("ptrace", traced), ("freezer", frozen)] {
            times.sort();
            println!(
                "{busy} busy, {asleep} asleep, {name}: median {:?}, 90 % {:?}, max {:?}",
                times[times.len() / 2],
                times[times.len() * 9 / 10],
                times[times.len() - 1]
            );
        }
        drop(workload);
    }
}
