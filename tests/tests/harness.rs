//! The test hosts themselves: apart from each other, able to run containers, gone without a trace.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::cgroup::Cgroup;
use ferry_tests::host::SHARED;
use ferry_tests::{Host, Lab, exec, process, sweep};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

/// Fails if anything of lab `id` is left: state, disk, cgroups.
fn assert_nothing_left(id: &str) -> Result<()> {
    ensure!(!sweep::labs()?.contains(id), "something of lab {id} is left");
    ensure!(!sweep::state(id).exists(), "state of lab {id} is left");
    ensure!(!sweep::disk(id).exists(), "disks of lab {id} are left");
    for door in Cgroup::of_lab(id)?.doors() {
        ensure!(!door.exists(), "{} is left", door.display());
    }
    Ok(())
}

/// The report of an echo or redis client.
fn report(text: &str) -> Result<Value> {
    let line = text.lines().last().context("the client printed nothing")?;
    serde_json::from_str(line).with_context(|| format!("parse {line}"))
}

#[test]
fn a_host_runs_containers_of_every_image() -> Result<()> {
    let host = Host::start()?;
    let ctr = |image: &str, rest: &str| {
        host.run(&format!("ctr run --rm --net-host docker.io/library/{image}:latest t {rest}"))
    };
    assert_eq!(ctr("busybox", "echo hi")?.stdout, "hi\n");
    assert!(ctr("redis", "redis-server --version")?.stdout.contains("Redis server"));
    let script = "'import socket, threading, json; print(json.dumps([1]))'";
    assert_eq!(ctr("python", &format!("python3 -c {script}"))?.stdout, "[1]\n");
    let usage = host.output("ctr run --rm docker.io/library/ferry-echo:latest t ferry-echo")?;
    assert!(usage.stderr.contains("say serve"), "{usage}");
    Ok(())
}

#[test]
fn hosts_share_one_folder_and_no_namespace_or_descriptor() -> Result<()> {
    let lab = Lab::start(2)?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "time", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        let all = [of("self")?, of(&a.pid().to_string())?, of(&b.pid().to_string())?];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2], "{kind}: {all:?}");
    }
    let probe = format!("ferry-probe-{}", lab.id());
    for folder in ["/dev/shm", "/tmp", "/run", "/root", "/var/lib/containerd"] {
        let file = format!("{folder}/{probe}");
        a.run(&format!("touch {file}"))?;
        assert!(!b.output(&format!("test -e {file}"))?.status.success(), "{file} is on b");
        assert!(!Path::new(&file).exists(), "{file} is on this machine");
    }
    a.run(&format!("touch {SHARED}/{probe}"))?;
    b.run(&format!("test -e {SHARED}/{probe}"))?;
    for host in [a, b] {
        let open = host.run("readlink /proc/1/fd/*")?.stdout;
        assert_eq!(open, "/dev/null\n/var/log/init.log\n/var/log/init.log\n");
    }
    Ok(())
}

#[test]
fn mounts_of_a_host_are_seen_nowhere_else() -> Result<()> {
    let lab = Lab::start(2)?;
    let mark = format!("ferry-mark-{}", lab.id());
    lab.host("a").run(&format!("mount -t tmpfs {mark} /mnt"))?;
    assert!(!lab.host("b").run("cat /proc/mounts")?.stdout.contains(&mark));
    assert!(!fs::read_to_string("/proc/mounts")?.contains(&mark));
    Ok(())
}

#[test]
fn hosts_have_clocks_of_their_own() -> Result<()> {
    let lab = Lab::start(2)?;
    let uptime = |host: &str| -> Result<f64> {
        let text = lab.host(host).run("cut -d' ' -f1 /proc/uptime")?.stdout;
        Ok(text.trim().parse()?)
    };
    let apart = uptime("b")? - uptime("a")?;
    assert!(apart > 3600.0, "the clocks are {apart} s apart");
    Ok(())
}

