//! What waits for the freeze and in it, killed or failing: the container goes on, its client
//! unharmed, and nothing is left behind.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_tests::faults::{Bed, is_served, kill_ferry};
use ferry_tests::scene::task_state;

/// How long clients may wait after a fault, with what waits in TCP's own timers.
const SOON: Duration = Duration::from_secs(10);

/// On which host something is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Source,
    Destination,
}

/// Kills processes on a host as `pkill` finds them by `what`, at fault point `point`, and lets the
/// migration go on. It may succeed or fail; there must be one container, and it must say where.
fn killed(bed: &mut Bed, point: &str, on: On, what: &str) -> Result<()> {
    let when = format!("{what} killed on the {on:?} at {point}");
    let job = bed.stop_at(point, "").with_context(|| when.clone())?;
    let host = if on == On::Source { bed.source() } else { bed.destination() };
    host.run(&format!("pkill -9 {what}")).with_context(|| format!("{when}: there is none"))?;
    let start = Instant::now();
    let output = bed.go_on(job).with_context(|| when.clone())?;
    println!("{when}: {:?}, {output}", start.elapsed());
    if output.status.success() {
        bed.has_moved();
    } else {
        let told = format!("redis runs on {}, its connections alive", bed.here);
        ensure!(output.stderr.contains(&told), "{when}: no {told:?} in {output}");
    }
    ensure!(task_state(bed.destination(), "redis")?.is_none(), "{when}: two of them; {output}");
    bed.is_whole(&when)?;
    let seen = bed.end_client().with_context(|| when.clone())?;
    let gap = seen["longest_gap_ms"].as_f64().unwrap_or(f64::MAX);
    ensure!(gap < SOON.as_secs_f64() * 1000.0, "{when}: the client waited {gap} ms");
    bed.new_client()
}

#[test]
fn runc_or_criu_killed_in_the_dump_leaves_the_container_as_it_was() -> Result<()> {
    let mut bed = Bed::start()?;
    // Held before the freeze, in it, and at its end; and when it is decided already.
    let phases = [Phase::Freeze, Phase::Dump, Phase::Transfer, Phase::Commit, Phase::Release];
    for point in phases.map(Phase::name).into_iter().chain(["announced"]) {
        for what in ["-x criu", "-x runc"] {
            killed(&mut bed, point, On::Source, what)?;
        }
    }
    bed.end_client().map(drop)
}

#[test]
fn runc_or_criu_killed_in_the_restore_leaves_the_container_where_it_was() -> Result<()> {
    let mut bed = Bed::start()?;
    // Held before its images, with them, and with all of the container in place.
    for phase in [Phase::Freeze, Phase::Dump, Phase::Restore, Phase::Commit, Phase::Release] {
        // The last one leaves the tasks that CRIU has made.
        for what in ["-x criu", "-x runc", "-o -x criu"] {
            killed(&mut bed, phase.name(), On::Destination, what)?;
        }
    }
    bed.end_client().map(drop)
}

/// Has every dump on a host fail in the freeze: CRIU may write no file of more than 100 KB.
const SMALL_FILES: &str = "mv /usr/sbin/criu /usr/sbin/criu.real; printf '#!/bin/sh\\nexec \
    prlimit --fsize=102400 /usr/sbin/criu.real \"$@\"\\n' >/usr/sbin/criu; chmod +x /usr/sbin/criu";
const ANY_FILES: &str = "mv -f /usr/sbin/criu.real /usr/sbin/criu";

#[test]
fn a_dump_that_fails_when_the_clients_are_led_away_already_harms_none_of_them() -> Result<()> {
    let mut bed = Bed::start()?;
    for (way, tries) in [("", 2), ("--no-fast held-dump --no-fast held-restore", 2)] {
        bed.source().run(SMALL_FILES)?;
        let output = bed.scene.try_migrate(
            "redis",
            bed.here,
            bed.there,
            &format!("--ip {}/24 {way}", ferry_tests::scene::FLOATING),
        )?;
        bed.source().run(ANY_FILES)?;
        ensure!(!output.status.success(), "{way}: it went through: {output}");
        for text in ["dump:", "redis runs on a, its connections alive"] {
            ensure!(output.stderr.contains(text), "{way}: no {text:?} in {output}");
        }
        let failed = output.stderr.matches("failed\n").count();
        ensure!(failed >= tries, "{way}: {failed} tries: {output}");
        is_served(&bed.scene, SOON)?;
        bed.is_whole(way)?;
        let seen = bed.end_client()?;
        let gap = seen["longest_gap_ms"].as_f64().unwrap_or(f64::MAX);
        ensure!(gap < SOON.as_secs_f64() * 1000.0, "{way}: the client waited {gap} ms");
        bed.new_client()?;
    }
    bed.end_client().map(drop)
}

#[test]
fn no_packet_waits_longer_than_its_migration() -> Result<()> {
    let mut bed = Bed::start()?;
    let queues = |bed: &Bed| -> Result<String> {
        Ok(bed.destination().run("cat /proc/net/netfilter/nfnetlink_queue")?.stdout)
    };
    for (who, point) in
        [("driver", "announced"), ("agent", "announced"), ("driver", "restore"), ("agent", "dump")]
    {
        let when = format!("{who} killed at {point}");
        let job = bed.stop_at(point, "")?;
        // The clients come here by now, and wait.
        bed.destination().wait_until("packets wait", |_| {
            queues(&bed).is_ok_and(|text| {
                // Its number, its reader, and how many wait.
                let waiting = text.split_whitespace().nth(2).and_then(|n| n.parse::<u32>().ok());
                waiting > Some(0)
            })
        })?;
        let killed = Instant::now();
        if who == "driver" {
            kill_ferry(bed.source())?;
        } else {
            kill_ferry(bed.destination())?;
            ferry_tests::scene::go_on(bed.source())?;
        }
        bed.destination().wait_until("nothing waits", |_| {
            queues(&bed).is_ok_and(|text| text.trim().is_empty())
        })?;
        let waited = killed.elapsed();
        ensure!(waited < Duration::from_secs(5), "{when}: packets waited {waited:?}");
        job.wait(Duration::from_secs(60))?;
        is_served(&bed.scene, SOON)?;
        bed.is_whole(&when)?;
    }
    let seen = bed.end_client()?;
    let gap = seen["longest_gap_ms"].as_f64().unwrap_or(f64::MAX);
    ensure!(gap < SOON.as_secs_f64() * 1000.0, "the client waited {gap} ms");
    Ok(())
}
