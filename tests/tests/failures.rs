//! What a checkpoint leaves that fails: the container as it was, its clients, and an error that helps.

use anyhow::{Context, Result, ensure};
use ferry_tests::counter::Counter;
use ferry_tests::ctr::{FERRY, IDLE, PYTHON, SOON, remove, start, status, until};
use ferry_tests::tally::refused;
use ferry_tests::versions::can_checkpoint;
use ferry_tests::{Host, Job, skip, task_lab};

/// Where CRIU cannot write one of its images.
const IMAGES: &str = "/var/tmp/images";
/// Whether container t stands still, on cgroup v1 and v2.
const FREEZER: &str = "cat /sys/fs/cgroup/freezer/default/t/freezer.state 2>/dev/null || \
                       cat /sys/fs/cgroup/default/t/cgroup.freeze";
/// Accepts at a socket that the container has in a folder of the host's, and keeps the connection.
const OUTSIDE: &str = "import socket, time
s = socket.socket(socket.AF_UNIX)
s.bind('/var/tmp/share/outside')
s.listen()
kept = []
while True:
    kept.append(s.accept())
";

#[test]
fn a_container_that_ran_runs_and_one_that_was_paused_is_paused() -> Result<()> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(());
    }
    let lab = task_lab()?;
    let host = lab.host("a");
    for (state, exit) in
        [("RUNNING", ""), ("RUNNING", "--exit"), ("PAUSED", ""), ("PAUSED", "--exit")]
    {
        let when = format!("{state} {exit}");
        start(host, FERRY, "--net-host --null-io", "t", "nc -ll -p 7007 -e cat")?;
        host.wait_until("it listens", |host| {
            host.output("ss -Hltn sport = 7007").is_ok_and(|o| !o.stdout.is_empty())
        })?;
        let mut client = Counter::start(lab.client(), host, 7007, "{}")?;
        let is_paused = state == "PAUSED";
        if is_paused {
            host.run("ctr task pause t")?;
        }
        let frozen = host.run(FREEZER)?.stdout;
        host.run(&format!("mkdir -p {IMAGES}/core-1.img"))?;
        let refusal = refused(
            host,
            &format!("timeout 60 ctr task checkpoint {exit} --image-path {IMAGES} t"),
        )?;
        ensure!(refusal.contains("dump failed"), "{when}: {refusal}");
        ensure!(status(host, "t")? == state, "{when}: it is {}", status(host, "t")?);
        let now = host.run(FREEZER)?.stdout;
        ensure!(now == frozen, "{when}: the freezer says {now}, and said {frozen}");
        let tables = host.run("nft list tables")?.stdout;
        ensure!(tables.trim().is_empty(), "{when}: {tables}");
        if is_paused {
            // Long enough for what the client sends again.
            std::thread::sleep(std::time::Duration::from_secs(2));
            ensure!(!client.has_ended()?, "{when}: {}", client.stderr());
            host.run("ctr task resume t")?;
        }
        client.goes_on().context(when)?;
        client.stop()?;
        remove(host, "t")?;
        host.run(&format!("rm -rf {IMAGES}"))?;
    }
    Ok(())
}

/// Starts a python that runs `program` and then waits.
fn python(host: &Host, options: &str, program: &str) -> Result<()> {
    std::fs::write(
        host.root().join("var/tmp/share/program.py"),
        format!("import ctypes, socket, time\n{program}\nopen('/ready', 'w')\ntime.sleep(10000)\n"),
    )?;
    host.run(&format!(
        "ctr run -d --null-io --net-host {options} \
         --mount type=bind,src=/var/tmp/share,dst=/srv,options=rbind:rw --runtime {FERRY} {PYTHON} t \
         python3 /srv/program.py"
    ))?;
    until("the program is ready", || {
        Ok(host.output("ctr task exec --exec-id r t test -e /ready")?.status.success())
    })
}

#[test]
fn a_cure_that_is_known_is_told_to_whoever_has_asked() -> Result<()> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(());
    }
    let lab = task_lab()?;
    let host = lab.host("a");
    host.run("mkdir /var/tmp/share")?;
    std::fs::write(host.root().join("var/tmp/share/outside.py"), OUTSIDE)?;
    let _outside: Job = host.spawn("exec python3 /var/tmp/share/outside.py")?;
    host.wait_until("it listens", |host| host.root().join("var/tmp/share/outside").exists())?;
    let cases = [
        (
            "",
            "s = socket.socket(socket.AF_UNIX); s.connect('/srv/outside')",
            "a unix socket is connected to a process outside",
        ),
        (
            "--privileged",
            "n = ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120))\nassert n >= 0",
            "the program uses io_uring, which CRIU cannot dump",
        ),
        (
            "--privileged",
            "n = ctypes.CDLL(None).syscall(323, 1)\nassert n >= 0",
            "the program uses userfaultfd, which CRIU cannot dump",
        ),
    ];
    for (options, program, cure) in cases {
        if !options.is_empty() {
            std::fs::write(
                host.root().join("var/tmp/share/probe.py"),
                format!("import ctypes\n{program}"),
            )?;
            if !host.output("python3 /var/tmp/share/probe.py")?.status.success() {
                skip(&format!("{cure}: this kernel has no such thing"));
                continue;
            }
        }
        python(host, options, program).context(cure)?;
        for command in [
            format!("ctr task checkpoint --image-path {IMAGES} t"),
            format!("ctr task checkpoint --exit --image-path {IMAGES} t"),
            "ferry checkpoint t failed".to_owned(),
            "ferry checkpoint t failed --exit".to_owned(),
        ] {
            let refusal = refused(host, &format!("timeout {} {command}", SOON.as_secs()))?;
            ensure!(refusal.contains(cure), "{command}: no {cure:?} in {refusal}");
            ensure!(status(host, "t")? == "RUNNING", "{command}: it is {}", status(host, "t")?);
            host.run(&format!("ctr task exec --exec-id e t true; rm -rf {IMAGES}"))?;
        }
        let images = host.run("ctr image ls -q")?.stdout;
        ensure!(!images.lines().any(|name| name == "failed"), "half an image: {images}");
        remove(host, "t")?;
    }
    Ok(())
}

#[test]
fn a_checkpoint_of_a_better_processor_is_refused_before_anything_changes() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    start(host, FERRY, "--null-io", "t", IDLE)?;
    host.run("ferry checkpoint t snap --exit")?;
    let before = host.run("ctr container ls; ctr snapshot ls; ctr lease ls; ls /run/ferry")?.stdout;
    // Every processor that this runs on has it, and its programs would be killed without it.
    host.run(
        "sed 's/ sse2 / /' /proc/cpuinfo >/tmp/cpuinfo; mount --bind /tmp/cpuinfo /proc/cpuinfo",
    )?;
    let refusal = refused(host, "ferry restore snap")?;
    ensure!(refusal.contains("lacks sse2"), "{refusal}");
    host.run("umount /proc/cpuinfo")?;
    let after = host.run("ctr container ls; ctr snapshot ls; ctr lease ls; ls /run/ferry")?.stdout;
    ensure!(after == before, "before: {before}; after: {after}");
    host.run("ferry restore snap")?;
    ensure!(status(host, "t")? == "RUNNING", "it is {}", status(host, "t")?);
    remove(host, "t")?;
    host.run("ferry discard snap").map(drop)
}
