//! What cannot be moved is refused by its name, with a cure, before anything has changed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::scene::{FLOATING, RUNTIME, Scene, traces};
use serde_json::Value;

/// Runs a migration that must be refused with `name`, and looks whether anything has changed.
fn refused(scene: &Scene, id: &str, more: &str, name: &str) -> Result<()> {
    let (a, b) = (scene.host("a"), scene.host("b"));
    let before = (traces(a)?, traces(b)?);
    let output = scene.try_migrate(id, "a", "b", more)?;
    let told = format!("{}{}", output.stdout, output.stderr);
    ensure!(!output.status.success(), "{name}: it was moved: {output}");
    ensure!(told.contains(name), "no {name:?} in: {output}");
    assert_eq!((traces(a)?, traces(b)?), before, "{name}: something has changed");
    Ok(())
}

/// A shell that sleeps, with more options for `ctr run`.
fn start(scene: &Scene, id: &str, options: &str) -> Result<()> {
    scene.host("a").run(&format!(
        "ctr run -d --null-io {options} --runtime {RUNTIME} docker.io/library/busybox:latest {id} \
         sleep 100000"
    ))?;
    Ok(())
}

fn end(scene: &Scene, id: &str) -> Result<()> {
    scene.host("a").run(&format!(
        "ctr task kill -s 9 {id}; while ctr task ls | grep -q '^{id} .*RUNNING'; do sleep 0.05; \
         done; ctr task rm {id} >/dev/null 2>&1; ctr container rm {id}"
    ))?;
    Ok(())
}

#[test]
fn containers_that_cannot_move_are_refused_by_name() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));

    refused(&scene, "nobody", "", "there is no container nobody")?;

    a.run("ip netns add given")?;
    start(&scene, "box", "--with-ns network:/run/netns/given")?;
    refused(&scene, "box", "", "netns-missing")?;
    end(&scene, "box")?;
    a.run("ip netns del given")?;

    start(&scene, "box", "--mount type=bind,src=/srv,dst=/data,options=rbind:ro")?;
    refused(&scene, "box", "", "bind-mount")?;
    end(&scene, "box")?;

    start(&scene, "box", "--label containerd.io/restart.status=running")?;
    refused(&scene, "box", "", "restart-policy")?;
    end(&scene, "box")?;

    a.run("ctr run -d --null-io docker.io/library/busybox:latest box sleep 100000")?;
    refused(&scene, "box", "", RUNTIME)?;
    end(&scene, "box")?;

    start(&scene, "box", "")?;
    let pid = a.run("ctr task ls | awk '/^box/ {print $2}'")?.stdout;
    let pid = pid.trim();
    // Somebody gives the private network a device, as CNI does.
    a.run(&format!("ip link add cni0 type veth peer name eth0 netns {pid}"))?;
    refused(&scene, "box", "", "cni")?;
    a.run("ip link del cni0")?;
    // Another container in its pid namespace.
    a.run(&format!(
        "ctr run -d --null-io --with-ns pid:/proc/{pid}/ns/pid --runtime {RUNTIME} \
         docker.io/library/busybox:latest guest sleep 100000"
    ))?;
    refused(&scene, "box", "", "namespace-shared")?;
    refused(&scene, "guest", "", "namespace-joined")?;
    end(&scene, "guest")?;
    a.run("ctr task exec -d --exec-id session box sleep 1000")?;
    refused(&scene, "box", "", "exec-open")?;
    end(&scene, "box")?;

    let mut client = a.spawn(&format!(
        "exec script -qc 'ctr run -t --runtime {RUNTIME} docker.io/library/busybox:latest box \
         sh -c \"echo ready; sleep 100000\"' /dev/null"
    ))?;
    client.wait_for("ready", Duration::from_secs(60))?;
    refused(&scene, "box", "", "box has a terminal")?;
    drop(client);
    end(&scene, "box")?;

    start(&scene, "box", "")?;
    a.run("ctr task pause box")?;
    refused(&scene, "box", "", "box is paused")?;
    a.run("ctr task resume box")?;
    refused(&scene, "box", &format!("--ip {FLOATING}/24"), "ip-unused")?;
    b.run("ctr container create docker.io/library/busybox:latest box")?;
    refused(&scene, "box", "", "id-taken")?;
    b.run("ctr container rm box")?;
    for mode in ["post", "hybrid"] {
        refused(&scene, "box", &format!("--mode {mode}"), &format!("--mode {mode}"))?;
    }
    refused(&scene, "box", "--remote-ferry nothing-there", "ferry is not installed there")?;
    // An agent of another protocol.
    let hello = r#"{"Hello":{"protocol":99,"ferry":"9.9.9"}}"#;
    b.run(&format!(
        "printf '#!/bin/sh\\nprintf \"\\\\001\\\\{:03o}\\\\000\\\\000\\\\000\"; \
         cat /tmp/hello; cat >/dev/null\\n' >/usr/local/bin/ferry-9; \
         printf '%s' '{hello}' >/tmp/hello; chmod +x /usr/local/bin/ferry-9",
        hello.len()
    ))?;
    refused(&scene, "box", "--remote-ferry ferry-9", "speaks protocol 99")?;
    b.run("mv /usr/sbin/criu /usr/sbin/criu.away")?;
    refused(&scene, "box", "", "criu-missing")?;
    b.run("mv /usr/sbin/criu.away /usr/sbin/criu")?;
    // With nothing in the way, a dry run says so and changes nothing either.
    let before = (traces(a)?, traces(b)?);
    let plan = scene.try_migrate("box", "a", "b", "--dry-run")?.checked("dry run")?;
    ensure!(plan.stdout.contains("nothing stands in the way"), "{plan}");
    let json = scene.try_migrate("box", "a", "b", "--dry-run --json")?.checked("dry run")?;
    ensure!(json.stdout.contains("\"blockers\": []"), "{json}");
    assert_eq!((traces(a)?, traces(b)?), before);
    Ok(())
}

