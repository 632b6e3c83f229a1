//! The main job: a container crosses while its clients stay connected.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::host::SHARED;
use ferry_tests::memory::wait_for_fill;
use ferry_tests::scene::{
    FLOATING, RUNTIME, finish_client, go_on, stop_at, task_state, traces, wait_for_traces,
    wait_for_traces_but_pages,
};
use ferry_tests::{Host, Scene};
use nix::sys::signal::Signal;

/// Connections of redis on `host`: local and remote address of each.
fn connections(host: &Host) -> Result<BTreeSet<String>> {
    let listing = host.run("ss -Htn state established '( sport = :6379 )'")?.stdout;
    Ok(listing
        .lines()
        .map(|l| l.split_whitespace().skip(2).take(2).collect::<Vec<_>>().join(" "))
        .collect())
}

#[test]
fn redis_crosses_there_and_back_three_times_under_load() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 100_000)?;
    let with_redis = traces(scene.host("a"))?;
    let without = traces(scene.host("b"))?;
    let keys = scene.host("a").run("redis-cli dbsize; redis-cli debug digest")?.stdout;
    ensure!(keys.starts_with("100000\n"), "{keys}");
    let arp = scene.lab.client().spawn("exec tcpdump -lnei eth0 arp")?;
    let client = scene.start_client(50)?;
    let tuples = connections(scene.host("a"))?;
    ensure!(tuples.len() == 50, "{tuples:?}");
    for round in 0..6 {
        let (from, to) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let report = scene.migrate("redis", from, to)?;
        ensure!(report["downtime"]["total_us"].as_u64() > Some(0), "{report}");
        ensure!(report["warnings"].as_array().is_some_and(Vec::is_empty), "{report}");
        assert_eq!(connections(scene.host(to))?, tuples, "round {round}");
        assert_eq!(connections(scene.host(from))?, BTreeSet::new(), "round {round}");
        assert_eq!(task_state(scene.host(to), "redis")?.as_deref(), Some("RUNNING"));
        assert_eq!(task_state(scene.host(from), "redis")?, None);
        std::thread::sleep(Duration::from_millis(300));
    }
    let report = finish_client(client)?;
    ensure!(report["connections"] == 50, "{report}");
    // Every key and value, without those that the clients count in.
    scene
        .host("a")
        .run("redis-cli --scan --pattern 'ferry-echo:*' | xargs -n 100 redis-cli del >/dev/null")?;
    assert_eq!(scene.host("a").run("redis-cli dbsize; redis-cli debug digest")?.stdout, keys);
    // Each host announced the address with its own hardware address.
    let seen = arp.stop()?.stdout;
    for name in ["a", "b"] {
        let mac = scene.host(name).run("cat /sys/class/net/eth0/address")?.stdout;
        let announced = seen
            .lines()
            .any(|l| l.contains(mac.trim()) && l.contains("Reply") && l.contains(FLOATING));
        ensure!(announced, "no gratuitous ARP of {name} ({mac}) in:\n{seen}");
    }
    wait_for_traces(scene.host("a"), &with_redis, "after three rounds")?;
    wait_for_traces(scene.host("b"), &without, "after three rounds")
}

#[test]
fn redis_crosses_through_a_unix_socket_whose_connection_is_the_lease() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 10_000)?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let url = format!("unix://{SHARED}/b.sock");
    let command = format!("ferry migrate redis --to {url} --ip {FLOATING}/24 --json");
    let cure = format!("ferry agent --listen {url}");
    let refused = a.output(&command)?;
    ensure!(!refused.status.success() && refused.stderr.contains(&cure), "{refused}");

    let clean = traces(b)?;
    let agent = b.spawn(&format!("exec {cure}"))?;
    b.wait_until("its agent listens", |h| {
        h.output(&format!("test -S {SHARED}/b.sock")).is_ok_and(|o| o.status.success())
    })?;
    let mode = b.run(&format!("stat -c %a {SHARED}/b.sock"))?.stdout;
    assert_eq!(mode.trim(), "600");
    let listening = traces(b)?;
    let client = scene.start_client(4)?;
    let tuples = connections(a)?;
    ensure!(tuples.len() == 4, "{tuples:?}");

    // Held there and not committed: what was made goes with the driver's connection.
    let driver = a.spawn(&format!("FERRY_FAULT=commit:/tmp/fault exec {command}"))?;
    a.wait_until("the restore is held", |h| {
        h.output("test -e /tmp/fault").is_ok_and(|o| o.status.success())
    })
    .with_context(|| format!("built with fault-points? stderr: {}", driver.stderr()))?;
    ensure!(task_state(b, "redis")?.is_some(), "nothing was made there");
    driver.signal(Signal::SIGKILL);
    drop(driver);
    wait_for_traces_but_pages(b, &listening, "after its driver was killed")?;
    assert_eq!(connections(a)?, tuples);

    let report = a.run(&command)?.stdout;
    ensure!(report.contains(&format!("\"destination\": \"{url}\"")), "{report}");
    assert_eq!(task_state(b, "redis")?.as_deref(), Some("RUNNING"));
    assert_eq!(connections(b)?, tuples);
    finish_client(client)?;

    // The listener goes with its socket, and what it started stays.
    wait_for_fill(b)?;
    let ended = agent.stop()?;
    ensure!(ended.status.success(), "{ended}");
    ensure!(a.output(&format!("test -e {SHARED}/b.sock"))?.status.code() == Some(1), "it is left");
    b.run(&format!(
        "redis-cli -h 127.0.0.1 ping && ctr task rm --force redis && ctr container rm redis && \
         ip addr del {FLOATING}/24 dev eth0"
    ))?;
    wait_for_traces(b, &clean, "after the listener ended")
}