#[test]
fn hosts_log_in_to_each_other_without_questions() -> Result<()> {
    let lab = Lab::start(2)?;
    let start = Instant::now();
    let seen = lab.host("a").run("ssh -o BatchMode=yes root@10.77.0.2 'hostname; echo $PATH'")?;
    assert!(start.elapsed() < Duration::from_secs(2), "it took {:?}", start.elapsed());
    assert_eq!(seen.stdout, format!("b\n{}\n", exec::PATH));
    assert_eq!(seen.stderr, "");
    assert_eq!(lab.host("b").run("ssh -o BatchMode=yes a hostname")?.stdout, "a\n");
    Ok(())
}

#[test]
fn a_capture_on_the_client_sees_what_a_host_announces() -> Result<()> {
    let lab = Lab::start(1)?;
    let mut capture = lab.client().spawn("exec tcpdump -nn -l -i eth0 arp")?;
    capture.wait_for("listening on", SOON)?;
    lab.host("a").run("ip addr add 10.77.0.100/24 dev eth0; arping -c 1 -U -I eth0 10.77.0.100")?;
    capture.wait_for("10.77.0.100", SOON)?;
    let seen = capture.stop()?;
    assert!(seen.status.success(), "{seen}");
    Ok(())
}

#[test]
fn labs_side_by_side_do_not_meet() -> Result<()> {
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| Lab::start(1));
        (Lab::start(1), one.join())
    });
    let (one, two) = (one?, two.expect("a lab's start panicked")?);
    for (lab, word) in [(&one, "one"), (&two, "two")] {
        lab.host("a").run(&format!(
            "ctr run -d --net-host docker.io/library/redis:latest same &&
             for i in $(seq 100); do redis-cli ping 2>/dev/null && break; sleep 0.05; done &&
             redis-cli set word {word} && touch {SHARED}/{word}"
        ))?;
    }
    for (lab, word) in [(&one, "one"), (&two, "two")] {
        let answer = lab.client().run("redis-cli -h 10.77.0.1 get word")?.stdout;
        assert_eq!(answer.trim(), word);
        assert_eq!(lab.host("a").run(&format!("ls {SHARED}"))?.stdout.trim(), word);
    }
    let links = exec::run(Command::new("ip").args(["-brief", "link"]))?.stdout;
    assert!(!links.contains("port-") && !links.contains("br0"), "links on this machine: {links}");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(one.id()) && !mounts.contains(two.id()), "{mounts}");
    Ok(())
}

#[test]
fn a_removed_lab_leaves_nothing() -> Result<()> {
    let lab = Lab::start(2)?;
    let id = lab.id().to_owned();
    lab.host("a").run("ctr run -d docker.io/library/busybox:latest t sleep 1000")?;
    let mut pids = vec![lab.host("a").pid(), lab.host("b").pid(), lab.client().pid()];
    for pid in pids.clone() {
        pids.extend(process::descendants(pid));
    }
    assert!(pids.len() > 8, "{pids:?}");
    let started: Vec<_> = pids.iter().map(|pid| process::started(*pid)).collect();
    drop(lab);
    for (pid, start) in pids.iter().zip(started) {
        ensure!(!process::alive(*pid) || process::started(*pid) != start, "{pid} is left");
    }
    assert_nothing_left(&id)
}

#[test]
fn a_frozen_container_does_not_keep_a_lab_from_ending() -> Result<()> {
    let lab = Lab::start(1)?;
    let id = lab.id().to_owned();
    lab.host("a")
        .run("ctr run -d docker.io/library/busybox:latest t sleep 1000 && ctr task pause t")?;
    drop(lab);
    assert_nothing_left(&id)
}

#[test]
fn a_lab_is_removed_when_its_test_panics() -> Result<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let test = std::thread::spawn(move || {
        let lab = Lab::start(1).expect("the lab starts");
        sender.send(lab.id().to_owned()).expect("the test listens");
        panic!("as a failing test does");
    });
    let id = receiver.recv()?;
    assert!(test.join().is_err());
    assert_nothing_left(&id)
}

