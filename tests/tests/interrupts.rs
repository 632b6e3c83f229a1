//! Ctrl-C and SIGTERM: before the commit everything is undone at once, after it the command says
//! what to do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_tests::Host;
use ferry_tests::faults::Bed;

/// How long an interrupted migration may take to undo itself on both hosts.
const UNDONE: Duration = Duration::from_secs(15);

/// What a terminal does at Ctrl-C: the signal goes to the whole process group in front, so to what
/// the command has started as well, unless it was put into another.
const CTRL_C: &str = r#"
    group() { ps -o pgid= -p "$1"; }
    ferry=$(pgrep -f '^ferry migrate') || exit
    front=$(group $ferry)
    for pid in $ferry $(pgrep -P $ferry); do
        [ "$(group $pid)" != "$front" ] || kill -INT $pid
    done
"#;

fn press_ctrl_c(host: &Host) -> Result<()> {
    host.run(CTRL_C).map(drop)
}

fn terminate(host: &Host) -> Result<()> {
    host.run("pkill -TERM -f '^ferry migrate'").map(drop)
}

type Signal = fn(&Host) -> Result<()>;

#[test]
fn an_interrupted_migration_is_undone_at_once() -> Result<()> {
    let mut bed = Bed::start()?;
    let points = Phase::ALL.into_iter().filter(|phase| *phase <= Phase::Commit).map(Phase::name);
    for (n, point) in points.chain(["announced"]).enumerate() {
        let signals: [(&str, Signal); 2] = [("SIGINT", press_ctrl_c), ("SIGTERM", terminate)];
        let (name, send) = signals[n % 2];
        let when = format!("{name} at {point}");
        let job = bed.stop_at(point, "")?;
        send(bed.source())?;
        let start = Instant::now();
        // The fault point stays: it must not have to be left first.
        let output = job.wait(UNDONE * 4).with_context(|| when.clone())?;
        ensure!(start.elapsed() < UNDONE, "{when}: {:?}, {output}", start.elapsed());
        ensure!(!output.status.success(), "{when}: {output}");
        let phase = if point == "announced" { "freeze" } else { point };
        let cause = format!("{phase}: interrupted by {name}");
        let early = ["connect", "plan"].contains(&point);
        let state = if early { "nothing has changed" } else { "redis runs on a, its connections" };
        for text in [cause.as_str(), state] {
            ensure!(output.stderr.contains(text), "{when}: no {text:?} in {output}");
        }
        ensure!(!output.stderr.contains("leftovers"), "{when}: {output}");
        bed.is_whole(&when)?;
    }
    bed.end_client().map(drop)
}

#[test]
fn a_pre_copy_that_is_interrupted_leaves_the_container_alone() -> Result<()> {
    let mut bed = Bed::start()?;
    for send in [press_ctrl_c, terminate] {
        let job = bed.copy_slowly()?;
        send(bed.source())?;
        let start = Instant::now();
        let output = job.wait(UNDONE * 4)?;
        ensure!(start.elapsed() < UNDONE, "{:?}, {output}", start.elapsed());
        ensure!(output.stderr.contains("precopy: interrupted"), "{output}");
        bed.is_whole("pre-copy interrupted")?;
    }
    bed.end_client().map(drop)
}

#[test]
fn after_the_commit_an_interrupted_migration_is_finished_or_says_how_to() -> Result<()> {
    let mut bed = Bed::start()?;
    for phase in [Phase::Release, Phase::Retire, Phase::Finish] {
        // Once: it is finished.
        let when = format!("one signal at {}", phase.name());
        let mut job = bed.stop_at(phase.name(), "")?;
        press_ctrl_c(bed.source())?;
        let says = "again to leave at once, and then run the same command again";
        job.wait_for(says, Duration::from_secs(10)).with_context(|| when.clone())?;
        let output = bed.go_on(job)?.checked(&when)?;
        ensure!(output.stdout.contains("redis runs on"), "{when}: {output}");
        bed.has_moved();
        bed.is_whole(&when)?;

        // Twice: it is left as it is, and settled by the same command.
        let when = format!("two signals at {}", phase.name());
        let mut job = bed.stop_at(phase.name(), "")?;
        terminate(bed.source())?;
        job.wait_for(says, Duration::from_secs(10)).with_context(|| when.clone())?;
        terminate(bed.source())?;
        let output = job.wait(UNDONE)?;
        ensure!(!output.status.success(), "{when}: {output}");
        ensure!(output.stderr.contains("run the same command again to settle it"), "{output}");
        let again = bed.again()?;
        // Released there, or never.
        let moved = phase > Phase::Release;
        ensure!(again.status.success() == moved, "{when}: {again}");
        if moved {
            bed.has_moved();
        }
        bed.is_whole(&when)?;
    }
    bed.end_client().map(drop)
}
