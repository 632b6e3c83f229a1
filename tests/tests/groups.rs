//! Containers that share a shim: those of a pod, and those of a named group.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::by_hand::ByHand;
use ferry_tests::ctr::{
    BUSYBOX, FERRY, IDLE, RUNTIMES, SOON, assert_nothing_left, remove, shims, start, status,
    wait_for_status,
};
use ferry_tests::task::{V3, api};
use ferry_tests::{Host, task_lab};

const GROUP: &str = "--annotation io.containerd.runc.v2.group=g";
const POD: &str = "--annotation io.kubernetes.cri.sandbox-id=p";

/// Fails if ferry has left something. The reference leaves the socket of a group whose first bundle is
/// gone, and of a shim that was killed.
fn check_what_is_left(host: &Host, runtime: &str) -> Result<()> {
    if runtime == FERRY {
        return assert_nothing_left(host);
    }
    host.wait_until("the shims have ended", |host| {
        shims(host).is_ok_and(|shims| shims.is_empty())
    })?;
    host.run("rm -f /run/containerd/s/*").map(drop)
}

fn exec(host: &Host, id: &str) -> Result<String> {
    Ok(host.run(&format!("ctr task exec --exec-id e {id} hostname"))?.stdout)
}

#[test]
fn a_group_has_one_shim_until_its_last_container_is_gone() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        for annotation in [GROUP, POD] {
            let long_name = "x".repeat(60);
            for id in ["one", "two", &long_name] {
                start(host, runtime, annotation, id, IDLE)?;
            }
            start(host, runtime, "", "alone", IDLE)?;
            assert_eq!(shims(host)?.len(), 2, "{runtime}");
            remove(host, "alone")?;
            // Its bundle is where the shim was started.
            remove(host, "one")?;
            // One that was told to end has answered before it has ended.
            host.wait_until("one shim is left", |host| {
                shims(host).is_ok_and(|shims| shims.len() == 1)
            })?;
            exec(host, "two")?;
            host.run("ctr task pause two && ctr task resume two")?;
            // Joins, and is told apart from the one that had its name.
            start(host, runtime, annotation, "one", IDLE)?;
            assert_eq!(shims(host)?.len(), 1, "{runtime}");
            for id in ["two", &long_name, "one"] {
                exec(host, id)?;
                remove(host, id)?;
            }
            check_what_is_left(host, runtime)?;
        }
    }
    Ok(())
}

#[test]
fn a_group_whose_shim_dies_is_cleaned_up_as_a_whole() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        for id in ["one", "two"] {
            start(host, runtime, GROUP, id, IDLE)?;
        }
        for shim in shims(host)? {
            host.run(&format!("kill -9 {shim}"))?;
        }
        for id in ["one", "two"] {
            host.wait_until("the task has ended", |host| {
                status(host, id).is_ok_and(|status| status != "RUNNING")
            })?;
            host.output(&format!("ctr task rm -f {id}; ctr container rm {id}"))?;
        }
        host.wait_until("its processes have ended", |host| {
            host.output("pgrep -x tail").is_ok_and(|o| !o.status.success())
        })?;
        // The next one of the group gets a new shim, whatever the old one has left.
        start(host, runtime, GROUP, "three", IDLE)?;
        exec(host, "three")?;
        remove(host, "three")?;
        check_what_is_left(host, runtime)?;
    }
    Ok(())
}

/// Has a host's runc do `first` before what it is asked for.
fn wrap_runc(host: &Host, first: &str) -> Result<()> {
    // What is there may be a link: it goes first, since from out here it leads elsewhere.
    let runc = host.run("readlink -f $(command -v runc); rm -f /usr/local/sbin/runc")?.stdout;
    let script = format!("#!/bin/sh\n{first}\nexec {} \"$@\"\n", runc.trim());
    std::fs::write(host.root().join("usr/local/sbin/runc"), script)?;
    host.run("chmod +x /usr/local/sbin/runc").map(drop)
}

/// The reference gives up: the freezer of a busy machine may take longer than runc waits for it.
#[test]
fn a_freeze_that_fails_is_tried_again() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    wrap_runc(
        host,
        "case \"$*\" in *pause*) echo x >>/tmp/asked; [ $(wc -l </tmp/asked) -gt $(cat /tmp/fails) ] || \
         { echo 'unable to freeze' >&2; exit 1; } ;; esac",
    )?;
    start(host, FERRY, "", "t", IDLE)?;
    host.run("echo 2 >/tmp/fails; ctr task pause t")?;
    assert_eq!(status(host, "t")?, "PAUSED");
    host.run("ctr task resume t; rm /tmp/asked; echo 9 >/tmp/fails")?;
    let refused = host.output("ctr task pause t")?;
    ensure!(refused.stderr.contains("unable to freeze"), "{refused}");
    assert_eq!(status(host, "t")?, "RUNNING");
    assert_eq!(host.run("wc -l </tmp/asked")?.stdout.trim(), "3");
    remove(host, "t")?;
    assert_nothing_left(host)
}

