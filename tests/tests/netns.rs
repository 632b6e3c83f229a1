//! A container in a network namespace that is given by path goes into the one of that path on the
//! other host, with the connections between its processes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::Host;
use ferry_tests::scene::{
    FLOATING, RUNTIME, Scene, go_on, stop_at, task_state, traces, wait_for_traces,
    wait_for_traces_but_pages,
};
use serde_json::Value;

/// An address that both hosts have in their namespaces, besides those of lo.
const ADDRESS: &str = "10.99.0.5";

/// Two processes: one sends numbers over two connections, the other sends them back. Any answer that
/// is lost, repeated or wrong ends the first one, and the container with it.
const TALK: &str = r#"
import os, socket, sys
ADDRESSES = sys.argv[1:]
listeners = [socket.create_server((a, 7000)) for a in ADDRESSES]
if os.fork() == 0:
    ends = [l.accept()[0] for l in listeners]
    while True:
        for end in ends:
            end.sendall(end.recv(8, socket.MSG_WAITALL))
import time
calls = [socket.create_connection((a, 7000)) for a in ADDRESSES]
n = 0
while True:
    for call in calls:
        call.sendall(b"%08d" % n)
        assert call.recv(8, socket.MSG_WAITALL) == b"%08d" % n
    n += 1
    if n % 10 == 0:
        with open("/count.new", "w") as f: f.write(str(n))
        os.rename("/count.new", "/count")
    time.sleep(0.002)
"#;

/// Makes the namespace `x`.
fn make(host: &Host) -> Result<()> {
    host.run(&format!(
        "ip netns add x; ip -n x link set lo up; ip -n x link add v0 type veth peer name v1; \
         ip -n x link set v0 addrgenmode none up; ip -n x link set v1 addrgenmode none up; \
         ip -n x addr add {ADDRESS}/24 dev v0"
    ))?;
    Ok(())
}

/// Everything that a move could leave or change in the namespace `x`.
fn inside(host: &Host) -> Result<String> {
    let script = "ip -n x -br addr; ip -n x route; ip netns exec x nft list ruleset";
    Ok(host.run(script)?.stdout)
}

/// The connections in the namespace `x`, sorted.
fn connections(host: &Host) -> Result<Vec<String>> {
    let listing = host.run("ip netns exec x ss -Htan state connected")?.stdout;
    let ends = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        [&fields[..1], &fields[3..5]].concat().join(" ")
    };
    let mut lines: Vec<_> = listing.lines().map(ends).collect();
    lines.sort();
    Ok(lines)
}

fn start(scene: &Scene) -> Result<()> {
    let a = scene.host("a");
    a.run(&format!(
        "ctr run -d --null-io --with-ns network:/run/netns/x --runtime {RUNTIME} \
         docker.io/library/python:latest talk python3 -c '{TALK}' 127.0.0.1 {ADDRESS}"
    ))?;
    goes_on(a)
}

/// A program in the container, by a new exec session.
fn exec(host: &Host, script: &str) -> Result<String> {
    let id = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos();
    let output =
        host.run(&format!("ctr task exec --exec-id e{id} talk {script}")).context("exec")?;
    Ok(output.stdout.trim().to_owned())
}

/// The two processes go on talking.
fn goes_on(host: &Host) -> Result<()> {
    let count = || exec(host, "cat /count").ok()?.parse::<u64>().ok();
    let mut first = None;
    host.wait_until("the connections go on", |_| {
        let now = count();
        let more = now > first && first.is_some();
        first = first.or(now);
        more
    })?;
    ensure!(task_state(host, "talk")?.as_deref() == Some("RUNNING"), "the container has ended");
    Ok(())
}

fn move_to(scene: &Scene, to: &str, way: &str) -> Result<Value> {
    let from = if to == "b" { "a" } else { "b" };
    let output = scene.try_migrate("talk", from, to, &format!("--json {way}"))?;
    let output = output.checked("ferry migrate")?;
    serde_json::from_str(&output.stdout).with_context(|| format!("decode {}", output.stdout))
}

/// What the report says of the fast path: why it was not taken.
fn why_not(report: &Value) -> Result<Option<&str>> {
    let choices = report["fast"].as_array().context("no choices")?;
    let choice = choices.iter().find(|choice| choice["name"] == "netns").context("not listed")?;
    Ok(choice["off"].as_str())
}

