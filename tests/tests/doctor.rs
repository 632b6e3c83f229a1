//! `ferry doctor` on hosts and containers that lack something, each of which it has to name.
//!
//! What a host cannot be given alone is tested on facts (`cli/src/doctor/tests.rs`): other kernels and layouts
//! of cgroups, AppArmor and SELinux, Yama, huge pages, and pipes that are short.

use anyhow::{Context, Result, ensure};
use ferry_oci::record::{Decision, Record};
use ferry_tests::ctr::{
    BUSYBOX, FERRY, IDLE, PYTHON, REFERENCE, SOON, remove, start, status, until, wait_for_status,
};
use ferry_tests::{Host, Job, skip, task_lab};
use serde_json::Value;

/// What is found, as pairs of name and severity, and the exit code.
fn doctor(host: &Host, container: &str) -> Result<(Vec<(String, String)>, i32)> {
    doctor_under(host, "", container)
}

/// [`doctor`], started by `starter`, which takes something from it.
fn doctor_under(
    host: &Host,
    starter: &str,
    container: &str,
) -> Result<(Vec<(String, String)>, i32)> {
    let output = host.output(&format!("{starter} ferry --json doctor {container}"))?;
    let code = output.status.code().with_context(|| format!("it was killed: {output}"))?;
    let report: Value =
        serde_json::from_str(&output.stdout).with_context(|| format!("decode {output}"))?;
    let findings = report["findings"].as_array().context("no findings")?;
    let mut found = Vec::new();
    for finding in findings {
        let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        ensure!(!text("cure").is_empty(), "{finding} has no cure");
        println!("{container}: {} {}: {}", text("severity"), text("name"), text("what"));
        found.push((text("name"), text("severity")));
    }
    let has = |severity: &str| found.iter().any(|f| f.1 == severity);
    let expected = if has("blocker") { 2 } else { i32::from(has("warning")) };
    ensure!(code == expected, "exit code {code}: {output}");
    Ok((found, code))
}

fn named(host: &Host, container: &str, name: &str, severity: &str) -> Result<()> {
    named_under(host, "", container, name, severity)
}

fn named_under(
    host: &Host,
    starter: &str,
    container: &str,
    name: &str,
    severity: &str,
) -> Result<()> {
    let (found, _) = doctor_under(host, starter, container)?;
    let is_there = found.iter().any(|f| f.0 == name && f.1 == severity);
    ensure!(is_there, "{starter} {container}: no {severity} {name} in {found:?}");
    Ok(())
}

fn not_named(host: &Host, container: &str, name: &str) -> Result<()> {
    let (found, _) = doctor(host, container)?;
    ensure!(!found.iter().any(|f| f.0 == name), "{container}: {name} is still in {found:?}");
    Ok(())
}

/// Spoils the host with `spoil`, looks for `name`, and mends it with `mend`.
fn spoiled(host: &Host, spoil: &str, name: &str, severity: &str, mend: &str) -> Result<()> {
    host.run(spoil)?;
    named(host, "", name, severity)?;
    host.run(mend)?;
    not_named(host, "", name)
}

