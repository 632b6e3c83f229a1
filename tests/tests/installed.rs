//! How the shim is installed and confined.

use anyhow::Result;
use ferry_tests::ctr::{
    FERRY, IDLE, REFERENCE, RUNTIMES, assert_nothing_left, remove, shims, start,
};
use ferry_tests::{Host, task_lab};

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
    host.run("cd /usr/local/bin && ln -s containerd-shim-ferry-v2 containerd-shim-runc-v2")?;
    start(host, REFERENCE, "", "t", IDLE)?;
    let pids = shims(host)?;
    let exe = host.run(&format!("readlink /proc/{}/exe", pids[0]))?.stdout;
    assert!(exe.ends_with("/containerd-shim-ferry-v2\n"), "{exe}");
    host.run("ctr task exec --exec-id e t true")?;
    let info =
        host.run("containerd-shim-runc-v2 -info </dev/null | grep -ac io.containerd.runc.v2")?;
    assert_eq!(info.stdout, "1\n");
    assert_eq!(remove(host, "t")?, 137);
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