#[test]
fn a_container_crosses_between_namespaces_of_one_path_with_its_connections() -> Result<()> {
    let scene = Scene::start()?;
    make(scene.host("a"))?;
    make(scene.host("b"))?;
    let without = (traces(scene.host("b"))?, inside(scene.host("b"))?);
    start(&scene)?;
    let with = traces(scene.host("a"))?;
    let connected = connections(scene.host("a"))?;
    ensure!(connected.len() == 4, "{connected:?}");
    for (way, off) in [
        ("", false),
        ("", false),
        ("--no-fast netns", true),
        ("--no-fast netns", true),
        // The restore finds out by itself where it has to be.
        ("--no-fast held-restore --mode stop", false),
        ("--no-fast held-dump", false),
        // From one that the slow path has restored, and the other way round.
        ("", false),
        ("--no-fast netns --no-fast held-restore", true),
    ]
    .into_iter()
    {
        let to = if task_state(scene.host("a"), "talk")?.is_some() { "b" } else { "a" };
        let (host, from) = (scene.host(to), scene.host(if to == "b" { "a" } else { "b" }));
        let report = move_to(&scene, to, way)?;
        ensure!(why_not(&report)?.is_some() == off, "{way:?}: {report}");
        ensure!(report["warnings"].as_array().is_some_and(Vec::is_empty), "{way:?}: {report}");
        assert_eq!(connections(host)?, connected, "{way:?} to {to}");
        assert_eq!(connections(from)?, [""; 0], "{way:?} to {to}");
        goes_on(host).with_context(|| format!("{way:?} to {to}"))?;
        // It is really in there, and so is whoever joins it.
        let inode = host.run("stat -Lc %i /run/netns/x")?.stdout;
        let its = format!("net:[{}]", inode.trim());
        let pids = host.run("ctr task ps talk | awk 'NR > 1 {print $1}'")?.stdout;
        ensure!(pids.lines().count() == 2, "{pids}");
        for pid in pids.lines() {
            let found = host.run(&format!("readlink /proc/{pid}/ns/net"))?.stdout;
            assert_eq!(found.trim(), its, "{way:?} to {to}");
        }
        assert_eq!(exec(host, "readlink /proc/self/ns/net")?, its, "{way:?} to {to}");
        for host in [host, from] {
            assert_eq!(inside(host)?, without.1, "{way:?} to {to}: on {}", host.name());
        }
        ensure!(task_state(from, "talk")?.is_none(), "{way:?}: it is on both hosts");
    }
    wait_for_traces(scene.host("a"), &with, "after all moves")?;
    wait_for_traces(scene.host("b"), &without.0, "after all moves")
}

#[test]
fn a_move_that_ends_in_the_pause_leaves_the_namespace_as_it_was() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    make(a)?;
    make(b)?;
    let without = traces(b)?;
    let clean = inside(a)?;
    start(&scene)?;
    move_to(&scene, "b", "")?;
    move_to(&scene, "a", "")?;
    let with = traces(a)?;
    for (way, fast) in [("", true), ("--no-fast netns", false)] {
        let job = stop_at(&scene, "talk", "restore", ("a", "b"), way)?;
        // Nothing passes in there, and there is nothing of it elsewhere.
        let silent = inside(a)?;
        ensure!(silent.contains("table inet ferry-") && silent.contains("drop"), "{silent}");
        ensure!(a.run("nft list ruleset")?.stdout.is_empty(), "the host has rules");
        // What CRIU knows of the namespace tells where it was.
        let images = a.run("cd /run/ferry/images/*; ls; cat ferry.json")?.stdout;
        ensure!(images.contains("netns-") != fast, "{way:?}: {images}");
        ensure!(images.contains(&format!("\"in_netns\": {fast}")), "{way:?}: {images}");
        a.run("pkill -9 -f '^ferry migrate'")?;
        job.wait(Duration::from_secs(60))?;
        go_on(a)?;
        goes_on(a).with_context(|| way.to_owned())?;
        assert_eq!(inside(a)?, clean, "{way:?}");
        wait_for_traces(a, &with, way)?;
        wait_for_traces_but_pages(b, &without, way)?;
        assert_eq!(inside(b)?, clean, "{way:?}");
    }
    // A shim takes its container along while nobody else has it, and not the next one's network.
    let job = stop_at(&scene, "talk", "dump", ("a", "b"), "")?;
    ensure!(inside(a)?.contains("drop"), "nothing is locked");
    a.run("pkill -9 -x containerd-shim")?;
    go_on(a)?;
    let output = job.wait(Duration::from_secs(60))?;
    ensure!(!output.status.success(), "it went through: {output}");
    a.wait_until("the namespace is unlocked", |a| inside(a).is_ok_and(|now| now == clean))?;
    wait_for_traces_but_pages(b, &without, "the shim was killed")?;
    assert_eq!(inside(b)?, clean);
    Ok(())
}