#[test]
fn the_writable_layer_crosses_with_what_changed_meanwhile() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    a.run(&format!(
        "ctr run -d --null-io --net-host --runtime {RUNTIME} docker.io/library/busybox:latest box \
         sh -c 'n=0; while :; do n=$((n+1)); echo $n >/count; sleep 0.01; done'"
    ))?;
    a.run(
        "ctr task exec --exec-id w box sh -c \
         'mkdir -p /data/deep; dd if=/dev/urandom of=/data/deep/file bs=64k count=40 2>/dev/null; \
          ln -s deep/file /data/link; rm -rf /var; chmod 751 /data; mkfifo /data/fifo; \
          echo early >/data/early; echo one >/data/deep/log; \
          md5sum /data/deep/file >/data/sum'",
    )?;
    // What is written between the first pass over the layer and the freeze goes as a delta.
    let job = stop_at(&scene, "box", "freeze", ("a", "b"), "")?;
    a.run(
        "ctr task exec --exec-id d box sh -c 'echo late >/data/late; rm /data/early; \
         echo more >>/data/deep/log'",
    )?;
    go_on(a)?;
    let output = job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
    let b = scene.host("b");
    let inside = |script: &str| {
        b.run(&format!("ctr task exec --exec-id x{} box sh -c '{script}'", std::process::id()))
            .map(|o| o.stdout)
    };
    ensure!(inside("md5sum -c /data/sum")?.contains("OK"), "{output}");
    ensure!(inside("readlink /data/link")?.trim() == "deep/file", "the link is wrong");
    ensure!(inside("ls -ld /data")?.starts_with("drwxr-x--x"), "the mode is wrong");
    ensure!(inside("ls -l /data/fifo")?.starts_with('p'), "the fifo is wrong");
    ensure!(inside("ls /var 2>&1; true")?.contains("No such"), "/var is back");
    ensure!(inside("cat /data/late /data/deep/log")? == "late\none\nmore\n", "the delta is wrong");
    ensure!(inside("ls /data")?.split_whitespace().all(|f| f != "early"), "/data/early is back");
    let count = || inside("cat /count").map(|c| c.trim().parse::<u64>().unwrap_or(0));
    let first = count()?;
    // It may be read in the moment in which it is being rewritten.
    b.wait_until("the counter goes on", |_| count().is_ok_and(|n| n > first))?;
    Ok(())
}

#[test]
fn a_private_network_has_its_loopback_and_its_connections_after_the_move() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    a.run(&format!(
        "ctr run -d --null-io --runtime {RUNTIME} docker.io/library/python:latest local \
         python3 -c '{LOCAL}'"
    ))?;
    let count = |host: &Host, n: u32| -> Result<u64> {
        let out = host.run(&format!("ctr task exec --exec-id c{n} local cat /count"))?.stdout;
        Ok(out.trim().parse()?)
    };
    std::thread::sleep(Duration::from_secs(1));
    ensure!(count(a, 0)? > 0);
    scene.try_migrate("local", "a", "b", "")?.checked("ferry migrate")?;
    let b = scene.host("b");
    let first = count(b, 1)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(count(b, 2)? > first, "the connection over loopback does not go on");
    let pid = b.run("ctr task ls | awk '/^local/ {print $2}'")?.stdout;
    let lo = b.run(&format!("nsenter -t {} -n ip -br addr show lo", pid.trim()))?.stdout;
    ensure!(lo.contains("127.0.0.1/8"), "{lo}");
    // And back, from a namespace that CRIU made.
    let back = scene.try_migrate("local", "b", "a", "")?.checked("ferry migrate")?;
    let first = count(a, 3)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(count(a, 4)? > first, "{back}");
    Ok(())
}

