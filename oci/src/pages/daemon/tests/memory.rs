//! What tasks find in their memory.

use super::*;

#[test]
fn every_byte_is_right_by_faults_alone() {
    let status = Rig::restored(&[7], false, "marker;check").expect("status");
    // The last page may not have been counted yet.
    let zeros = task::PAGES.div_ceil(5) as u64;
    let pages = task::PAGES as u64 - zeros;
    assert!((zeros - 1..=zeros).contains(&status.zero_pages), "{status:?}");
    assert!((pages - 16..=pages).contains(&status.fault_pages), "{status:?}");
    // Each brings those behind it, up to the next page of zeros.
    let faults = 2 * zeros;
    assert!((faults - 2..=faults + zeros / 4).contains(&status.faults), "{status:?}");
    assert_eq!((status.filled, status.pages_left, status.restarts), (0, 0, 0));
}

#[test]
fn zeros_come_with_those_behind_them() {
    let status = Rig::restored(&[7], false, "marker;remove 0 1000;check").expect("status");
    // What is left has a page of zeros for four others, one fault each.
    let others = (task::PAGES as u64 - 1000).div_ceil(5) * 2;
    let faults = 1000_u64.div_ceil(16) + others;
    assert!((faults - 4..=faults + faults / 4).contains(&status.faults), "{status:?}");
    assert!(status.zero_pages >= 1000, "{status:?}");
}

#[test]
fn every_byte_is_right_by_filling() {
    let mut rig = Rig::ready(&[7]);
    rig.client.fill().expect("fill");
    let mut task = rig.task(7, "zombie;marker;say over;wait;check");
    task.hear("over");
    rig.end();
    task.go();
    task.right();
}

#[test]
fn filling_begins_by_itself_when_nobody_says_anything() {
    let mut rig = Rig::ready(&[7]);
    let mut task = rig.task(7, "marker;say over;wait;check");
    task.hear("over");
    rig.end();
    task.go();
    task.right();
}

#[test]
fn memory_that_was_moved_dropped_or_unmapped_before_it_came_is_as_the_task_left_it() {
    for fill in [false, true] {
        let script = "marker;remap 100 300 1700;remove 500 40;unmap 600 77;write 800 3;remap 1800 50 100;\
                      remove 1750 10;read 1690 100;remap 1000 200 600;check;random 5 400;check";
        Rig::restored(&[3], fill, script);
    }
}

#[test]
fn a_fork_before_the_pages_came_leaves_both_sides_with_theirs() {
    for fill in [false, true] {
        let script = "marker;read 0 64;fork-write 20 100;write 10 30;remove 200 30;fork-remove 190 60;\
                      remap 300 20 2000;fork-fork 2000 10;fork-check;check;join;fork-later 300;remove 0 1536;\
                      check;join";
        let status = Rig::restored(&[3], fill, script);
        assert!(fill || status.as_ref().is_some_and(|status| status.forks >= 4), "{status:?}");
    }
}

#[test]
fn whatever_tasks_do_at_random_their_memory_is_right() {
    for seed in 0..6 {
        let script = format!("marker;random-forks {seed} 400;check;join");
        Rig::restored(&[3], seed % 2 == 0, &script);
    }
}

#[test]
fn pages_on_disk_are_served_as_those_in_memory() {
    let limits =
        Limits { memory: 500 * PAGE, disk: 1 << 30, max_pages: 1 << 20, ..Limits::default() };
    let mut rig = Rig::with(&limits);
    rig.get_ready(&[9]);
    assert!(rig.status().spilled > 500, "{:?}", rig.status());
    let mut task = rig.task(9, "marker;read 0 100;random 3 200;check");
    task.right();
    rig.end();
}

#[test]
fn a_restore_of_several_tasks_serves_each_its_own() {
    let mut rig = Rig::ready(&[1, 2, 3]);
    let socket = UnixStream::connect(&rig.socket).expect("connect");
    let mut tasks = Vec::new();
    for space in [1, 2, 3] {
        let script = "say sent;wait;read 0 30;fork-write 3 20;remap 100 300 1700;check;join";
        let mut task = rig.task_over(Some(&socket), space, script);
        task.hear("sent");
        tasks.push(task);
    }
    (&socket).write_all(&0x5253_5446u32.to_le_bytes()).expect("the end of the restore");
    rig.wait_for("three tasks", |status| status.tasks == 3);
    rig.client.fill().expect("fill");
    tasks.iter_mut().for_each(Restored::go);
    tasks.iter_mut().for_each(Restored::right);
    drop(socket);
    rig.end();
}