#[test]
fn what_takes_long_for_one_container_does_not_hold_up_another() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    wrap_runc(host, "case \"$*\" in *pause*slow*) sleep 5 ;; esac")?;
    for runtime in RUNTIMES {
        for id in ["slow", "quick"] {
            start(host, runtime, GROUP, id, IDLE)?;
        }
        assert_eq!(shims(host)?.len(), 1, "{runtime}");
        let mut pause = host.spawn("exec ctr task pause slow")?;
        until_asked(host, "pause")?;
        exec(host, "quick")?;
        ensure!(!pause.ended()?, "{runtime}: another container has waited for a slow one");
        wait_for_status(host, "slow", "PAUSED")?;
        host.run("ctr task resume slow")?;
        for id in ["slow", "quick"] {
            remove(host, id)?;
        }
        check_what_is_left(host, runtime)?;
    }
    Ok(())
}

/// Waits until a host's runc is asked for `verb`.
fn until_asked(host: &Host, verb: &str) -> Result<()> {
    host.wait_until(&format!("runc is asked to {verb}"), |host| {
        let asked = host.output(&format!("pgrep -f 'sbin/[r]unc.* {verb}'"));
        asked.is_ok_and(|o| o.status.success())
    })
}

#[test]
fn a_kill_does_not_wait_for_an_exec_whose_start_hangs() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    wrap_runc(
        host,
        "case \"$*\" in *\" exec \"*) while [ -e /tmp/hang ]; do sleep 0.1; done ;; esac",
    )?;
    start(host, FERRY, "", "t", IDLE)?;
    host.run("touch /tmp/hang")?;
    let exec = host.spawn("exec ctr task exec --exec-id e t true")?;
    until_asked(host, "exec")?;
    // It may not begin before the start is over.
    let mut pause = host.spawn("exec ctr task pause t")?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(!pause.ended()?, "a pause in the middle of an exec's start");
    host.run("timeout 5 ctr task kill -s KILL t").context("the kill waits")?;
    host.run("rm /tmp/hang")?;
    exec.wait(SOON)?;
    pause.wait(SOON)?;
    wait_for_status(host, "t", "STOPPED")?;
    assert_eq!(remove(host, "t")?, 137);
    assert_nothing_left(host)
}

/// Not with the reference: it answers nothing until its runc has ended.
#[test]
fn a_create_that_is_given_up_leaves_no_shim_and_its_id_is_free() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    wrap_runc(host, "case \"$*\" in *\" create \"*) [ ! -e /tmp/slow ] || sleep 8 ;; esac")?;
    for annotation in ["", GROUP] {
        let others = usize::from(!annotation.is_empty());
        if others > 0 {
            start(host, FERRY, annotation, "other", IDLE)?;
        }
        host.run("touch /tmp/slow")?;
        let run = format!("exec ctr run -d --runtime {FERRY} {annotation} {BUSYBOX} t {IDLE}");
        let run = host.spawn(&run)?;
        until_asked(host, "create")?;
        host.run("pkill -9 -x ctr; rm /tmp/slow")?;
        run.wait(SOON)?;
        // runc goes on for some seconds after containerd has asked the shim to end.
        host.wait_until("runc has ended, and the shim if it has no other container", |host| {
            // Not its own shell.
            let runc = host.output("pgrep -f 'sbin/[r]unc.* create'");
            let ended = runc.is_ok_and(|o| !o.status.success());
            ended && shims(host).is_ok_and(|shims| shims.len() == others)
        })?;
        host.output("ctr container rm t")?;
        start(host, FERRY, annotation, "t", IDLE)?;
        assert_eq!(shims(host)?.len(), 1, "{annotation}");
        exec(host, "t")?;
        remove(host, "t")?;
        if others > 0 {
            exec(host, "other")?;
            remove(host, "other")?;
        }
        assert_nothing_left(host)?;
    }
    Ok(())
}

#[test]
fn a_shim_that_was_told_to_end_takes_no_further_container() -> Result<()> {
    let lab = task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    // Each ends in its own time after the answer.
    for _ in 0..20 {
        let shim = hand.shim("containerd-shim-ferry-v2", "t", V3)?;
        let request = api::ShutdownRequest { id: "t".into(), ..Default::default() };
        shim.task.call::<api::Empty>("Shutdown", &request)?;
        // By it the next start would find this one.
        ensure!(!shim.socket.exists(), "its socket is still there");
        drop(shim);
        hand.clear()?;
    }
    Ok(())
}
