//! The page daemon in the middle of a move: what it must follow, and who of it is killed when.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_oci::api::ferry::{DescribeRequest, Pages};
use ferry_oci::pages::areas::parse_smaps;
use ferry_oci::pages::daemon::Client;
use ferry_oci::pages::store::{Limits, Store};
use ferry_oci::pages::stream::Receiver;
use ferry_tests::memory::{Asked, HELD_FILL, LATE_FILL, stores, wait_for_fill};
use ferry_tests::scene::{
    FLOATING, go_on, stop_at, task_state, traces, wait_for_traces, wait_for_traces_but_pages,
};
use ferry_tests::task::Task;
use ferry_tests::{Host, Scene};

/// How long a migration may take to come to its end.
const END: Duration = Duration::from_secs(100);
/// A workload that is checked in a second or two, and changes its mappings all the time.
const RESTLESS: &str = "check --processes 3 --threads 1 --megabytes 8 --events 150";
/// It never comes to rest: more rounds are of no use.
const ROUNDS: &str = "--rounds 2";

/// Pids of the processes of the page daemon on `host`: the keeper, then its workers.
fn daemon(host: &Host) -> Result<Vec<u32>> {
    let script = "for file in /run/ferry/pages/*/meta.json; do \
                  keeper=$(sed -n 's/.*\"keeper\":\\([0-9]*\\).*/\\1/p' $file 2>/dev/null); \
                  [ -n \"$keeper\" ] && echo $keeper && pgrep -P $keeper; done; true";
    let pids = host.run(script)?.stdout;
    pids.split_whitespace().map(|pid| pid.parse().context("a pid")).collect()
}

/// Starts the workload on `a`; its guards stay as they are, since the kernel tells nobody of them.
fn start(scene: &Scene) -> Result<Asked> {
    let mut memory = scene.start_memory("a", RESTLESS, "")?;
    memory.keep_guards(true)?;
    Ok(memory)
}

#[test]
fn what_is_done_to_memory_that_has_not_come_yet_is_followed() -> Result<()> {
    let scene = Scene::start()?;
    let mut memory = start(&scene)?;
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
        let more = format!("--ip {FLOATING}/24 {ROUNDS} {HELD_FILL}");
        scene.try_migrate("mem", from, to, &more)?.checked("ferry migrate")?;
        // It frees, moves, maps anew and forks meanwhile.
        let before = memory.stats()?["events"].as_u64();
        scene.host(to).wait_until("enough has happened", |_| {
            memory.stats().is_ok_and(|now| now["events"].as_u64() > before.map(|n| n + 150))
        })?;
        ensure!(!stores(scene.host(to))?.is_empty(), "the memory has come early");
        memory.check()?;
        let pages = scene.host(to).root().join("run/ferry/pages/default.mem");
        Client::connect(&pages).context("reach the page daemon")?.fill()?;
        wait_for_fill(scene.host(to))?;
        memory.check()?;
    }
    Ok(())
}

#[test]
fn a_keeper_that_is_killed_while_memory_comes_loses_nothing() -> Result<()> {
    let scene = Scene::start()?;
    let b = scene.host("b");
    let mut memory = start(&scene)?;
    let more = format!("--ip {FLOATING}/24 {ROUNDS} {LATE_FILL}");
    scene.try_migrate("mem", "a", "b", &more)?.checked("ferry migrate")?;
    let pids = daemon(b)?;
    let [keeper, worker] = pids[..] else { anyhow::bail!("no keeper and worker: {pids:?}") };
    b.run(&format!("kill -9 {keeper}"))?;
    b.run(&format!("kill -0 {worker}")).context("the worker must go on")?;
    memory.check()?;
    memory.goes_on()?;
    b.wait_until("the worker has ended too", |h| {
        h.output(&format!("kill -0 {worker}")).is_ok_and(|o| !o.status.success())
    })?;
    memory.check()?;
    ensure!(stores(b)?.is_empty() && b.run("ls /run/ferry/pages")?.stdout.is_empty());
    // And it may leave.
    scene.try_migrate("mem", "b", "a", &format!("--ip {FLOATING}/24"))?.checked("go home")?;
    memory.check().map(drop)
}

