//! What only some kernels can do. `hack/test --vm` brings kernels that can.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::by_hand::any;
use ferry_tests::task::{Task, V3, api, socket};
use ferry_tests::{Host, Lab, skip};
use serde_json::Value;

const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.ferry.v2"];
/// runc with the state of the containers that the shims have started.
const RUNC: &str = "runc --root /run/containerd/runc/default";
/// Has 32 MB that stay as they are, and counts.
const PROGRAM: &str = "import os, time
memory = os.urandom(32 << 20)
count = 0
while True:
    count += 1
    open('/new', 'w').write(str(count))
    os.rename('/new', '/count')
    time.sleep(0.1)
";

fn count(host: &Host) -> Option<u32> {
    let path = "/run/containerd/io.containerd.runtime.v2.task/default/t/rootfs/count";
    host.output(&format!("cat {path}")).ok()?.stdout.trim().parse().ok()
}

fn megabytes(host: &Host, folder: &str) -> Result<u32> {
    Ok(host.run(&format!("du -sm {folder} | cut -f1"))?.stdout.trim().parse()?)
}

/// Restores what is in /tmp/images by runc alone, which has it go on; then nothing of it is left.
fn goes_on_by_runc(host: &Host, dumped: Option<u32>) -> Result<()> {
    host.run(
        "runc --root /run/again restore --detach --image-path /tmp/images \
         --bundle /run/containerd/io.containerd.runtime.v2.task/default/t again \
         </dev/null >/dev/null 2>&1",
    )?;
    host.wait_until("it goes on after the restore", |host| count(host) > dumped)?;
    host.run(
        "runc --root /run/again delete --force again; ctr task rm t; ctr container rm t; \
         rm -r /tmp/pre /tmp/images",
    )
    .map(drop)
}

#[test]
fn a_dump_on_top_of_a_pre_dump_of_criu_holds_what_was_written_since_and_is_restored() -> Result<()>
{
    let lab = Lab::start(1)?;
    let host = lab.host("a");
    if !host.output("criu check --feature mem_dirty_track")?.status.success() {
        skip("CRIU finds no soft-dirty bits on this kernel (CONFIG_MEM_SOFT_DIRTY)");
        return Ok(());
    }
    std::fs::write(host.root().join("tmp/program.py"), PROGRAM)?;
    for runtime in RUNTIMES {
        host.run(&format!(
            "ctr run -d --null-io --net-host --runtime {runtime} \
             docker.io/library/python:latest t python3 -c \"$(cat /tmp/program.py)\""
        ))?;
        host.wait_until("it counts", |host| count(host) >= Some(3))?;
        host.run(&format!("{RUNC} checkpoint --pre-dump --image-path /tmp/pre t"))?;
        let before = count(host);
        host.wait_until("it goes on", |host| count(host) > before)?;
        host.run(&format!("{RUNC} checkpoint --parent-path ../pre --image-path /tmp/images t"))?;
        let (first, second) = (megabytes(host, "/tmp/pre")?, megabytes(host, "/tmp/images")?);
        ensure!(first >= 32 && second < 16, "{runtime}: {first} MB, then {second} MB");

        let dumped = count(host);
        goes_on_by_runc(host, dumped)?;
    }
    Ok(())
}

/// Asks the shim of task `t` for a checkpoint, as a client that knows `parent_path` (containerd 2.4).
fn checkpoint(host: &Host, images: &str, parent: &str, exit: bool) -> Result<()> {
    let bundle = "/run/containerd/io.containerd.runtime.v2.task/default/t";
    let answer = host.run(&format!("cat {bundle}/bootstrap.json"))?.stdout;
    let task = Task::connect(&socket(host, answer.as_bytes())?, V3)?;
    let mut options = any("containerd.runc.v1.CheckpointOptions", &Value::Null);
    options.value = if exit { vec![1 << 3, 1] } else { Vec::new() };
    options.value.extend([10 << 3 | 2, u8::try_from(parent.len())?]);
    options.value.extend(parent.as_bytes());
    let request = api::CheckpointTaskRequest {
        id: "t".into(),
        path: images.into(),
        options: Some(options).into(),
        ..Default::default()
    };
    task.call_for::<api::Empty>("Checkpoint", &request, Duration::from_secs(120))?;
    Ok(())
}

/// By CRIU where the kernel has soft-dirty bits, by ferry where it has not.
#[test]
fn a_dump_through_the_task_api_builds_on_a_pre_dump_of_ferry_and_criu_restores_it() -> Result<()> {
    let lab = Lab::start(1)?;
    let host = lab.host("a");
    std::fs::write(host.root().join("tmp/program.py"), PROGRAM)?;
    host.run(
        "ctr run -d --null-io --net-host --runtime io.containerd.ferry.v2 \
         docker.io/library/python:latest t python3 -c \"$(cat /tmp/program.py)\"",
    )?;
    host.wait_until("it counts", |host| count(host) >= Some(3))?;
    let soft_dirty = host.output("criu check --feature mem_dirty_track")?.status.success();
    for parent in [None, Some("/tmp/pre/1")] {
        let made = host.run("ferry predump t --folder /tmp/pre --json")?.stdout;
        let made: Value = serde_json::from_str(&made).context(made)?;
        ensure!(made["by_criu"] == soft_dirty && made["parent"] == Value::from(parent), "{made}");
    }
    let before = count(host);
    host.wait_until("it goes on", |host| count(host) > before)?;
    ensure!(checkpoint(host, "/tmp/no", "../pre/1", false).is_err(), "not the last one");
    ensure!(count(host) > before && !host.root().join("tmp/no/pstree.img").exists());
    checkpoint(host, "/tmp/images", "../pre/2", true)?;
    let dumped = count(host);
    host.wait_until("it has ended", |host| {
        host.output("ctr task ls").is_ok_and(|tasks| tasks.stdout.contains("STOPPED"))
    })?;
    let first = megabytes(host, "/tmp/pre/1")?;
    let others = [megabytes(host, "/tmp/pre/2")?, megabytes(host, "/tmp/images")?];
    ensure!(first >= 32 && others.iter().all(|size| *size < 16), "{first} MB, then {others:?}");
    let link = |folder: &str| std::fs::read_link(host.root().join(folder).join("parent"));
    ensure!(link("tmp/images")? == Path::new("../pre/2"));
    ensure!(link("tmp/pre/2")? == Path::new("../1"));

    goes_on_by_runc(host, dumped)
}