#[test]
fn what_a_host_lacks_is_named_with_its_cure() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    let (found, code) = doctor(host, "")?;
    ensure!(code < 2, "a host that all tests pass on: {found:?}");
    let table = host.output("ferry doctor")?;
    println!("{table}");
    ensure!(table.stdout.starts_with("host a\n"), "{table}");

    for (file, name, severity) in [
        ("$(readlink -f $(command -v criu))", "criu-missing", "blocker"),
        ("$(readlink -f $(command -v runc))", "runc-missing", "blocker"),
        ("/usr/local/bin/containerd-shim-ferry-v2", "shim-missing", "blocker"),
        ("/usr/local/bin/libferry_hide.so", "hide-library", "note"),
        ("/usr/local/bin/ferry-tar", "fast-tar", "note"),
    ] {
        let spoil = format!("f={file}; mv $f /var/tmp/away; echo $f >/var/tmp/f");
        spoiled(host, &spoil, name, severity, "mv /var/tmp/away $(cat /var/tmp/f)")?;
    }
    // Others in their place: one too old, one that does not start.
    let fake = |program: &str, text: &str| {
        format!(
            "printf '#!/bin/sh\\n{text}\\n' >/usr/local/sbin/{program}; chmod +x /usr/local/sbin/{program}"
        )
    };
    let old = fake("criu", "echo Version: 3.15");
    spoiled(host, &old, "criu-old", "blocker", "rm /usr/local/sbin/criu")?;
    let broken = fake("criu", "exit 1");
    spoiled(host, &broken, "criu-broken", "blocker", "rm /usr/local/sbin/criu")?;
    let check = fake(
        "criu",
        "[ \"$1\" = check ] || { echo Version: 4.2.1; exit; }; echo \"Error (x): no\" >&2; exit 1",
    );
    spoiled(host, &check, "criu-check", "warning", "rm /usr/local/sbin/criu")?;
    let old = fake("runc", "echo runc version 1.1.5");
    spoiled(host, &old, "runc-old", "warning", "rm /usr/local/sbin/runc")?;
    let legacy = fake("iptables", "echo \"iptables v1.8 (legacy)\"");
    spoiled(host, &legacy, "iptables-legacy", "warning", "rm /usr/local/sbin/iptables")?;

    let table = "nft add table inet CRIU-0-1-2";
    spoiled(host, table, "criu-rules", "warning", "nft delete table inet CRIU-0-1-2")?;
    let rule = "INPUT -p tcp -s 10.9.9.9 -m mark ! --mark 0xc114 -j DROP";
    let (add, delete) = (format!("iptables -A {rule}"), format!("iptables -D {rule}"));
    if host.output(&add)?.status.success() {
        named(host, "", "criu-rules", "warning")?;
        host.run(&delete)?;
        not_named(host, "", "criu-rules")?;
    } else {
        skip("iptables cannot match marks here");
    }
    // The lock that a checkpoint with exit leaves: wanted, so no more than a note.
    let lock = "nft add table inet ferry_checkpoint_0123456789abcdef";
    let delete = "nft delete table inet ferry_checkpoint_0123456789abcdef";
    spoiled(host, lock, "checkpoint-lock", "note", delete)?;

    spoiled(
        host,
        "mkdir /var/tmp/run; mount --bind /var/tmp/run /run",
        "run-tmpfs",
        "warning",
        "umount /run",
    )?;
    // Without containerd there is the host to look at, still.
    let output = host.output("ferry --json --address /run/nobody.sock doctor")?;
    ensure!(output.status.code() == Some(2), "{output}");
    ensure!(output.stdout.contains("\"containerd\""), "{output}");
    let nobody = host.output("ferry doctor nobody")?;
    ensure!(nobody.status.code() == Some(3), "{nobody}");
    ensure!(nobody.stderr.contains("there is no container nobody"), "{nobody}");
    Ok(())
}

/// Starts a program under a seccomp filter that lets everything pass.
const FILTERED: &str = "import ctypes, os, struct, sys
code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))
program = ctypes.create_string_buffer(struct.pack('@HP', 1, ctypes.addressof(code)))
assert ctypes.CDLL(None).prctl(22, 2, program) == 0
os.execvp(sys.argv[1], sys.argv[1:])
";

#[test]
fn what_ferry_is_not_allowed_is_named_with_its_cure() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    std::fs::write(host.root().join("tmp/filtered.py"), FILTERED)?;
    for (starter, name, severity) in [
        ("unshare --user --map-root-user", "rootless", "blocker"),
        ("setpriv --bounding-set=-sys_admin", "capability", "blocker"),
        ("setpriv --bounding-set=-net_admin", "capability", "blocker"),
        ("setpriv --bounding-set=-sys_ptrace", "capability", "blocker"),
        ("setpriv --bounding-set=-sys_resource", "limits", "warning"),
        ("python3 /tmp/filtered.py", "seccomp-suspend", "warning"),
    ] {
        named_under(host, starter, "", name, severity)?;
    }
    let socket = "/run/containerd/containerd.sock";
    let (spoil, mend) = (format!("chown 1000 {socket}"), format!("chown 0 {socket}"));
    spoiled(host, &spoil, "rootless", "blocker", &mend)?;
    // A migration that nobody has finished.
    let record = Record::new("decided-0001", "t", "default", Decision::Committed);
    std::fs::write(host.root().join("tmp/record"), serde_json::to_vec(&record)?)?;
    let folder = "/run/ferry/records";
    let spoil = format!("mkdir -p {folder} && cp /tmp/record {folder}/decided-0001.json");
    spoiled(host, &spoil, "unsettled", "warning", &format!("rm {folder}/decided-0001.json"))?;

    // Another user's process, where its limits cannot be read.
    start(host, FERRY, "--null-io --user 1000:100", "t", IDLE)?;
    named_under(host, "setpriv --bounding-set=-sys_resource", "t", "limits", "blocker")?;
    remove(host, "t").map(drop)
}

