//! Workers and keepers that are killed.

use super::*;

/// Runs a task of which the worker is killed `times` times at `point`, after `after` passes.
fn killed_at(point: Point, after: u64, times: u64, fill: bool, script: &str) {
    let mut rig = Rig::ready(&[3]);
    rig.client.fault_point(point, after, times).expect("fault point");
    if fill {
        rig.client.fill().expect("fill");
    } else {
        rig.client.hold_fill().expect("hold");
    }
    let mut task = rig.task(3, &format!("{script};say done;wait"));
    task.hear("done");
    match rig.client.status() {
        Ok(status) => assert!(status.restarts > 0, "{point:?}: it must be killed: {status:?}"),
        // It ends by itself once it has filled everything.
        Err(err) => assert!(fill, "{point:?}: {err}"),
    }
    task.go();
    task.right();
    rig.client.fill().ok();
    rig.end();
}

const SCRIPT: &str = "marker;read 0 50;fork-write 20 100;remap 100 300 1700;remove 500 40;unmap 600 77;write 800 3;\
                      fork-remove 700 60;remap 1800 50 100;remove 1750 10;unmap 700 4;fork-check;remap 1000 200 600;\
                      fork-fork 30 40;check;join";

#[test]
fn a_worker_killed_after_it_read_a_fault_loses_nothing() {
    for after in [0, 1, 30] {
        killed_at(Point::ReadFault, after, 3, false, SCRIPT);
    }
}

#[test]
fn a_worker_killed_after_it_read_a_fork_loses_nothing() {
    for after in [0, 1, 2] {
        killed_at(Point::ReadFork, after, 1, false, SCRIPT);
    }
}

#[test]
fn a_worker_killed_after_it_read_a_move_loses_nothing() {
    for after in [0, 1, 2] {
        killed_at(Point::ReadRemap, after, 1, false, SCRIPT);
    }
}

#[test]
fn a_worker_killed_after_it_read_a_drop_loses_nothing() {
    for after in [0, 1] {
        killed_at(Point::ReadRemove, after, 2, false, SCRIPT);
    }
}

#[test]
fn a_worker_killed_after_it_read_an_unmapping_loses_nothing() {
    for after in [0, 1, 3] {
        killed_at(Point::ReadUnmap, after, 1, false, SCRIPT);
    }
}

#[test]
fn a_worker_killed_between_making_a_child_known_and_saying_so_loses_nothing() {
    for after in [0, 1] {
        killed_at(Point::ForkPublished, after, 2, false, SCRIPT);
    }
}

#[test]
fn a_worker_killed_while_it_replays_loses_nothing() {
    // The first kill is at a read; from then on in replays.
    let mut rig = Rig::ready(&[3]);
    rig.client.hold_fill().expect("hold");
    let mut task = rig.task(
        3,
        &format!("marker;remove 5 1;fork-later 400;remap 20 9 2000;say mid;wait;{SCRIPT}")
            .replacen(";marker", "", 1)
            .replace("wait;marker", "wait"),
    );
    task.hear("mid");
    rig.client.fault_point(Point::Replayed, 2, 4).expect("fault point");
    rig.kill_worker();
    task.go();
    task.right();
    rig.client.fill().ok();
    let status = rig.client.status();
    if let Ok(status) = status {
        assert!(status.restarts > 2, "{status:?}");
    }
    rig.end();
}

#[test]
fn a_worker_killed_between_filling_and_marking_loses_nothing() {
    for after in [0, 3, 20] {
        killed_at(Point::Copied, after, 3, true, SCRIPT);
        killed_at(Point::Copied, after, 3, false, SCRIPT);
    }
}

#[test]
fn a_worker_killed_around_giving_memory_back_loses_nothing() {
    for point in [Point::Marked, Point::Freed, Point::Closing] {
        killed_at(point, 0, 2, true, &format!("{SCRIPT};sleep 200"));
    }
}

#[test]
fn a_log_that_is_full_is_rewritten_and_a_kill_in_that_loses_nothing() {
    let script = "marker;bounce 700;fork-check;bounce 300;random 4 300;check;join";
    killed_at(Point::Compacted, 0, 2, false, script);
    killed_at(Point::Compacted, 1, 1, false, "marker;random-forks 8 600;check;join");
}

#[test]
fn a_worker_killed_again_and_again_loses_nothing() {
    for seed in 0..3 {
        let mut rig = Rig::ready(&[3]);
        let script = format!(
            "marker;random-forks {} 600;check;sleep 50;check;join;say done;wait",
            40 + seed
        );
        let mut task = rig.task(3, &script);
        if seed == 1 {
            rig.client.fill().expect("fill");
        }
        // One kill after the other; not for ever, as the keeper takes its time after many.
        let mut wait = 700;
        for _ in 0..60 {
            rig.kill_worker();
            std::thread::sleep(Duration::from_micros(wait));
            wait = (wait * 7 + 13) % 9000;
        }
        task.hear("done");
        task.go();
        task.right();
        rig.client.fill().ok();
        rig.end();
    }
}

#[test]
fn when_the_keeper_dies_the_worker_serves_on_and_clears_up() {
    let mut rig = Rig::ready(&[3]);
    rig.client.hold_fill().expect("hold");
    let mut task = rig.task(3, "marker;read 0 20;say served;wait;fork-write 20 100;remap 100 300 1700;check;join;say still;wait");
    task.hear("served");
    let worker = rig.status().worker.expect("worker");
    rig.keeper.kill().expect("kill");
    rig.keeper.wait().expect("wait");
    task.go();
    task.hear("still");
    assert!(rig.client.status().is_err(), "who asks must not wait for ever");
    task.go();
    task.right();
    // Filling begins by itself in the end, and finds the task gone.
    let start = Instant::now();
    let folder = |worker: u32| std::path::PathBuf::from(format!("/proc/{worker}/fd"));
    while rig.dir.exists() || std::fs::read_dir(folder(worker)).is_ok() {
        assert!(start.elapsed() < PATIENCE, "worker {worker} and folder must go");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn when_the_keeper_dies_before_the_restore_is_over_the_restore_goes_on_with_the_worker() {
    let mut rig = Rig::ready(&[3]);
    let mut task = rig.task(3, "read 0 20;say there;wait;marker;check;say checked;wait");
    task.hear("there");
    rig.keeper.kill().expect("kill");
    rig.keeper.wait().expect("wait");
    task.go();
    task.hear("checked");
    let start = Instant::now();
    while rig.dir.exists() {
        assert!(start.elapsed() < PATIENCE, "all is in: the folder must go");
        std::thread::sleep(Duration::from_millis(10));
    }
    task.go();
    task.right();
}

#[test]
fn when_the_keeper_dies_before_there_is_a_restore_nothing_stays() {
    let mut rig = Rig::ready(&[3]);
    let worker = rig.status().worker.expect("worker");
    rig.keeper.kill().expect("kill");
    rig.keeper.wait().expect("wait");
    let start = Instant::now();
    let is_there =
        || std::fs::read_dir(format!("/proc/{worker}/fd")).is_ok_and(|fds| fds.count() > 0);
    while rig.dir.exists() || is_there() {
        assert!(start.elapsed() < PATIENCE, "worker {worker} and folder must go");
        std::thread::sleep(Duration::from_millis(10));
    }
}
