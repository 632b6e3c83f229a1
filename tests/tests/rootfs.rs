//! Root file systems as the snapshotters of containerd hand them over: binds, overlays, and file
//! systems in files, which containerd 2.2 and later partly mount by themselves. The same with ferry and
//! with the reference.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use ferry_tests::ctr::{IDLE, RUNTIMES, assert_nothing_left, remove, start, until};
use ferry_tests::layers::FILE_SYSTEMS;
use ferry_tests::versions::{Containerd, chosen, task_lab_over};
use ferry_tests::{Host, Lab, skip, table};

/// Turns on the snapshotters that need more than a folder.
const CONFIG: &str = r#"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "/var/lib/blockfile"
  scratch_file = "/var/lib/scratch"
  fs_type = "ext4"
  mount_options = []
  recreate_scratch = true
"#;

fn lab() -> Result<Lab> {
    let lab = task_lab_over(&[&FILE_SYSTEMS])?;
    let host = lab.host("a");
    let config = host.root().join("etc/containerd/config.toml");
    let text = std::fs::read_to_string(&config).context("read containerd's configuration")?;
    let is_off =
        |line: &&str| line.contains("snapshotter.v1.blockfile") || line.contains(".erofs\"");
    let text: Vec<&str> = text.lines().filter(|line| !is_off(line)).collect();
    std::fs::write(&config, text.join("\n") + CONFIG).context("configure containerd")?;
    // Devices are the machine's; a host has no file of theirs.
    host.run(
        "mknod /dev/loop-control c 10 237; for n in $(seq 0 31); do mknod /dev/loop$n b 7 $n; done
         truncate -s 64M /var/lib/scratch && mke2fs -q -t ext4 /var/lib/scratch
         kill $(pgrep -x containerd)",
    )?;
    until("containerd has its snapshotters", || {
        let plugins = host.output("timeout 5 ctr plugins ls")?.stdout;
        let works = |line: &str| line.contains("blockfile") && line.contains(" ok ");
        Ok(plugins.lines().any(works))
    })?;
    Ok(lab)
}

/// Devices of files on this machine that `host` has attached.
fn devices(host: &Host) -> Result<String> {
    Ok(host.run("losetup --list --noheadings --output BACK-FILE | grep /var/lib/ || true")?.stdout)
}

#[test]
fn every_snapshotter_gives_a_root_that_is_written_to_and_gone_afterwards() -> Result<()> {
    if !Path::new("/dev/loop-control").exists() {
        skip("the kernel has no loop devices");
        return Ok(());
    }
    let lab = lab()?;
    let host = lab.host("a");
    let mut snapshotters = vec![("overlayfs", "overlay"), ("native", ""), ("blockfile", "ext4")];
    let kernel = std::fs::read_to_string("/proc/filesystems").context("list file systems")?;
    match kernel.contains("\terofs\n") {
        // 1.7 has no such snapshotter.
        true if chosen()?.0 == Containerd::V1_7 => {}
        true => snapshotters.push(("erofs", "overlay")),
        false => skip("the kernel has no erofs; the other snapshotters are tried"),
    }
    for (snapshotter, kind) in snapshotters {
        for runtime in RUNTIMES {
            let options = format!("--snapshotter {snapshotter}");
            let what = format!("{runtime} with {snapshotter}");
            start(host, runtime, &options, "t", IDLE).with_context(|| what.clone())?;
            let seen = host.run(
                "ctr task exec --exec-id e t \
                 sh -c 'echo new >/new && cat /new && awk \"\\$2 == \\\"/\\\" {print \\$3}\" /proc/mounts'",
            )?;
            let seen: Vec<_> = seen.stdout.lines().collect();
            ensure!(seen[0] == "new" && (kind.is_empty() || seen[1] == kind), "{what}: {seen:?}");
            remove(host, "t").with_context(|| what.clone())?;
            assert_nothing_left(host).with_context(|| what.clone())?;
        }
        until("no device is left", || Ok(devices(host)?.is_empty()))
            .with_context(|| format!("{snapshotter}: {:?}", devices(host)))?;
        table::row("root file system", snapshotter, "mounted, gone", "mounted, gone")?;
    }
    Ok(())
}
