//! `ferry predump`, and checkpoints that build on what it has written down.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::memory::Asked;
use ferry_tests::scene::{traces, wait_for_traces};
use ferry_tests::tally::{json, refused};
use ferry_tests::{Host, Scene};

/// Where ferry keeps them.
const FOLDER: &str = "/var/lib/ferry/predumps/default.mem";
/// Memory of every kind that changes all the time, in three processes.
const MEMORY: &str = "check --processes 3 --threads 1 --megabytes 32";
/// The process that tracks memory from one to the next.
const TRACKER: &str = "pgrep -f '^ferry-predump '";

/// Ends the container, and brings it back with the memory of the checkpoint.
fn there_and_back(host: &Host, memory: &mut Asked, name: &str) -> Result<()> {
    host.run(&format!("ferry checkpoint mem {name} --exit"))?;
    host.run(&format!("ferry restore {name}"))?;
    memory.check().with_context(|| format!("after {name}"))?;
    memory.goes_on()?;
    host.run(&format!("ferry discard {name}")).map(drop)
}

#[test]
fn a_checkpoint_on_top_of_pre_dumps_has_every_byte_of_its_moment() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    let mut memory = scene.start_memory("a", MEMORY, "--privileged")?;
    let running = traces(host)?;
    for round in 0..2 {
        let first = json(host, "ferry predump mem --json")?;
        ensure!(first["parent"].is_null() && first["bytes"].as_u64() > Some(32 << 20), "{first}");
        for number in 2..4 {
            memory.goes_on()?;
            let next = json(host, "ferry predump mem --json")?;
            ensure!(next["folder"] == format!("{FOLDER}/{number}"), "{next}");
            ensure!(next["parent"] == format!("{FOLDER}/{}", number - 1), "{next}");
            // The rest is in those before.
            ensure!(next["in_parent_bytes"].as_u64() > Some(0), "{next}");
            memory.check().context("while it is tracked")?;
        }
        memory.goes_on()?;
        if round == 0 {
            // It runs on, and what nothing builds on any more is gone.
            let kept = json(host, "ferry checkpoint mem kept --json")?;
            ensure!(kept["statistics"]["memory_bytes"].as_u64() > Some(32 << 20), "{kept}");
            memory.check().context("after a checkpoint")?;
            let inside = json(host, "ferry inspect kept --json")?;
            ensure!(inside["contents"]["has_parent"] == false, "{inside}");
            host.run("ferry discard kept")?;
            wait_for_traces(host, &running, "after the checkpoint")?;
            ensure!(!host.output(TRACKER)?.status.success(), "it is still tracked");
        }
    }
    there_and_back(host, &mut memory, "on-top")?;

    // A process that tracks and is killed takes the chain with it, and nothing else.
    json(host, "ferry predump mem --json")?;
    host.run(&format!("kill -9 $({TRACKER})"))?;
    let refusal = refused(host, "ferry predump mem")?;
    ensure!(refusal.contains("process that tracks memory"), "{refusal}");
    json(host, "ferry predump mem --json")?;
    host.run(&format!("kill -9 $({TRACKER})"))?;
    there_and_back(host, &mut memory, "whole")?;

    // A migration tracks memory itself. The page daemon does not hear of guards that change.
    memory.keep_guards(true)?;
    json(host, "ferry predump mem --json")?;
    scene.migrate("mem", "a", "b")?;
    memory.check().context("after a migration")?;
    host.wait_until("nothing is tracked", |host| {
        host.output(TRACKER).is_ok_and(|found| !found.status.success())
    })?;
    ensure!(!host.output(&format!("ls {FOLDER}"))?.status.success(), "pre-dumps are left");
    Ok(())
}

#[test]
fn what_cannot_be_pre_dumped_is_refused_and_changes_nothing() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    let mut memory = scene.start_memory("a", MEMORY, "")?;
    let running = traces(host)?;
    let refusal = refused(host, "ferry predump nobody")?;
    ensure!(refusal.contains("nobody does not run"), "{refusal}");
    host.run("ctr run -d --runtime io.containerd.runc.v2 docker.io/library/busybox:latest other sleep 1000")?;
    let refusal = refused(host, "ferry predump other")?;
    ensure!(refusal.contains("--runtime io.containerd.ferry.v2"), "{refusal}");
    host.run("ctr task pause mem")?;
    let refusal = refused(host, "ferry predump mem")?;
    ensure!(refusal.contains("resume"), "{refusal}");
    host.run("ctr task resume mem; ferry predump mem --end")?;
    // A folder of one's own stays one's own.
    let first = json(host, "ferry predump mem --folder /var/tmp/own --json")?;
    ensure!(first["folder"] == "/var/tmp/own/1", "{first}");
    let second = json(host, "ferry predump mem --json")?;
    ensure!(second["folder"] == "/var/tmp/own/2", "{second}");
    host.run("ferry predump mem --end; ls /var/tmp/own/2/pagemap-1.img")?;
    ensure!(!host.output(TRACKER)?.status.success(), "it is still tracked");
    let third = json(host, "ferry predump mem --folder /var/tmp/own --json")?;
    ensure!(third["parent"].is_null() && third["folder"] == "/var/tmp/own/3", "{third}");
    host.run("ferry predump mem --end; rm -r /var/tmp/own")?;
    memory.check()?;
    host.run("ctr task kill -s KILL other; sleep 1; ctr task rm other; ctr container rm other")?;
    wait_for_traces(host, &running, "after all of it")?;

    // What a host has left that was switched off goes with the next. They go with the container.
    let left = "/var/lib/ferry/predumps/default.long.gone";
    host.run(&format!("mkdir -p {left}/1"))?;
    json(host, "ferry predump mem --json")?;
    ensure!(!host.output(&format!("ls {left}"))?.status.success(), "{left} is still there");
    host.run("ctr task kill -s KILL mem")?;
    host.wait_until("its pre-dumps are gone", |host| {
        host.output(&format!("ls {FOLDER}")).is_ok_and(|found| !found.status.success())
    })?;
    std::thread::sleep(Duration::from_millis(100));
    ensure!(!host.output(TRACKER)?.status.success(), "a process that has ended is tracked");
    Ok(())
}