/// Runs a migration that must be refused with `name` and `cure`.
fn refused(scene: &Scene, more: &str, name: &str, cure: &str) -> Result<()> {
    let output = scene.try_migrate("talk", "a", "b", more)?;
    let told = format!("{}{}", output.stdout, output.stderr);
    ensure!(!output.status.success(), "{name}: it was moved: {output}");
    ensure!(told.contains(&format!("{name}:")) && told.contains(cure), "no {name}, {cure}: {told}");
    goes_on(scene.host("a"))
}

/// Starts the two processes again, with other options.
fn start_again(scene: &Scene, options: &str) -> Result<()> {
    scene.host("a").run(&format!(
        "ctr task kill -s 9 talk; while ctr task ls | grep -q '^talk .*RUNNING'; do sleep 0.05; \
         done; ctr task rm talk >/dev/null 2>&1; ctr container rm talk; \
         ctr run -d --null-io {options} --runtime {RUNTIME} \
         docker.io/library/python:latest talk python3 -c '{TALK}' 127.0.0.1"
    ))?;
    goes_on(scene.host("a"))
}

#[test]
fn what_the_destination_lacks_for_a_namespace_is_named_with_its_cure() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    make(a)?;
    start(&scene)?;
    let before = (traces(a)?, inside(a)?, traces(b)?);
    refused(&scene, "", "netns-missing", "ip netns add x")?;
    // What `ip netns` leaves when a host is started again.
    b.run("mkdir -p /run/netns; touch /run/netns/x")?;
    refused(&scene, "", "netns-missing", "no network namespace")?;
    b.run("mount --bind /proc/1/ns/net /run/netns/x")?;
    refused(&scene, "", "netns-missing", "the host's own")?;
    b.run("umount /run/netns/x; rm /run/netns/x; rmdir /run/netns")?;
    assert_eq!((traces(a)?, inside(a)?, traces(b)?), before, "something has changed");

    b.run("ip netns add x")?;
    refused(&scene, "", "netns-address", "ip link set lo up")?;
    b.run("ip -n x link set lo up")?;
    refused(&scene, "", "netns-address", &format!("ip addr add {ADDRESS}/PREFIX"))?;
    b.run("ip netns del x")?;
    make(b)?;
    let other =
        b.spawn("exec ip netns exec x redis-server --port 7000 --bind 127.0.0.1 --save ''")?;
    b.wait_until("the port is taken", |b| {
        b.output("ip netns exec x ss -Htln").is_ok_and(|o| o.stdout.contains(":7000"))
    })?;
    refused(&scene, "", "port-taken", "127.0.0.1:7000")?;
    drop(other);

    refused(&scene, &format!("--ip {FLOATING}/24"), "ip-unused", "leave --ip out")?;
    // Somebody else who lives there, and a connection to somebody who does not.
    let guest = a.spawn("exec ip netns exec x sleep 1000")?;
    a.wait_until("somebody is in there", |a| {
        a.output("ip netns pids x | wc -l").is_ok_and(|o| o.stdout.trim() == "3")
    })?;
    refused(&scene, "", "namespace-shared", "end it")?;
    drop(guest);
    // With all of it mended it goes.
    b.wait_until("the port is free", |b| {
        b.output("ip netns exec x ss -Htln").is_ok_and(|o| !o.stdout.contains(":7000"))
    })?;
    a.wait_until("nobody else is in there", |a| {
        a.output("ip netns pids x | wc -l").is_ok_and(|o| o.stdout.trim() == "2")
    })?;
    let plan = scene.try_migrate("talk", "a", "b", "--dry-run")?.checked("dry run")?;
    ensure!(plan.stdout.contains("nothing stands in the way"), "{plan}");
    let fast = plan.stdout.lines().find(|line| line.contains("fast paths:"));
    ensure!(fast.is_some_and(|line| line.contains("netns")), "{plan}");

    // Paths that mean something else there, or here by now.
    let holder =
        a.spawn("exec unshare --net sh -c 'ip link set lo up; echo up; exec sleep 2000'")?;
    let pid = a.run("until pgrep -f '^sleep 2000'; do sleep 0.05; done")?.stdout;
    start_again(&scene, &format!("--with-ns network:/proc/{}/ns/net", pid.trim()))?;
    refused(&scene, "", "netns-path", "ip netns add NAME")?;
    drop(holder);
    start_again(&scene, "--with-ns network:/proc/1/ns/net")?;
    refused(&scene, "", "netns-path", "--net-host")?;
    a.run("ip netns add y; ip -n y link set lo up")?;
    start_again(&scene, "--with-ns network:/run/netns/y")?;
    a.run("ip netns del y; ip netns add y")?;
    refused(&scene, "", "netns-path", "start the container anew")
}
