//! Containers whose cgroups are not theirs alone, or in which their processes have gone further in.

use anyhow::{Result, ensure};
use ferry_tests::containers::edit_spec;
use ferry_tests::ctr::{BUSYBOX, IDLE, RUNTIMES, remove, start, status, until};
use ferry_tests::versions::{self, Runc, can_checkpoint};
use ferry_tests::{skip, task_lab};
use serde_json::json;

#[test]
fn nobody_is_ended_who_was_in_the_cgroups_before() -> Result<()> {
    if versions::chosen()?.1 == Runc::Crun {
        skip("crun itself ends all that is in a container's cgroups");
        return Ok(());
    }
    let lab = task_lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        // Of the host's own.
        host.run(
            "for c in /sys/fs/cgroup /sys/fs/cgroup/*/; do \
             [ ! -e $c/cgroup.procs ] || mkdir -p $c/busy; done",
        )?;
        let guest = host.spawn(
            "for c in /sys/fs/cgroup/busy /sys/fs/cgroup/*/busy; do \
             [ -e $c/cgroup.procs ] && echo $$ >$c/cgroup.procs; done; exec sleep 60",
        )?;
        until("it is in its cgroups", || {
            Ok(host
                .output("cat /sys/fs/cgroup/busy/cgroup.procs /sys/fs/cgroup/*/busy/cgroup.procs")?
                .stdout
                .lines()
                .count()
                > 0)
        })?;
        let ran = host
            .output(&format!("ctr run --rm --cgroup /busy --runtime {runtime} {BUSYBOX} t true"))?;
        println!("{runtime}: {ran}");
        std::thread::sleep(std::time::Duration::from_millis(500));
        ensure!(!guest.pids().is_empty(), "{runtime}: what was in the cgroup has ended: {ran}");
        host.output("ctr task rm -f t; ctr container rm t")?;
        guest.stop()?;
        host.run("rmdir /sys/fs/cgroup/busy /sys/fs/cgroup/*/busy 2>/dev/null; true")?;
    }
    Ok(())
}

#[test]
fn a_restore_into_the_cgroups_of_a_running_container_does_not_end_that() -> Result<()> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(());
    }
    let lab = task_lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        start(host, runtime, "", "t", IDLE)?;
        host.run("ctr container checkpoint --task --rw --image t image")?;
        // It has the settings of the first one, the path of its cgroups among them.
        let second = host.output("ctr container restore --live --rw u image")?;
        println!("{runtime}: {second}");
        // Before 1.2 runc lets it in there, and ends both when it is to end one.
        if !second.status.success() {
            host.output("ctr task rm -f u; ctr container rm u")?;
        }
        std::thread::sleep(std::time::Duration::from_millis(500));
        ensure!(status(host, "t")? == "RUNNING", "{runtime}: it has ended: {second}");
        host.run("ctr task exec --exec-id e t true")?;
        remove(host, "t")?;
        host.output("ctr task rm -f u; ctr container rm u")?;
        host.run("ctr image rm --sync image")?;
    }
    Ok(())
}

#[test]
fn an_init_that_has_gone_into_a_cgroup_of_its_own_goes_on_after_a_pause() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        host.run(&format!(
            "ctr container create --runtime {runtime} {BUSYBOX} t sh -c \
             'while :; do n=$((n + 1)); echo $n >/n; sleep 0.02; done'"
        ))?;
        edit_spec(host, "t", |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut();
            let namespaces = namespaces.expect("a spec of containerd's has namespaces");
            if !namespaces.contains(&json!({"type": "cgroup"})) {
                namespaces.push(json!({"type": "cgroup"}));
            }
        })?;
        host.run("ctr task start -d t")?;
        // As systemd does, and whoever runs containers in a container.
        host.run(
            "pid=$(ctr task ls | awk '$1 == \"t\" {print $2}'); \
             for c in /sys/fs/cgroup/freezer/default/t /sys/fs/cgroup/default/t; do \
             [ -d $c ] && mkdir $c/inside && echo $pid >$c/inside/cgroup.procs; done; \
             grep -q inside /proc/$pid/cgroup",
        )?;
        host.run("ctr task pause t && ctr task resume t")?;
        let count = || {
            let read = "ctr task exec --exec-id e t cat /n";
            host.output(read).map(|output| output.stdout.trim().to_owned())
        };
        let before = count()?;
        until("it goes on", || count().map(|now| !now.is_empty() && now != before))?;
        remove(host, "t")?;
    }
    Ok(())
}
