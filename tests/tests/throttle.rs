//! A container that changes its memory too fast: named, throttled, and given its CPU time back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_tests::memory::wait_for_fill;
use ferry_tests::scene::{
    FLOATING, go_on, stop_at, traces, wait_for_traces, wait_for_traces_but_pages,
};
use ferry_tests::{Host, Scene};

/// CPU quota of the container `id` on `host`, as the kernel says it.
fn quota(host: &Host, id: &str) -> Result<String> {
    let script = format!(
        "pid=$(ctr task ls | awk '$1 == \"{id}\" {{print $2}}'); \
         path=$(sed -n 's/^[0-9]*:[^:]*\\bcpu\\b[^:]*://p' /proc/$pid/cgroup); \
         if [ -n \"$path\" ]; then cd /sys/fs/cgroup/cpu/$path && cat cpu.cfs_quota_us; \
         else cd /sys/fs/cgroup/$(sed -n 's/^0:://p' /proc/$pid/cgroup) && cat cpu.max; fi"
    );
    Ok(host.run(&script)?.stdout.trim().to_owned())
}

/// Writes all of its working set again and again, faster than any link could send it.
const FAST_WRITER: &str = "writer --megabytes 32 --rate 3000";
/// A pause that is too short for that much memory, and not too short for none.
const TARGET: &str = "--downtime-target 21";
const TOO_FAST: &str = "faster than it can be copied";

#[test]
fn memory_that_changes_too_fast_is_named() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let empty = traces(b)?;
    let mut memory = scene.start_memory("a", FAST_WRITER, "")?;
    let own = quota(a, "mem")?;
    for (target, why) in [(TARGET, "NoProgress"), ("--downtime-target 1", "TargetTooShort")] {
        let more = format!("--ip {FLOATING}/24 --on-diverge fail {target}");
        let refused = scene.try_migrate("mem", "a", "b", &more)?;
        ensure!(!refused.status.success(), "{target}: it went through: {refused}");
        for text in [TOO_FAST, why, "mem runs on a"] {
            ensure!(refused.stderr.contains(text), "{target}: no {text:?} in {refused}");
        }
        memory.goes_on().context(target)?;
    }
    ensure!(quota(a, "mem")? == own, "the quota is another");
    wait_for_traces_but_pages(b, &empty, "after two refusals")?;
    let more = format!("--ip {FLOATING}/24 --on-diverge stop {TARGET} --rounds 3");
    let moved = scene.try_migrate("mem", "a", "b", &more)?.checked("ferry migrate")?;
    ensure!(moved.stdout.contains(TOO_FAST), "{moved}");
    memory.goes_on()
}

#[test]
fn a_throttled_container_has_its_cpu_time_again() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let mut memory = scene.start_memory("a", FAST_WRITER, "")?;
    let own = quota(a, "mem")?;
    let throttle = format!("--on-diverge throttle {TARGET} --rounds 2");
    // Whoever carries cgroups over must not carry the limit.
    for (to, more) in [("b", ""), ("a", "--no-fast cgroups")] {
        let from = if to == "b" { "a" } else { "b" };
        let more = format!("--ip {FLOATING}/24 {throttle} {more}");
        scene.try_migrate("mem", from, to, &more)?.checked("ferry migrate")?;
        memory.goes_on()?;
        let now = quota(scene.host(to), "mem")?;
        ensure!(now == own, "the quota is {now} after {more:?}");
        wait_for_fill(scene.host(to))?;
    }
    // A migration that fails leaves it as it was.
    let more = format!("--ip {FLOATING}/24 {throttle}");
    let job = stop_at(&scene, "mem", Phase::Hold.name(), ("a", "b"), &more)?;
    let limited = quota(a, "mem")?;
    ensure!(limited != own, "it was not throttled");
    b.run("pkill -9 -f '^ferry agent'")?;
    go_on(a)?;
    let failed = job.wait(Duration::from_secs(60))?;
    ensure!(!failed.status.success(), "{failed}");
    let now = quota(a, "mem")?;
    ensure!(now == own, "the quota is {now} after a failure");
    memory.goes_on()
}

#[test]
fn a_driver_that_is_killed_while_it_throttles_gives_the_cpu_time_back() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let mut memory = scene.start_memory("a", FAST_WRITER, "")?;
    let own = quota(a, "mem")?;
    let (with, without) = (traces(a)?, traces(b)?);
    let more = format!("--ip {FLOATING}/24 --on-diverge throttle {TARGET} --rounds 2");
    // Killed alone, with all that it has started, and asked to end.
    for kill in [
        "pkill -9 -f '^ferry migrate'",
        "pid=$(pgrep -f '^ferry migrate'); kill -9 $pid $(pgrep -P $pid -x ssh)",
        "pkill -TERM -x ferry",
    ] {
        let job = stop_at(&scene, "mem", Phase::Hold.name(), ("a", "b"), &more)?;
        let limited = quota(a, "mem")?;
        ensure!(limited != own, "it was not throttled");
        a.run(kill)?;
        let killed = Instant::now();
        while quota(a, "mem")? != own {
            let waited = killed.elapsed();
            ensure!(waited < Duration::from_secs(1), "{kill}: throttled {waited:?} later");
        }
        job.wait(Duration::from_secs(60))?;
        go_on(a)?;
        memory.goes_on()?;
        wait_for_traces(a, &with, kill)?;
        ensure!(a.run("ls /run/ferry/quota")?.stdout.is_empty(), "{kill}: something is left");
        wait_for_traces_but_pages(b, &without, kill)?;
    }
    Ok(())
}
