//! What a dump locks in the firewall does not outlast it, whatever is killed in it.

use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_tests::ctr::PYTHON;
use ferry_tests::scene::{
    FLOATING, RUNTIME, Scene, finish_client, go_on, stop_at, task_state, traces, wait_for_traces,
};
use ferry_tests::{Host, Job};

/// How long a command may take that goes on after something was killed.
const END: Duration = Duration::from_secs(60);

/// A server and its client in one process, whose connection never leaves the loopback device.
const TALK: &str = "import socket, time\ns = socket.create_server(('127.0.0.1', 7000))\n\
    c = socket.create_connection(('127.0.0.1', 7000))\na, _ = s.accept()\nn = 0\nwhile True:\n \
    c.sendall(b'x'); assert a.recv(1) == b'x'; n += 1\n \
    open('/count', 'w').write(str(n)); time.sleep(0.01)";

/// Starts `command` with `ferry` in it that stands at `point` afterwards.
fn stand_at(host: &Host, point: &str, command: &str) -> Result<Job> {
    let job = host.spawn(&format!("FERRY_FAULT={point}:/tmp/fault exec {command}"))?;
    host.wait_until("it stands at the fault point", |h| {
        h.output("test -e /tmp/fault").is_ok_and(|o| o.status.success())
    })?;
    Ok(job)
}

#[test]
fn a_dump_whose_criu_is_killed_at_its_end_silences_nobody() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    scene.start_redis("a", 1000)?;
    let client = scene.start_client(3)?;
    let job = stand_at(a, "dumped", "ferry checkpoint redis snap")?;
    // CRIU's table, by which it goes on to keep the peers silent.
    ensure!(a.run("nft list tables")?.stdout.contains("CRIU-"), "CRIU has no lock");
    a.run("pkill -9 -x criu")?;
    go_on(a)?;
    job.wait(END)?.checked("ferry checkpoint")?;
    let tables = a.run("nft list tables")?.stdout;
    ensure!(tables.is_empty(), "left: {tables}");
    finish_client(client)?;
    Ok(())
}

#[test]
fn a_private_network_is_unlocked_when_criu_is_killed_and_the_migration_undone() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    a.run(&format!(
        "ctr run -d --null-io --runtime {RUNTIME} {PYTHON} talk python3 -c \"{TALK}\""
    ))?;
    let count = || a.output("ctr task exec --exec-id e talk cat /count").map(|o| o.stdout);
    a.wait_until("it talks", |_| count().is_ok_and(|text| !text.is_empty()))?;
    let job = stop_at(&scene, "talk", "transfer", ("a", "b"), "")?;
    let inside = "nsenter -n -t $(pgrep -o -x python3) nft list tables";
    ensure!(a.run(inside)?.stdout.contains("CRIU-"), "CRIU has no lock");
    a.run("pkill -9 -x criu")?;
    b.run("pkill -9 -f '^ferry agent'")?;
    go_on(a)?;
    let output = job.wait(END)?;
    ensure!(output.stderr.contains("talk runs on a"), "{output}");
    ensure!(a.run(inside)?.stdout.is_empty(), "left: {}; {output}", a.run(inside)?.stdout);
    let before = count()?;
    a.wait_until("it talks again", |_| count().is_ok_and(|text| text != before && !text.is_empty()))
}

#[test]
fn a_shim_that_is_killed_in_a_dump_leaves_no_lock() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    scene.start_redis("a", 1000)?;
    a.run("ctr task kill -s KILL redis")?;
    let clear = format!(
        "ferry discard snap; ctr task rm -f redis; ctr container rm redis; \
         ip addr del {FLOATING}/24 dev eth0; rm -rf /tmp/images; true"
    );
    a.wait_until("it has ended", |h| {
        task_state(h, "redis").is_ok_and(|s| s.as_deref() != Some("RUNNING"))
    })?;
    a.run(&clear)?;
    let empty = traces(a)?;
    let by_ctr = |exit: &str| -> Result<Job> {
        // CRIU waits for somebody who reads its pages.
        a.run("mkdir /tmp/images && mkfifo /tmp/images/pages-1.img")?;
        let job =
            a.spawn(&format!("exec ctr task checkpoint {exit} --image-path /tmp/images redis"))?;
        a.wait_until("the dump is under way", |h| {
            h.output("nft list tables | grep -q .").is_ok_and(|o| o.status.success())
        })?;
        Ok(job)
    };
    for way in ["ctr", "ctr --exit", "ferry", "ferry --exit"] {
        scene.start_redis("a", 1000)?;
        let client = scene.start_client(3)?;
        let job = match way {
            "ctr" => by_ctr("")?,
            "ctr --exit" => by_ctr("--exit")?,
            "ferry" => stand_at(a, "dumped", "ferry checkpoint redis snap")?,
            _ => stand_at(a, "dumped", "ferry checkpoint redis snap --exit")?,
        };
        ensure!(!a.run("nft list tables")?.stdout.is_empty(), "{way}: nothing is locked");
        a.run("pkill -9 -x containerd-shim")?;
        go_on(a)?;
        let output = job.wait(END)?;
        ensure!(!output.status.success(), "{way}: {output}");
        a.wait_until("containerd has cleaned up", |h| {
            task_state(h, "redis").is_ok_and(|state| state.is_none())
        })?;
        a.run(&clear)?;
        wait_for_traces(a, &empty, way)?;
        drop(client);
    }
    Ok(())
}