#[test]
fn a_lock_of_a_checkpoint_is_told_with_what_it_keeps_silent() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    host.run(
        "nft -f - <<E\n\
         table inet ferry_checkpoint_0123456789abcdef {\n\
           set v4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; flags timeout; \
             elements = { 10.0.0.1 . 5 . 10.0.0.2 . 80 timeout 1h } }\n\
         }\nE",
    )?;
    let report = host.run("ferry doctor || true")?.stdout;
    ensure!(report.contains("1 connections of checkpoint 0123456789abcdef"), "{report}");
    let left = report.split("silent for ").nth(1).and_then(|text| text.split(' ').next());
    let left: u32 = left.context("no time")?.parse()?;
    ensure!((3500..=3600).contains(&left), "{report}");
    ensure!(report.contains("ferry discard REF"), "{report}");
    Ok(())
}

/// A python that does something and then waits.
fn python(host: &Host, options: &str, program: &str) -> Result<()> {
    std::fs::write(
        host.root().join("var/tmp/share/program.py"),
        format!(
            "import ctypes, os, socket, sys, time, fcntl\n{program}\nopen('/dev/shm/ready', 'w')\ntime.sleep(10000)\n"
        ),
    )?;
    // A bind mount of its own: that is found too.
    host.run(&format!(
        "ctr run -d --null-io {options} --mount type=bind,src=/var/tmp/share,dst=/srv,options=rbind:rw \
         --runtime {FERRY} {PYTHON} t python3 /srv/program.py"
    ))?;
    until("the program is ready", || {
        let ready = host.output("ctr task exec --exec-id r t ls /dev/shm/ready")?;
        Ok(ready.status.success())
    })
}

#[test]
fn what_a_program_does_is_named_with_its_cure() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    let net = "--net-host";
    host.run("mkdir /var/tmp/share")?;
    let cases = [
        (
            net,
            "f = open('/tmp/locked', 'w'); fcntl.flock(f, fcntl.LOCK_EX)",
            "file-locks",
            "warning",
        ),
        (
            net,
            "l = ctypes.CDLL(None); n = l.inotify_init(); l.inotify_add_watch(n, b'/etc', 2)",
            "inotify-overlay",
            "warning",
        ),
        (net, "s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "raw-socket", "warning"),
        (
            net,
            "e = os.eventfd(3, os.EFD_SEMAPHORE)\n\
             assert 'semaphore: 1' in open(f'/proc/self/fdinfo/{e}').read()",
            "eventfd-semaphore",
            "warning",
        ),
        (
            net,
            "import struct\nt = ctypes.CDLL(None).timerfd_create(1, 0)\n\
             ctypes.CDLL(None).timerfd_settime(t, 0, struct.pack('4q', 0, 10**7, 0, 1), None)",
            "timerfd-unread",
            "warning",
        ),
        (
            net,
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))\n\
             s.sendto(b'hello', s.getsockname())",
            "udp-unread",
            "warning",
        ),
        (net, "s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", "socket-family", "blocker"),
        (
            net,
            "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); s.bind(('', 7)); s.listen()",
            "mptcp",
            "blocker",
        ),
        (
            net,
            "s = socket.socket(socket.AF_UNIX); s.connect('/srv/outside')",
            "external-unix",
            "blocker",
        ),
        (
            net,
            "s = socket.socket(socket.AF_UNIX); s.connect('/srv/gives'); n = socket.recv_fds(s, 9, 1); \
             s.close()",
            "host-file",
            "blocker",
        ),
        ("--privileged", "f = os.open('/dev/fuse', os.O_RDWR)", "device", "blocker"),
        (
            "--privileged",
            "l = ctypes.CDLL(None); n = l.syscall(323, 1)\nassert n >= 0",
            "file-kind",
            "blocker",
        ),
        (
            "--privileged",
            "p = ctypes.create_string_buffer(120)\nn = ctypes.CDLL(None).syscall(425, 8, p)\nassert n >= 0",
            "io-uring",
            "blocker",
        ),
    ];
    // The other ends of unix sockets: one that stays, and one that gives away a file of the host's.
    std::fs::write(
        host.root().join("var/tmp/share/outside.py"),
        "import socket\ns, g = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)\n\
         g.bind('/var/tmp/share/gives')\ns.bind('/var/tmp/share/outside')\ng.listen()\ns.listen()\n\
         f, kept = open('/etc/hostname'), []\n\
         import threading\nthreading.Thread(target=lambda: kept.append(s.accept())).start()\n\
         c = g.accept()[0]\nsocket.send_fds(c, [b'x'], [f.fileno()])\nc.close()\n",
    )?;
    let _outside: Job = host.spawn("exec python3 /var/tmp/share/outside.py")?;
    host.wait_until("it listens", |host| host.root().join("var/tmp/share/outside").exists())?;
    for (options, program, name, severity) in cases {
        let probe = format!("import ctypes, os, socket, fcntl\n{program}");
        std::fs::write(host.root().join("var/tmp/share/probe.py"), probe)?;
        if !program.contains("AF_UNIX")
            && !host.output("cd /var/tmp/share && python3 probe.py")?.status.success()
        {
            skip(&format!("{name}: this kernel has no such thing"));
            continue;
        }
        python(host, options, program).context(name)?;
        named(host, "t", name, severity)?;
        // It is as it says.
        let dump = host.output("ctr task checkpoint --image-path /var/tmp/images t")?;
        let is_refused = dump.stderr.contains("dump failed");
        ensure!(is_refused == (severity == "blocker" || name == "file-locks"), "{name}: {dump}");
        host.run("rm -rf /var/tmp/images")?;
        remove(host, "t")?;
    }
    Ok(())
}