#[test]
fn a_page_daemon_killed_in_any_phase_leaves_one_container_with_all_its_memory() -> Result<()> {
    let scene = Scene::start()?;
    let mut memory = start(&scene)?;
    let empty = traces(scene.host("b"))?;
    let full = traces(scene.host("a"))?;
    let (mut here, mut there) = ("a", "b");
    let more = format!("--ip {FLOATING}/24 {ROUNDS}");
    for phase in Phase::ALL {
        // Before it is there is none, and with the container's first steps it is another test's.
        if phase <= Phase::Precopy || phase > Phase::Release {
            continue;
        }
        for who in ["keeper", "worker"] {
            let when = format!("{who} killed at {}", phase.name());
            let job = stop_at(&scene, "mem", phase.name(), (here, there), &more)?;
            let pids = daemon(scene.host(there))?;
            let victim = if who == "keeper" { pids.first() } else { pids.get(1) };
            if let Some(pid) = victim {
                scene.host(there).run(&format!("kill -9 {pid}"))?;
            }
            go_on(scene.host(here))?;
            let output = job.wait(END).with_context(|| when.clone())?;
            if output.status.success() {
                (here, there) = (there, here);
            } else {
                let told = format!("mem runs on {here}");
                ensure!(output.stderr.contains(&told), "{when}: no {told:?} in {output}");
            }
            // Only the keeper has what is sent until it is complete, which it is with the order to
            // restore.
            if who == "worker" || phase != Phase::Restore {
                let lost = who == "keeper" && phase < Phase::Restore;
                ensure!(output.status.success() != lost, "{when}: {output}");
            }
            memory.check().with_context(|| format!("{when}: {output}"))?;
            let state = task_state(scene.host(here), "mem")?;
            ensure!(state.as_deref() == Some("RUNNING"), "{when}: {state:?}");
            wait_for_traces_but_pages(scene.host(there), &empty, &when)?;
            wait_for_traces(scene.host(here), &full, &when)?;
        }
    }
    memory.goes_on()
}

#[test]
fn a_dump_from_which_nothing_is_hidden_is_noticed_and_loses_nothing() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 50_000)?;
    let digest = |host: &Host| Ok::<_, anyhow::Error>(host.run("redis-cli debug digest")?.stdout);
    let before = digest(scene.host("a"))?;
    let more = format!("--ip {FLOATING}/24");
    let job = stop_at(&scene, "redis", Phase::Dump.name(), ("a", "b"), &more)?;
    // CRIU has not asked for its orders yet.
    scene.host("a").run("rm /run/ferry/hide/*/ranges")?;
    go_on(scene.host("a"))?;
    let output = job.wait(END)?.checked("ferry migrate")?;
    ensure!(output.stdout.contains("that were to be hidden"), "it was not noticed: {output}");
    ensure!(digest(scene.host("b"))? == before, "the digest is another");
    wait_for_fill(scene.host("b"))?;
    ensure!(digest(scene.host("b"))? == before, "the digest is another");
    Ok(())
}

/// Asks for a round of the stream and puts it into `store`; bytes of the stream.
fn round(
    mut stream: &UnixStream,
    kind: u8,
    receiver: &mut Receiver,
    store: &mut Store,
) -> Result<u64> {
    stream.write_all(&[kind])?;
    let mut bytes = vec![0; 64 << 10];
    loop {
        let count = stream.read(&mut bytes)?;
        ensure!(count > 0, "it breaks off");
        if let Some(done) = receiver.push(&bytes[..count], store)? {
            return Ok(done.bytes);
        }
    }
}

