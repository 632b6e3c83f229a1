//! The link between the hosts cut instead of a process killed: nobody is told, and no signal comes.
//! The hold ends by itself, with the container running on its source.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_tests::faults::Bed;
use ferry_tests::scene::{go_on, task_state};

/// ssh notices within 15 s, the destination's host within 20; then each undoes its part.
const NOTICED: Duration = Duration::from_secs(45);

/// Takes the destination's plug out.
fn cut(bed: &Bed) -> Result<()> {
    bed.destination().run("ip link set eth0 down").map(drop)
}

fn mend(bed: &Bed) -> Result<()> {
    bed.destination().run("ip link set eth0 up").map(drop)
}

#[test]
fn a_cut_link_before_the_commit_ends_both_holds_by_themselves() -> Result<()> {
    let mut bed = Bed::start()?;
    for point in [Phase::Freeze.name(), "announced", Phase::Dump.name(), Phase::Commit.name()] {
        let job = bed.stop_at(point, "").with_context(|| point.to_owned())?;
        cut(&bed)?;
        go_on(bed.source())?;
        let start = Instant::now();
        // The source first, which needs nobody for it. The clients are led back to it.
        let committed = point == Phase::Commit.name();
        if !committed {
            bed.source().wait_until("it runs on its source", |h| {
                h.output("timeout 1 redis-cli ping").is_ok_and(|o| o.stdout.contains("PONG"))
            })?;
            ensure!(start.elapsed() < NOTICED, "{point}: frozen for {:?}", start.elapsed());
        }
        // The destination by itself too, still without a link.
        bed.destination().wait_until("nothing is left there", |h| {
            task_state(h, "redis").is_ok_and(|state| state.is_none())
        })?;
        ensure!(start.elapsed() < NOTICED, "{point}: held for {:?}", start.elapsed());
        let output = job.wait(NOTICED * 4).with_context(|| point.to_owned())?;
        ensure!(!output.status.success(), "{point}: {output}");
        mend(&bed)?;
        if committed {
            // It was recorded here before anybody knew. Nobody runs it until that is settled.
            let says = "run the same command again to settle it";
            ensure!(output.stderr.contains(says), "{point}: {output}");
            let again = bed.again()?;
            ensure!(!again.status.success(), "{point}: {again}");
        }
        bed.is_whole(point)?;
    }
    bed.end_client().map(drop)
}

#[test]
fn a_cut_link_while_memory_is_copied_leaves_the_container_alone() -> Result<()> {
    let mut bed = Bed::start()?;
    let job = bed.copy_slowly()?;
    cut(&bed)?;
    let output = job.wait(NOTICED * 4)?;
    ensure!(!output.status.success(), "{output}");
    ensure!(output.stderr.contains("redis runs on a, its connections alive"), "{output}");
    bed.destination().wait_until("nothing is left there", |h| {
        task_state(h, "redis").is_ok_and(|state| state.is_none())
    })?;
    mend(&bed)?;
    bed.is_whole("cut in the pre-copy")?;
    bed.end_client().map(drop)
}

#[test]
fn a_driver_that_stands_still_holds_nothing_longer_than_its_limit() -> Result<()> {
    let mut bed = Bed::start()?;
    for point in [Phase::Freeze, Phase::Restore] {
        let more = format!("--ip {}/24", ferry_tests::scene::FLOATING);
        let command = ferry_tests::scene::migrate_command("redis", bed.destination(), &more);
        let fault = format!("FERRY_LIMIT_S=8 FERRY_FAULT={}:/tmp/fault", point.name());
        bed.source().run("rm -f /tmp/fault")?;
        let job = bed.source().spawn(&format!("{fault} exec {command}"))?;
        bed.source().wait_until("it stands", |h| {
            h.output("test -e /tmp/fault").is_ok_and(|o| o.status.success())
        })?;
        // Neither dead nor alive: its connections stay.
        bed.source().run("pkill -STOP -f '^ferry migrate'")?;
        let start = Instant::now();
        bed.source().wait_until("the hold has ended", |h| {
            h.output("timeout 1 redis-cli ping; pgrep -x criu")
                .is_ok_and(|o| o.stdout.trim() == "PONG")
        })?;
        ensure!(start.elapsed() < Duration::from_secs(20), "{point:?}: {:?}", start.elapsed());
        // Back again, it finds out.
        bed.source().run("pkill -CONT -f '^ferry migrate'")?;
        let output = bed.go_on(job)?;
        ensure!(!output.status.success(), "{point:?}: {output}");
        ensure!(output.stderr.contains("redis runs on a, its connections alive"), "{output}");
        bed.is_whole(point.name())?;
    }
    bed.end_client().map(drop)
}