#[test]
fn connections_that_cannot_follow_are_refused_by_name() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    scene.start_redis("a", 0)?;
    let ip = format!("--ip {FLOATING}/24");

    // A client on the host's own address, and one that stays behind on 127.0.0.1.
    for address in ["10.77.0.1", "127.0.0.1"] {
        let client = a.spawn(&format!("exec redis-cli -h {address} subscribe x"))?;
        a.wait_until("the client is connected", |h| {
            h.output("redis-cli pubsub channels").is_ok_and(|o| o.stdout.contains('x'))
        })?;
        refused(&scene, "redis", &ip, "connection").with_context(|| address.to_owned())?;
        drop(client);
        a.wait_until("the client is gone", |h| {
            h.output("redis-cli pubsub channels").is_ok_and(|o| !o.stdout.contains('x'))
        })?;
    }

    // An outbound link from the host's own address.
    let other = b.spawn("exec redis-server --port 7777 --protected-mode no --save ''")?;
    a.run("redis-cli replicaof 10.77.0.2 7777")?;
    a.wait_until("the link is up", |h| {
        h.output("redis-cli info replication").is_ok_and(|o| o.stdout.contains("link_status:up"))
    })?;
    refused(&scene, "redis", &ip, "connection")?;
    a.run("redis-cli replicaof no one")?;
    drop(other);

    let taken = b.spawn("exec redis-server --port 6379 --protected-mode no --save ''")?;
    b.wait_until("the port is taken", |h| {
        h.output("redis-cli ping").is_ok_and(|o| o.stdout.contains("PONG"))
    })?;
    refused(&scene, "redis", &ip, "port-taken")?;
    drop(taken);
    b.wait_until("the port is free", |h| {
        h.output("redis-cli ping").is_ok_and(|o| !o.stdout.contains("PONG"))
    })?;

    refused(&scene, "redis", "--ip 10.77.0.55/24", "address-missing")?;
    refused(&scene, "redis", &format!("--ip {FLOATING}"), "/24")?;
    refused(&scene, "redis", "--ip fd77::100/64", "address-missing")?;
    let away = a.output(&format!("ferry migrate redis --to ssh://root@10.77.0.99 {ip}"))?;
    ensure!(away.stderr.contains("ssh cannot reach it"), "{away}");
    let scheme = a.output(&format!("ferry migrate redis --to tcp://10.77.0.2 {ip}"))?;
    ensure!(scheme.stderr.contains("only ssh://"), "{scheme}");

    a.run("redis-cli config set bind 10.77.0.1")?;
    refused(&scene, "redis", &ip, "listener-address")
}

#[test]
fn memory_that_is_shared_now_and_would_not_fit_then_is_refused_by_name() -> Result<()> {
    // Processes that have forked one another and write little.
    const TREE: &str = "check --processes 4 --threads 0 --megabytes 32 --rate 10 --events 1";
    let scene = Scene::start()?;
    let ip = format!("--ip {FLOATING}/24");
    let memory = scene.start_memory("a", TREE, "")?;
    let plan = scene.try_migrate("mem", "a", "b", &format!("{ip} --dry-run --json"))?;
    let plan: Value = serde_json::from_str(&plan.checked("dry run")?.stdout)?;
    let usage = &plan["facts"]["memory"]["usage"];
    let bytes = |name: &str| usage[name].as_u64().context("no memory in the plan");
    let (once, each) = (bytes("once")?, bytes("each")?);
    ensure!(each > once * 2, "{usage}");
    drop(memory);
    end(&scene, "mem")?;

    let limit = (once + each) / 2;
    let mut memory = scene.start_memory("a", TREE, &format!("--memory-limit {limit}"))?;
    refused(&scene, "mem", &ip, "memory-limit")?;
    memory.check()?;
    memory.goes_on()?;
    // CRIU's own images keep what is shared.
    let more = format!("{ip} --mode stop");
    scene.try_migrate("mem", "a", "b", &more)?.checked("ferry migrate --mode stop")?;
    memory.check()?;
    memory.goes_on()
}