/// As somebody would that has only the Ferry service's description.
#[test]
fn the_stream_of_pages_is_had_at_a_socket_of_its_own_and_is_what_the_container_has() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    let mut memory = scene.start_memory("a", RESTLESS, "")?;
    let before = traces(host)?;
    let path = "/run/containerd/io.containerd.runtime.v2.task/default/mem/ferry.json";
    let announced: serde_json::Value =
        serde_json::from_str(&host.run(&format!("cat {path}"))?.stdout)?;
    let inside = |path: &str| host.root().join(path.trim_start_matches('/'));
    let service = inside(announced["socket"].as_str().context("no socket")?);
    let ferry = Task::connect(&service, "ferry.v1.Ferry")?;
    let request = DescribeRequest { id: "mem".into(), ..Default::default() };
    host.run("ferry predump mem")?;
    let refused = ferry.call::<Pages>("OpenPages", &request).err().context("beside pre-dumps")?;
    ensure!(refused.to_string().contains("ferry predump --end"), "{refused}");
    host.run("ferry predump mem --end")?;
    let pages: Pages = ferry.call("OpenPages", &request)?;
    let socket = inside(&pages.socket);
    let stream = UnixStream::connect(&socket)?;
    stream.set_read_timeout(Some(END))?;
    let (mut receiver, mut store) = (Receiver::new(), Store::create(&Limits::default())?);
    let first = round(&stream, b'r', &mut receiver, &mut store)?;
    memory.check().context("after the first round")?;
    let second = round(&stream, b'r', &mut receiver, &mut store)?;
    ensure!(first > 8 << 20 && second < first, "{first} bytes, then {second}");
    ensure!(!socket.exists(), "a second one could connect");
    let refused = ferry.call::<Pages>("OpenPages", &request).err().context("beside a stream")?;
    ensure!(refused.code() == "FAILED_PRECONDITION", "{refused}");
    let beside = host.output("ferry predump mem")?;
    ensure!(beside.stderr.contains("streamed already"), "{beside}");
    host.run("ctr task pause mem")?;
    let refused = ferry.call::<Pages>("OpenPages", &request).err().context("it stands still")?;
    ensure!(refused.to_string().contains("resume it"), "{refused}");
    round(&stream, b'f', &mut receiver, &mut store)?;
    let compared = compare(host, &store)?;
    ensure!(compared > 3000, "{compared} pages");
    host.run("ctr task resume mem")?;
    drop(stream);
    memory.check().context("at the end")?;
    // What the stream has kept away may follow at once.
    host.run("ferry predump mem && ferry predump mem --end")?;
    wait_for_traces(host, &before, "after the stream")
}

/// Compares what the frozen processes of `mem` have with `store`; how many pages that were.
fn compare(host: &Host, store: &Store) -> Result<u64> {
    let mut compared = 0;
    let pids = host.run("cat /sys/fs/cgroup/freezer/default/mem/cgroup.procs")?.stdout;
    for pid in pids.split_whitespace() {
        let proc = host.root().join("proc").join(pid);
        let status = std::fs::read_to_string(proc.join("status"))?;
        let space = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let space = space.and_then(|pids| pids.split_whitespace().last()).context("no NSpid")?;
        let areas = parse_smaps(&std::fs::read(proc.join("smaps"))?)?;
        let memory = std::fs::File::open(proc.join("mem"))?;
        for area in areas.iter().filter(|area| area.hideable()) {
            for at in area.range().step_by(4096) {
                let (mut stored, mut real) = ([0; 4096], [0; 4096]);
                let there = store.read(space.parse()?, at, &mut stored)?;
                // What is not there, and guards, are as good as zeros.
                if memory.read_exact_at(&mut real, at).is_ok() {
                    ensure!(stored == real, "process {space}, page {at:x}, {there}");
                    compared += u64::from(there);
                }
            }
        }
    }
    Ok(compared)
}
