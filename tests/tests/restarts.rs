//! containerd that goes away and comes back: containers go on meanwhile, and what ends meanwhile
//! keeps its exit code until it is deleted.

use anyhow::{Context, Result, ensure};
use ferry_tests::ctr::{
    BUSYBOX, FERRY, REFERENCE, assert_nothing_left, remove, shims, status, wait_for_status,
};
use ferry_tests::{Host, table, task_lab};

/// Ends containerd with `signal` and keeps the host from starting it again.
fn send_away(host: &Host, signal: &str) -> Result<()> {
    host.run(&format!(
        "mount --bind /dev/null /usr/bin/containerd; kill -{signal} $(pgrep -x containerd)"
    ))?;
    host.wait_until("containerd has ended", |h| {
        h.output("pgrep -x containerd").is_ok_and(|o| !o.status.success())
    })
}

/// Lets it start again, and waits until it answers.
fn let_back(host: &Host) -> Result<()> {
    host.run("umount /usr/bin/containerd")?;
    host.wait_until("containerd answers", |h| {
        h.output("timeout 5 ctr task ls").is_ok_and(|o| o.status.success())
    })
}

fn pid(host: &Host, id: &str) -> Result<String> {
    let list = host.run("ctr task ls")?.stdout;
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
    let pid = line.and_then(|line| line.split_whitespace().nth(1));
    pid.map(str::to_owned).with_context(|| format!("no task {id} in {list}"))
}

/// Waits until the log has more lines than it has now.
fn log_goes_on(host: &Host, log: &str) -> Result<()> {
    let lines = |h: &Host| -> Result<usize> {
        let count = h.run(&format!("wc -l <{log}"))?.stdout;
        count.trim().parse().with_context(|| format!("{count:?} is no number"))
    };
    let before = lines(host)?;
    host.wait_until("the log has more lines", |h| lines(h).is_ok_and(|now| now > before + 2))
}

fn survives(host: &Host, runtime: &str, signal: &str) -> Result<()> {
    let run = |options: &str, id: &str, script: &str| {
        host.run(&format!(
            "ctr run -d --runtime {runtime} {options} {BUSYBOX} {id} sh -c '{script}'"
        ))
    };
    run("--log-uri file:///tmp/stays.log", "stays", "while :; do echo tick; usleep 50000; done")?;
    let stays = shims(host)?[0];
    run("--null-io", "ends", "until [ -e /go ]; do usleep 50000; done; exit 7")?;
    run("--null-io", "killed", "while :; do sleep 1; done")?;
    let (all, ends, killed) = (shims(host)?, pid(host, "ends")?, pid(host, "killed")?);
    ensure!(all.len() == 3, "shims: {all:?}");

    send_away(host, signal)?;
    log_goes_on(host, "/tmp/stays.log")?;
    let bundle = "/run/containerd/io.containerd.runtime.v2.task/default/ends";
    host.run(&format!("touch {bundle}/rootfs/go; kill -9 {killed}"))?;
    host.wait_until("the tasks have ended", |h| {
        let gone = format!("! grep -q 'State:.[^Z]' /proc/{ends}/status /proc/{killed}/status");
        h.output(&gone).is_ok_and(|o| o.status.success())
    })?;
    let_back(host)?;

    if runtime == FERRY {
        wait_for_status(host, "ends", "STOPPED")?;
        wait_for_status(host, "killed", "STOPPED")?;
        let codes = (remove(host, "ends")?, remove(host, "killed")?);
        ensure!(codes == (7, 137), "exit codes are lost: {codes:?}");
    } else {
        // The reference says that it has no process. containerd takes it for left behind when it
        // starts: it has it delete its container, and ends it.
        host.wait_until("what has ended is gone", |h| {
            shims(h).is_ok_and(|now| now == [stays])
                && status(h, "ends").is_ok_and(|now| now.is_empty())
                && status(h, "killed").is_ok_and(|now| now.is_empty())
        })?;
        host.run("ctr container rm ends killed")?;
    }
    wait_for_status(host, "stays", "RUNNING")?;
    log_goes_on(host, "/tmp/stays.log")?;
    let exec = host.run("ctr task exec --exec-id e stays echo hello")?;
    ensure!(exec.stdout == "hello\n", "{exec}");
    // What happens from now on is heard again.
    host.run("ctr task pause stays; ctr task resume stays; ctr task kill -s KILL stays")?;
    wait_for_status(host, "stays", "STOPPED")?;
    ensure!(remove(host, "stays")? == 137, "the exit code is lost");
    host.run("rm /tmp/stays.log")?;
    assert_nothing_left(host)
}

#[test]
fn containers_outlive_a_restart_of_containerd_and_no_exit_code_is_lost() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    for signal in ["KILL", "TERM"] {
        for runtime in [REFERENCE, FERRY] {
            survives(host, runtime, signal)
                .with_context(|| format!("{runtime}, containerd ended by SIG{signal}"))?;
        }
        let case = format!("ended by SIG{signal}");
        table::row("restart of containerd", &case, "goes on, codes kept", "goes on, codes lost")?;
    }
    Ok(())
}