#[test]
fn nothing_is_served_before_the_memory_is_complete() {
    let mut rig = Rig::new();
    let mut store = rig.open();
    rig.write(&mut store, &[5]);
    rig.client.listen(&rig.socket).expect("listen");
    rig.client.fill().expect("fill");
    let mut task = rig.task(5, "say reading;check;marker");
    task.hear("reading");
    rig.wait_for("the descriptor", |status| status.tasks == 1);
    std::thread::sleep(Duration::from_millis(150));
    let status = rig.status();
    assert_eq!((status.faults, status.filled), (0, 0), "{status:?}");
    // What is written last counts.
    let page: Vec<u8> = task::content(5, 1)
        .map(|f| (0..512).flat_map(|w| (f + w).to_le_bytes()).collect())
        .expect("page");
    store.write(5, task::BASE + PAGE, &vec![1; PAGE as usize]).expect("write");
    store.write(5, task::BASE + PAGE, &page).expect("write");
    store.complete().expect("complete");
    assert!(store.write(5, 0, &page).is_err(), "complete is complete");
    task.right();
    rig.end();
}

#[test]
fn hot_pages_come_first() {
    let rig = Rig::new();
    let mut store = rig.open();
    rig.write(&mut store, &[5]);
    store.mark_hot(5, task::BASE + 1400 * PAGE, task::BASE + 1420 * PAGE).expect("hot");
    rig.client.listen(&rig.socket).expect("listen");
    store.complete().expect("complete");
    rig.client.fault_point(Point::Copied, 1, 1).expect("fault point");
    rig.client.fill().expect("fill");
    let mut task = rig.task(5, "say there;wait;marker;check");
    task.hear("there");
    // The worker is killed after its second step, and another one does the rest: what was filled by then
    // are the hot pages, 4 of 5 of them with content.
    rig.wait_for("the kill", |status| status.restarts == 1);
    let before = rig.wait_for("the rest", |status| status.pages_left == 0);
    assert!(before.filled < task::PAGES as u64, "{before:?}");
    task.go();
    task.right();
}

#[test]
fn hot_pages_are_there_before_the_restore_is_over() {
    let mut rig = Rig::new();
    let mut store = rig.open();
    rig.write(&mut store, &[5]);
    store.mark_hot(5, task::BASE + 1400 * PAGE, task::BASE + 1420 * PAGE).expect("hot");
    rig.client.listen(&rig.socket).expect("listen");
    store.complete().expect("complete");
    let mut task = rig.task(5, "say there;wait;marker;check");
    task.hear("there");
    // 4 of 5 have content.
    let before = rig.wait_for("the hot pages", |status| status.filled >= 16);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((rig.status().filled, before.faults), (16, 0));
    task.go();
    rig.client.fill().expect("fill");
    task.right();
    rig.end();
}

#[test]
fn a_child_finds_zeros_where_its_parent_wants_memory_wiped() {
    for kill in [false, true] {
        let mut rig = Rig::new();
        let mut store = rig.open();
        rig.write(&mut store, &[5]);
        let at = |page| task::BASE + page * PAGE;
        store.mark_wiped_on_fork(5, at(500), at(700)).expect("mark");
        rig.client.listen(&rig.socket).expect("listen");
        store.complete().expect("complete");
        rig.client.hold_fill().expect("hold");
        if kill {
            rig.client.fault_point(Point::ReadFork, 0, 1).expect("fault point");
        }
        let mut task = rig.task(5, "marker;read 550 10;wipe 500 200;join;check;say done;wait");
        task.hear("done");
        assert_eq!(rig.status().restarts, u64::from(kill));
        task.go();
        task.right();
        rig.client.fill().ok();
        rig.end();
    }
}