/// Two threads that talk over 127.0.0.1 and count what came back right.
const LOCAL: &str = r#"
import socket, threading, time
s = socket.socket(); s.bind(("127.0.0.1", 7000)); s.listen(5)
c = socket.create_connection(("127.0.0.1", 7000)); d, _ = s.accept()
def echo():
    while True:
        x = d.recv(100)
        if not x: break
        d.sendall(x)
threading.Thread(target=echo, daemon=True).start()
n = 0
while True:
    c.sendall(b"%08d" % n); r = b""
    while len(r) < 8: r += c.recv(8 - len(r))
    assert int(r) == n
    n += 1
    if n % 10 == 0:
        with open("/count.new", "w") as f: f.write(str(n))
        import os; os.rename("/count.new", "/count")
    time.sleep(0.002)
"#;

#[test]
fn tcp_and_udp_echo_lose_and_repeat_nothing() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    a.run(&format!(
        "ip addr add {FLOATING}/24 dev eth0; ctr run -d --null-io --net-host --runtime {RUNTIME} \
         docker.io/library/ferry-echo:latest echo ferry-echo serve --bind {FLOATING} --port 7000"
    ))?;
    std::thread::sleep(Duration::from_millis(500));
    let tcp = scene
        .lab
        .client()
        .spawn(&format!("exec ferry-echo client {FLOATING}:7000 --connections 8"))?;
    std::thread::sleep(Duration::from_millis(500));
    for (from, to) in [("a", "b"), ("b", "a")] {
        scene.migrate("echo", from, to)?;
        std::thread::sleep(Duration::from_millis(300));
    }
    finish_client(tcp)?;
    let udp = scene
        .lab
        .client()
        .spawn(&format!("exec ferry-echo client {FLOATING}:7000 --connections 2 --udp"))?;
    std::thread::sleep(Duration::from_millis(500));
    scene.migrate("echo", "a", "b")?;
    std::thread::sleep(Duration::from_millis(500));
    let output = udp.stop()?;
    ensure!(output.stdout.contains("\"requests\""), "{output}");
    Ok(())
}

#[test]
fn what_a_client_sends_while_nothing_runs_is_answered_after_the_move() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 0)?;
    let mut client = scene.lab.client().spawn(&format!(
        "exec bash -c 'exec 3<>/dev/tcp/{FLOATING}/6379; echo connected; \
         until [ -e /tmp/send ]; do sleep 0.02; done; printf \"PING\\r\\n\" >&3; echo sent; \
         read -r -t 45 -u 3 line; echo \"got $line\"'"
    ))?;
    client.wait_for("connected", Duration::from_secs(10))?;
    // Dumped and sent: what the source's kernel acknowledged now, nobody would ever read.
    let ip = format!("--ip {FLOATING}/24");
    let job = stop_at(&scene, "redis", "restore", ("a", "b"), &ip)?;
    scene.lab.client().run("touch /tmp/send")?;
    client.wait_for("sent", Duration::from_secs(10))?;
    std::thread::sleep(Duration::from_millis(500));
    go_on(scene.host("a"))?;
    job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
    let seen = |host: &Host| {
        host.output("ss -tniO '( sport = :6379 or dport = :6379 )'; ip neigh; nft list ruleset")
    };
    client.wait_for("got +PONG", Duration::from_secs(50)).with_context(|| {
        format!("client {:?}\nb {:?}", seen(scene.lab.client()), seen(scene.host("b")))
    })
}

#[test]
fn only_one_host_answers_for_the_address_at_any_time() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 0)?;
    let ip = format!("--ip {FLOATING}/24");
    let mac = |name: &str| -> Result<String> {
        let text = scene.host(name).run("cat /sys/class/net/eth0/address")?.stdout;
        Ok(text.trim().to_uppercase())
    };
    let (a, b) = (mac("a")?, mac("b")?);
    // Both have the address before the freeze and after the release.
    for (phase, owner, other) in [("freeze", &a, &b), ("retire", &b, &a)] {
        let (from, to) = ("a", "b");
        let job = stop_at(&scene, "redis", phase, (from, to), &ip)?;
        let told = scene.lab.client().output(&format!("arping -c 3 -I eth0 {FLOATING}"))?.stdout;
        ensure!(told.to_uppercase().contains(owner), "at {phase}, {owner} is silent: {told}");
        ensure!(!told.to_uppercase().contains(other), "at {phase}, {other} answers: {told}");
        go_on(scene.host(from))?;
        job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
        if phase == "freeze" {
            scene.migrate("redis", "b", "a")?;
        }
    }
    Ok(())
}
