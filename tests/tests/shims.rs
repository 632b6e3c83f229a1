//! A shim killed in a migration. Its container ends with it, as at any other time; but where the other
//! host has all of it and may have it, it goes on there, and there are never two.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_tests::faults::{Bed, is_served};
use ferry_tests::scene::{
    FLOATING, task_state, traces, wait_for_traces, wait_for_traces_but_pages,
};
use ferry_tests::{Host, Job};

/// Kills the shim on `host`, which has one container.
fn kill_shim(host: &Host) -> Result<()> {
    host.run("pkill -9 -x containerd-shim").map(drop)
}

/// Removes what containerd keeps of a container whose shim was killed, and its address.
fn clear(host: &Host) -> Result<()> {
    host.wait_until("the task is gone", |h| {
        h.output("ctr task rm -f redis; ctr task ls").is_ok_and(|o| !o.stdout.contains("redis"))
    })?;
    host.run(&format!(
        "ctr container rm redis 2>/dev/null; ip addr del {FLOATING}/24 dev eth0 2>/dev/null; true"
    ))
    .map(drop)
}

#[test]
fn a_source_whose_shim_is_killed_loses_the_container_only_if_nobody_else_has_it() -> Result<()> {
    let mut bed = Bed::start()?;
    let nothing = {
        bed.end_client()?;
        clear(bed.source())?;
        traces(bed.source())?
    };
    bed.scene.start_redis("a", 1000)?;
    bed.new_client()?;
    // At the last one there is no shim any more.
    let points = Phase::ALL.into_iter().filter(|p| (Phase::Hold..Phase::Finish).contains(p));
    for (phase, point) in
        points.map(|phase| (phase, phase.name())).chain([(Phase::Freeze, "announced")])
    {
        let when = format!("the source's shim killed at {point}");
        let job = bed.stop_at(point, "").with_context(|| when.clone())?;
        kill_shim(bed.source())?;
        // It is gone with all it had, whatever the driver does.
        bed.source().wait_until("the tasks have ended", |h| {
            h.output("pgrep -x redis-server").is_ok_and(|o| !o.status.success())
        })?;
        // Its images go with it, and before they are checked nobody may commit.
        let goes_on = phase >= Phase::Commit;
        if !goes_on {
            bed.source().wait_until("its images are gone", |h| {
                h.output("ls -A /run/ferry/images").is_ok_and(|o| o.stdout.is_empty())
            })?;
        }
        let output = bed.go_on(job).with_context(|| when.clone())?;
        println!("{when}: {output}");
        ensure!(output.status.success() == goes_on, "{when}: {output}");
        if goes_on {
            bed.has_moved();
            bed.is_whole(&when)?;
            continue;
        }
        let told = format!("redis has ended on {}", bed.here);
        ensure!(output.stderr.contains(&told), "{when}: no {told:?} in {output}");
        clear(bed.source())?;
        wait_for_traces(bed.source(), &nothing, &when)?;
        wait_for_traces_but_pages(bed.destination(), &bed.empty, &when)?;
        // Its clients were cut off with it.
        let _ = bed.end_client();
        bed.scene.start_redis(bed.here, 1000)?;
        // They have been led back, or would look for it on the other host for 7 s.
        is_served(&bed.scene, Duration::from_secs(4)).context(when)?;
        bed.new_client()?;
    }
    bed.end_client().map(drop)
}

#[test]
fn a_destination_whose_shim_is_killed_leaves_the_container_on_its_source() -> Result<()> {
    let mut bed = Bed::start()?;
    let points = Phase::ALL.into_iter();
    let points = points.filter(|phase| (Phase::Layer..=Phase::Release).contains(phase));
    for point in points.map(Phase::name).chain(["announced"]) {
        let when = format!("the destination's shim killed at {point}");
        let job = bed.stop_at(point, "").with_context(|| when.clone())?;
        kill_shim(bed.destination())?;
        let output = bed.go_on(job).with_context(|| when.clone())?;
        println!("{when}: {output}");
        ensure!(!output.status.success(), "{when}: {output}");
        let told = format!("redis runs on {}, its connections alive", bed.here);
        ensure!(output.stderr.contains(&told), "{when}: no {told:?} in {output}");
        bed.is_whole(&when)?;
    }
    bed.end_client().map(drop)
}

/// Where containerd keeps what it has of the tasks.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/default";

/// How long what was started for so long may take.
const SOON: Duration = Duration::from_secs(10);

/// As on a host with much to do: a runc that takes its time, and a root file system that something is
/// still in.
fn slow_down(host: &Host) -> Result<Job> {
    let script =
        "#!/bin/sh\ncase \"$*\" in *\" delete \"*) sleep 3.5 ;; esac\nexec /usr/sbin/runc \"$@\"\n";
    std::fs::write(host.root().join("usr/local/sbin/runc"), script)?;
    host.run("chmod +x /usr/local/sbin/runc")?;
    host.spawn(&format!("cd {BUNDLES}/redis/rootfs && exec sleep 3.2"))
}

#[test]
fn a_shim_that_is_killed_is_cleaned_up_before_the_migration_ends() -> Result<()> {
    let mut bed = Bed::start()?;
    let job = bed.stop_at("announced", "")?;
    let busy = slow_down(bed.destination())?;
    kill_shim(bed.destination())?;
    let output = bed.go_on(job)?;
    ensure!(!output.status.success(), "{output}");
    // Whoever comes next would find the folder of the last one in its way.
    let left = bed.destination().run(&format!("ls -A {BUNDLES}"))?;
    ensure!(left.stdout.is_empty(), "a bundle is left: {left}\n{output}");
    busy.wait(SOON)?;
    bed.is_whole("with a slow clean-up")?;
    bed.scene.migrate("redis", bed.here, bed.there)?;
    bed.has_moved();
    bed.end_client().map(drop)
}

#[test]
fn a_shim_killed_after_the_release_does_not_bring_the_container_back_elsewhere() -> Result<()> {
    let mut bed = Bed::start()?;
    bed.end_client()?;
    for phase in [Phase::Retire, Phase::Finish] {
        let when = format!("the destination's shim killed at {}", phase.name());
        let job = bed.stop_at(phase.name(), "")?;
        // It has run there, and whoever it answered must not find an older one.
        kill_shim(bed.destination())?;
        let output = bed.go_on(job)?;
        println!("{when}: {output}");
        ensure!(task_state(bed.source(), "redis")?.is_none(), "{when}: it is back: {output}");
        bed.destination().wait_until("nothing runs there", |h| {
            task_state(h, "redis").is_ok_and(|state| state.as_deref() != Some("RUNNING"))
        })?;
        let again = bed.again()?;
        ensure!(task_state(bed.source(), "redis")?.is_none(), "{when}: it is back: {again}");
        clear(bed.destination())?;
        let (a, b) = (bed.source(), bed.destination());
        wait_for_traces(a, &bed.empty, &when)?;
        ensure!(b.run("ferry status; nft list ruleset")?.stdout.is_empty(), "{when}");
        std::thread::sleep(Duration::from_millis(200));
        bed.scene.start_redis(bed.here, 1000)?;
    }
    Ok(())
}