#[test]
fn what_a_container_is_started_with_is_named_with_its_cure() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    // The plain one: the host's own faults alone.
    let of_host = doctor(host, "")?.0;
    start(host, FERRY, "--null-io", "t", IDLE)?;
    assert_eq!(doctor(host, "t")?.0, of_host);
    host.run("ctr task pause t")?;
    named(host, "t", "status", "warning")?;
    host.run("ctr task resume t; ctr task exec -d --exec-id session t sleep 1000")?;
    named(host, "t", "exec-open", "warning")?;
    let pid = host.run("ctr task ls | awk '/^t / {print $2}'")?.stdout;
    let pid = pid.trim();
    host.run(&format!("kill -STOP {pid}"))?;
    // Frozen by version 1 it could not be traced.
    let first = host.output("grep -q :freezer: /proc/self/cgroup")?.status.success();
    named(host, "t", "stopped", if first { "blocker" } else { "warning" })?;
    host.run(&format!("kill -CONT {pid}; nsenter -t {pid} -n nft add table inet CRIU-1"))?;
    named(host, "t", "criu-rules", "blocker")?;
    let strace = host.spawn(&format!("exec strace -p {pid}"))?;
    until("it is traced", || Ok(doctor(host, "t")?.0.iter().any(|f| f.0 == "traced")))?;
    named(host, "t", "traced", "blocker")?;
    drop(strace);
    host.run(&format!("ip link add cni0 type veth peer name eth0 netns {pid}"))?;
    named(host, "t", "cni", "warning")?;
    remove(host, "t")?;

    for (runtime, options, name, severity) in [
        (REFERENCE, "--null-io", "runtime", "blocker"),
        (
            FERRY,
            "--null-io --label containerd.io/restart.status=running",
            "restart-policy",
            "warning",
        ),
        (FERRY, "--null-io --snapshotter native", "snapshotter", "warning"),
        (
            FERRY,
            "--null-io --mount type=bind,src=/srv,dst=/data,options=rbind:ro",
            "bind-mount",
            "warning",
        ),
        (
            FERRY,
            "--null-io --uidmap 0:100000:65536 --gidmap 0:200000:65536",
            "user-namespace",
            "warning",
        ),
    ] {
        start(host, runtime, options, "t", IDLE)?;
        named(host, "t", name, severity)?;
        host.run("ctr container label t containerd.io/restart.status=")?;
        remove(host, "t")?;
    }

    // Two in one pid namespace.
    start(host, FERRY, "--null-io", "t", IDLE)?;
    let pid = host.run("ctr task ls | awk '/^t / {print $2}'")?.stdout;
    let joined = format!("--null-io --with-ns pid:/proc/{}/ns/pid", pid.trim());
    start(host, FERRY, &joined, "guest", IDLE)?;
    named(host, "t", "namespace-shared", "warning")?;
    named(host, "guest", "namespace-joined", "warning")?;
    remove(host, "guest")?;
    remove(host, "t")?;

    let run = format!("ctr run -t --runtime {FERRY} {BUSYBOX} t {IDLE}");
    let client = host.spawn_at_terminal(&run, (24, 80))?;
    wait_for_status(host, "t", "RUNNING")?;
    named(host, "t", "terminal", "warning")?;
    host.run("ctr task kill -s KILL t")?;
    // It removes the task, and may be a moment late.
    client.wait(SOON)?;
    until("the task is gone", || Ok(status(host, "t")?.is_empty()))?;
    host.run("ctr container rm t").map(drop)
}
