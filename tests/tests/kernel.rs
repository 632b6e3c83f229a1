//! What only some kernels can do. `hack/test --vm` brings kernels that can.

use anyhow::{Result, ensure};
use ferry_tests::{Host, Lab, skip};

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
        host.run(
            "runc --root /run/again restore --detach --image-path /tmp/images \
             --bundle /run/containerd/io.containerd.runtime.v2.task/default/t again \
             </dev/null >/dev/null 2>&1",
        )?;
        host.wait_until("it goes on after the restore", |host| count(host) > dumped)?;
        host.run(
            "runc --root /run/again delete --force again; ctr task rm t; ctr container rm t; \
             rm -r /tmp/pre /tmp/images",
        )?;
    }
    Ok(())
}
