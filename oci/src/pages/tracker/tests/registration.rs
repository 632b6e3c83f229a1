//! What tracking must not do to the processes, and what it must see again after it was lost.

use super::*;

/// Calls that have moved memory, and those of them that were refused, with the last error number.
fn remapped(t: &mut Tracked) -> [u64; 3] {
    let told = t.tell("remapped");
    let numbers: Vec<u64> = told.split(' ').map(|n| n.parse().unwrap()).collect();
    numbers.try_into().unwrap()
}

/// Threads that move memory all the time, while rounds come one after the other.
#[test]
fn no_memory_is_refused_to_be_moved_while_it_is_tracked() {
    need_write_protect!("no_memory_is_refused_to_be_moved_while_it_is_tracked");
    let mut t = Tracked::new(Kind::WriteProtect);
    t.tell("remap 4");
    let begin = Instant::now();
    let (mut rounds, mut stops) = (0, Stops::default());
    let [moved, refused, why] = loop {
        let round = t.round();
        rounds += 1;
        stops.count += round.stops.count;
        stops.time += round.stops.time;
        if rounds % 100 == 0 {
            t.finish();
        }
        let told = remapped(&mut t);
        if begin.elapsed() > Duration::from_secs(5) && told[0] > 20_000 && rounds >= 100 {
            break told;
        }
    };
    println!("{moved} calls, {refused} refused, {rounds} rounds, {stops:?}");
    let why = std::io::Error::from_raw_os_error(why as i32);
    assert_eq!(refused, 0, "of {moved} calls: {why}");
}

/// Whether writes to the area at `at` are noted by the kernel.
fn is_registered(pid: i32, at: u64) -> bool {
    crate::pages::scan::Pagemap::open(pid).unwrap().is_registered(at).unwrap()
}

/// The kernel joins an area without pages to the neighbour that it is moved to, and ends the
/// registration of both. The marks stay on the pages: what is written then must be seen, and what is
/// written to the same pages after that as well.
#[test]
fn writes_to_an_area_that_lost_its_registration_are_seen() {
    need_write_protect!("writes_to_an_area_that_lost_its_registration_are_seen");
    let mut t = Tracked::new(Kind::WriteProtect);
    let pid = t.workload.pid();
    t.tell("map room 100 none");
    let a = t.workload.address("place a room 20 20");
    t.tell("fill a 0 20 1");
    t.tell("place b room 60 10");
    t.round();
    t.round();
    assert!(is_registered(pid, a));
    assert!(!t.tell("put b room 40").contains(' '));
    if is_registered(pid, a) {
        println!(
            "skipped: writes_to_an_area_that_lost_its_registration_are_seen: this kernel keeps it"
        );
        return;
    }
    t.tell("fill a 3 5 2");
    t.round();
    assert!(is_registered(pid, a));
    t.tell("fill a 3 4 3");
    t.finish();
    t.tell("fill a 4 5 3");
    t.round();
    t.tell("fill a 3 5 4");
    t.finish();
}

#[test]
fn nobody_is_stopped_when_nothing_is_new() {
    need_write_protect!("nobody_is_stopped_when_nothing_is_new");
    let mut t = Tracked::new(Kind::WriteProtect);
    t.tell("map a 100 rw");
    // Of a kind that cannot be registered, as the kernel says each time it is asked.
    t.tell("map b 9 rw droppable");
    t.tell("fill a 0 100 1");
    let first = t.round();
    assert!(first.stops.count >= 2 && first.stops.time > Duration::ZERO, "{:?}", first.stops);
    t.tell("fill a 0 100 2");
    assert_eq!(t.round().stops, Stops::default());
    t.tell("map gap 1 none");
    t.tell("map c 100 rw");
    t.tell("fill c 0 100 3");
    assert!(t.round().stops.count >= 1);
    assert_eq!(t.round().stops, Stops::default());
    assert_eq!(t.finish().stops, Stops::default());
}
