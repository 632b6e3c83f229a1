//! How the shim is installed and confined.

use anyhow::{Context, Result, ensure};
use ferry_tests::ctr::{
    FERRY, IDLE, REFERENCE, RUNTIMES, assert_nothing_left, remove, shims, start, until,
    wait_for_status,
};
use ferry_tests::tally::{COUNTS, counted, counts_on, end};
use ferry_tests::versions::{self, Containerd, can_checkpoint};
use ferry_tests::{Host, skip, task_lab};

/// What the shim is called to take the place of containerd's own.
const IN_ITS_PLACE: &str =
    "cd /usr/local/bin && ln -s containerd-shim-ferry-v2 containerd-shim-runc-v2";

/// What the kernel says of the only shim on the host.
fn of_shim(host: &Host, file: &str) -> Result<String> {
    let pids = shims(host)?;
    assert_eq!(pids.len(), 1, "{pids:?}");
    Ok(host.run(&format!("cat /proc/{}/{file}", pids[0]))?.stdout)
}

#[test]
fn under_the_name_of_containerd_s_own_shim_it_takes_its_place() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    host.run(IN_ITS_PLACE)?;
    start(host, REFERENCE, "", "t", IDLE)?;
    is_ferry_s(host)?;
    host.run("ctr task exec --exec-id e t true")?;
    let info =
        host.run("containerd-shim-runc-v2 -info </dev/null | grep -ac io.containerd.runc.v2")?;
    assert_eq!(info.stdout, "1\n");
    assert_eq!(remove(host, "t")?, 137);
    assert_nothing_left(host)
}

/// Fails unless the only shim is ours.
fn is_ferry_s(host: &Host) -> Result<()> {
    // One that was told to end has answered before it has ended.
    until("there is one shim", || Ok(shims(host)?.len() == 1))?;
    let exe = host.run("readlink /proc/$(pgrep containerd-shim)/exe")?.stdout;
    assert!(exe.ends_with("/containerd-shim-ferry-v2\n"), "{exe}");
    Ok(())
}

#[test]
fn in_that_place_it_checkpoints_with_exit_and_restores_with_files_and_memory() -> Result<()> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(());
    }
    let lab = task_lab()?;
    let host = lab.host("a");
    host.run(IN_ITS_PLACE)?;
    start(host, REFERENCE, "--null-io", "counter", &format!("sh -c '{COUNTS}'"))?;
    // So far that one which began anew would be seen.
    until("it has counted far", || Ok(counted(host, "counter")? > 2000))?;

    // By the task alone, which ends: the container is still there, and goes on in it.
    let name = host.run("ctr task checkpoint --exit counter")?.stdout;
    wait_for_status(host, "counter", "STOPPED")?;
    host.run(&format!("ferry restore {} --id counter", name.trim()))?;
    ensure!(counted(host, "counter")? > 2000, "it has begun anew");
    counts_on(host, "counter").context("after ctr task checkpoint --exit")?;
    is_ferry_s(host)?;

    if versions::chosen()?.0 == Containerd::V1_7 {
        // It leaves the dump out of every checkpoint but the first one, with its own shim too.
        end(host, "counter")?;
        return assert_nothing_left(host);
    }
    // With all that another container is made from.
    host.run("ctr container checkpoint --task --rw --image counter kept")?;
    counts_on(host, "counter").context("it runs on")?;
    end(host, "counter")?;
    host.run("timeout 30 ctr container restore --rw --live again kept </dev/null")?;
    ensure!(counted(host, "again")? > 2000, "it has begun anew");
    counts_on(host, "again").context("after ctr container restore")?;
    is_ferry_s(host)?;
    end(host, "again")?;
    assert_nothing_left(host)
}

#[test]
fn a_shim_is_killed_before_containerd_when_memory_is_short() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    let containerd = host.run("cat /proc/$(pgrep -x containerd)/oom_score_adj")?.stdout;
    let containerd: i32 = containerd.trim().parse()?;
    for runtime in RUNTIMES {
        start(host, runtime, "", "t", IDLE)?;
        let score: i32 = of_shim(host, "oom_score_adj")?.trim().parse()?;
        assert_eq!(score, containerd + 1, "{runtime}");
        remove(host, "t")?;
        assert_nothing_left(host)?;
    }
    Ok(())
}

#[test]
fn a_shim_lives_in_the_cgroup_that_its_options_name() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    host.run(
        "echo 'ShimCgroup = \"/shims\"' >/tmp/options.toml; \
         for h in /sys/fs/cgroup/memory /sys/fs/cgroup/pids; do [ ! -d $h ] || mkdir $h/shims; done; \
         [ -d /sys/fs/cgroup/memory ] || mkdir /sys/fs/cgroup/shims",
    )?;
    // ctr gives a file of options to no runtime that it knows, so not with the reference.
    let options = "--runtime-config-path /tmp/options.toml";
    start(host, FERRY, options, "t", IDLE)?;
    let cgroups = of_shim(host, "cgroup")?;
    assert!(cgroups.lines().any(|line| line.ends_with(":/shims")), "{cgroups}");
    remove(host, "t")?;
    host.run("sed -i s/shims/missing/ /tmp/options.toml")?;
    let refused = host.output(&format!(
        "ctr run -d --runtime {FERRY} {options} docker.io/library/busybox:latest t true"
    ))?;
    assert!(refused.stderr.contains("/missing: there is no such cgroup"), "{refused}");
    assert_nothing_left(host)
}