#[test]
fn what_a_killed_run_leaves_is_removed_by_the_next() -> Result<()> {
    let mut run = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .arg("hold")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut id = String::new();
    BufReader::new(run.stdout.take().context("no output")?).read_line(&mut id)?;
    let id = id.trim();
    ensure!(sweep::labs()?.contains(id), "lab {id} does not run");
    run.kill()?;
    run.wait()?;

    let _next = Lab::start(1)?;
    assert_nothing_left(id)
}

#[test]
fn a_run_that_lives_keeps_its_lab() -> Result<()> {
    let lab = Lab::start(1)?;
    sweep::sweep()?;
    lab.host("a").run("ctr version")?;
    Ok(())
}

#[test]
fn a_stopped_host_is_gone_for_the_others() -> Result<()> {
    let lab = Lab::start(2)?;
    lab.host("a").run("ping -c 1 -W 1 10.77.0.2")?;
    lab.host("b").stop()?;
    assert!(!lab.host("a").output("ping -c 1 -W 1 10.77.0.2")?.status.success());
    assert!(lab.host("b").run("true").is_err());
    lab.host("a").run("ctr version")?;
    Ok(())
}

#[test]
fn the_testbed_command_starts_enters_and_removes_a_lab() -> Result<()> {
    let id = sweep::owned_id(500_000);
    let testbed = |words: &[&str]| {
        exec::run(Command::new(env!("CARGO_BIN_EXE_testbed")).args(["--lab", &id]).args(words))
    };
    assert!(testbed(&["up", "--hosts", "1"])?.stdout.contains("10.77.0.1"));
    let first = testbed(&["status"])?.stdout;
    testbed(&["up"])?;
    assert_eq!(testbed(&["status"])?.stdout.lines().next(), first.lines().next());
    assert_eq!(testbed(&["shell", "a", "--", "hostname"])?.stdout, "a\n");
    assert!(testbed(&["shell", "z", "--", "hostname"]).is_err());
    testbed(&["down"])?;
    assert!(testbed(&["status"])?.stdout.starts_with("no hosts run"));
    assert_nothing_left(&id)
}

#[test]
fn clients_count_every_answer_of_the_workloads() -> Result<()> {
    let lab = Lab::start(1)?;
    lab.host("a").run(
        "ctr run -d --net-host docker.io/library/ferry-echo:latest echo &&
         ctr run -d --net-host docker.io/library/redis:latest redis && sleep 0.5",
    )?;
    let clients = [
        "ferry-echo client 10.77.0.1:7777 --connections 20",
        "ferry-echo client 10.77.0.1:7777 --connections 5 --udp",
        "ferry-echo redis 10.77.0.1:6379 --connections 20",
    ];
    let mut jobs = Vec::new();
    for client in clients {
        let mut job = lab.client().spawn(&format!("exec {client}"))?;
        job.wait_for("ready", SOON)?;
        jobs.push(job);
    }
    std::thread::sleep(Duration::from_millis(500));
    for (job, client) in jobs.into_iter().zip(clients) {
        let seen = report(&job.stop()?.stdout)?;
        assert_eq!(seen["errors"], Value::Array(Vec::new()), "{client}");
        assert_eq!(seen["reconnects"], 0, "{client}");
        assert!(seen["requests"].as_u64() > Some(500), "{client}: {seen}");
        assert_eq!(
            seen["sockets"].as_array().map(|list| list.len() as u64),
            seen["connections"].as_u64(),
            "{client}"
        );
    }
    Ok(())
}

#[test]
fn a_client_whose_server_died_says_so_and_does_not_connect_again() -> Result<()> {
    let lab = Lab::start(1)?;
    let start = "ctr run -d --net-host docker.io/library/ferry-echo:latest echo && sleep 0.2";
    lab.host("a").run(start)?;
    let mut client = lab.client().spawn("exec ferry-echo client 10.77.0.1:7777 --connections 3")?;
    client.wait_for("ready", SOON)?;
    lab.host("a").run("ctr task kill -s KILL echo; sleep 0.2; ctr task rm echo; ctr c rm echo")?;
    lab.host("a").run(start)?;
    let seen = report(&client.stop()?.stdout)?;
    assert_eq!(seen["errors"].as_array().map(Vec::len), Some(3), "{seen}");
    Ok(())
}
