//! Measurements; run by hand: `cargo test --release -p ferry-oci --lib measure -- --ignored --nocapture`.

use super::*;
use crate::pages::reader::read_pages;

/// Rounds over so many MB.
fn rounds_over(megabytes: u64) {
    let mut workload = Workload::start();
    let pages = megabytes * 256;
    workload.tell(&format!("map a {pages} rw"));
    workload.tell(&format!("fill a 0 {pages} 1"));
    let group = workload.pid();
    let mut tracker = Tracker::attach(Kind::WriteProtect, move || Ok(members(group))).unwrap();
    let first = tracker.round(false).unwrap();
    let mut took: Vec<_> = (0..9).map(|_| tracker.round(false).unwrap().took).collect();
    took.sort();
    println!("{megabytes} MB: first round {:?}, others {:?}", first.took, took[4]);
    let changes = &first.processes[0];
    for threads in [1, 2] {
        let begin = Instant::now();
        let done = read_pages(changes.pid, &changes.written, threads, |_, _| Ok(())).unwrap();
        let rate = done.bytes as f64 / begin.elapsed().as_secs_f64() / 1e9;
        println!("  read by {threads}: {:?}, {rate:.1} GB/s", begin.elapsed());
    }
    for dirty in [0, 1000, 20_000] {
        let mut check = Vec::new();
        let mut frozen = Vec::new();
        let mut read = Vec::new();
        let mut listed = 0;
        for turn in 0..9 {
            tracker.round(false).unwrap();
            let mut random = workload::Random(turn + 1);
            for _ in 0..dirty / 4 {
                let page = random.below(pages - 1);
                workload.send(&format!("fill a {page} {} 7", page + 1));
                workload.answer();
            }
            workload.stop();
            check.push(tracker.check_areas().unwrap().took);
            let round = tracker.round(true).unwrap();
            frozen.push(round.took);
            listed = round.pages;
            let begin = Instant::now();
            for changes in &round.processes {
                read_pages(changes.pid, &changes.written, 2, |_, _| Ok(())).unwrap();
            }
            read.push(begin.elapsed());
            workload.go_on();
        }
        for times in [&mut check, &mut frozen, &mut read] {
            times.sort();
        }
        let (check, frozen, read) = (check[4], frozen[4], read[4]);
        println!("  {listed} dirty: areas {check:?}, frozen round {frozen:?}, read {read:?}");
    }
    let begin = Instant::now();
    drop(tracker);
    println!("  taking it back {:?}", begin.elapsed());
}

#[test]
#[ignore = "a measurement"]
fn measure_rounds_over_400_mb() {
    rounds_over(400);
}

#[test]
#[ignore = "a measurement, needs 4 GB"]
fn measure_rounds_over_4_gb() {
    rounds_over(4096);
}

/// What a writer loses while it is tracked, with a round every so often.
#[test]
#[ignore = "a measurement"]
fn measure_the_writer() {
    let mut workload = Workload::start();
    workload.tell("map a 102400 rw");
    workload.tell("fill a 0 102400 1");
    let time = |workload: &mut Workload| {
        let begin = Instant::now();
        for _ in 0..5 {
            workload.tell("fill a 0 102400 2");
        }
        begin.elapsed() / 5
    };
    let alone = time(&mut workload);
    let group = workload.pid();
    let mut tracker = Tracker::attach(Kind::WriteProtect, move || Ok(members(group))).unwrap();
    let mut tracked = Duration::ZERO;
    for _ in 0..5 {
        tracker.round(false).unwrap();
        let begin = Instant::now();
        workload.tell("fill a 0 102400 3");
        tracked += begin.elapsed() / 5;
    }
    let again = time(&mut workload);
    println!(
        "every page of 400 MB once: alone {alone:?}, after a round {tracked:?}, later {again:?}"
    );
}

/// What threads lose that map and move memory all the time, with a round every 100 ms that stops them.
#[test]
#[ignore = "a measurement"]
fn measure_those_who_move_memory() {
    let mut workload = Workload::start();
    workload.tell("remap 2");
    let moved = |workload: &mut Workload| -> u64 {
        let told = workload.tell("remapped");
        told.split(' ').next().unwrap().parse().unwrap()
    };
    let (mut alone, mut tracked, mut stops) = (0, 0, Stops::default());
    for _ in 0..4 {
        let before = moved(&mut workload);
        std::thread::sleep(Duration::from_secs(2));
        alone += moved(&mut workload) - before;

        let group = workload.pid();
        let mut tracker = Tracker::attach(Kind::WriteProtect, move || Ok(members(group))).unwrap();
        let (before, begin) = (moved(&mut workload), Instant::now());
        while begin.elapsed() < Duration::from_secs(2) {
            let round = tracker.round(false).unwrap();
            stops.count += round.stops.count;
            stops.time += round.stops.time;
            std::thread::sleep(Duration::from_millis(100));
        }
        tracked += moved(&mut workload) - before;
    }
    let each = stops.time / stops.count;
    println!("calls in 8 s: alone {alone}, tracked {tracked}; {} stops of {each:?}", stops.count);
}
