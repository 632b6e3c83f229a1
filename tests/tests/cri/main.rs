//! Pods through containerd's CRI plugin with crictl: the same with the runtime classes `runc`, the
//! reference, and `ferry`.

mod checkpoint;
mod pod;

use anyhow::{Context, Result};
use ferry_tests::ctr::wait_for;
use serde_json::Value;

use pod::{Pod, assert_nothing_left, crictl, lab, state, wait_until_exited};

const CLASSES: [&str; 2] = ["runc", "ferry"];
const IDLE: &str = "echo ready; trap 'exit 3' TERM; while :; do usleep 50000; done";

#[test]
fn the_containers_of_a_pod_share_a_network_and_one_shim() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    for class in CLASSES {
        let pod = Pod::run(host, class)?;
        let server = "while :; do echo here | nc -l -p 7000; done";
        let one = pod.start("one", &format!("({server}) & {IDLE}"), None)?;
        let two = pod.start("two", IDLE, None)?;
        assert_eq!(host.run("pgrep -c containerd-shim")?.stdout, "1\n", "{class}");

        wait_for(host, &format!("crictl exec -s {two} nc 127.0.0.1 7000"), "here")?;
        let address = crictl(host, &format!("exec -s {two} ip -4 addr show eth0"))?;
        assert!(address.contains("10.88."), "{class}: {address}");
        assert_eq!(crictl(host, &format!("exec -s {one} hostname"))?, "pod", "{class}");
        let processes = || crictl(host, &format!("exec -s {two} ps"));
        assert!(processes()?.contains("nc -l"), "{class}: {}", processes()?);

        // One container ends and is replaced while the other one goes on.
        let before = state(host, &two)?["startedAt"].clone();
        crictl(host, &format!("stop --timeout 30 {one}"))?;
        let ended = wait_until_exited(host, &one)?;
        assert_eq!(ended["exitCode"], 3, "{class}: {ended}");
        // What it has left in the pod's process ids goes with it.
        assert!(!processes()?.contains("nc -l"), "{class}: {}", processes()?);
        crictl(host, &format!("rm {one}"))?;
        let three = pod.start("three", IDLE, None)?;
        assert_eq!(host.run("pgrep -c containerd-shim")?.stdout, "1\n", "{class}");
        crictl(host, &format!("exec -s {three} true"))?;
        crictl(host, &format!("exec -s {two} true"))?;
        let now = state(host, &two)?;
        assert_eq!(now["state"], "CONTAINER_RUNNING", "{class}");
        assert_eq!(now["startedAt"], before, "{class}");

        pod.remove()?;
        assert_nothing_left(host).context(class)?;
    }
    Ok(())
}

#[test]
fn a_container_of_a_pod_is_logged_measured_updated_and_entered() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    for class in CLASSES {
        let pod = Pod::run(host, class)?;
        let id = pod.start("one", &format!("echo error >&2; {IDLE}"), Some(64 << 20))?;
        wait_for(host, &format!("crictl logs {id}"), "ready\n")?;
        let log = host.output(&format!("crictl logs {id}"))?;
        assert_eq!((log.stdout.as_str(), log.stderr.as_str()), ("ready\n", "error\n"), "{class}");

        let stats: Value = serde_json::from_str(&crictl(host, &format!("stats -o json {id}"))?)?;
        let stats = &stats["stats"][0];
        let number = |value: &Value| value.as_str().and_then(|text| text.parse::<u64>().ok());
        let memory = number(&stats["memory"]["workingSetBytes"]["value"]);
        assert!(memory.is_some_and(|bytes| bytes > 0), "{class}: {stats}");
        let cpu = number(&stats["cpu"]["usageCoreNanoSeconds"]["value"]);
        assert!(cpu.is_some_and(|nanoseconds| nanoseconds > 0), "{class}: {stats}");
        let pods = crictl(host, &format!("statsp -o json {}", pod.id))?;
        assert!(pods.contains("workingSetBytes"), "{class}: {pods}");

        let limit = "sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || \
                     cat /sys/fs/cgroup/memory.max'";
        assert_eq!(crictl(host, &format!("exec -s {id} {limit}"))?, (64 << 20).to_string());
        crictl(host, &format!("update --memory {} {id}", 32 << 20))?;
        let limit = crictl(host, &format!("exec -s {id} {limit}"))?;
        assert_eq!(limit, (32 << 20).to_string(), "{class}");

        // Over a stream, with a terminal and without.
        let out = host.run(&format!("echo in | crictl exec -i {id} sh -c 'cat; echo out'"))?;
        assert_eq!(out.stdout, "in\nout\n", "{class}");
        let tty = format!("script -qec 'crictl exec -it {id} tty' /dev/null </dev/null");
        wait_for(host, &tty, "/dev/pts/").context(class)?;
        let code = host.output(&format!("crictl exec -s {id} sh -c 'exit 7'"))?;
        assert!(code.stderr.contains('7') && !code.status.success(), "{class}: {code}");

        pod.remove()?;
        assert_nothing_left(host).context(class)?;
    }
    Ok(())
}

#[test]
fn a_container_of_a_pod_that_runs_out_of_memory_is_said_to_have() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    for class in CLASSES {
        let pod = Pod::run(host, class)?;
        let id = pod.start("one", "exec tail /dev/zero", Some(16 << 20))?;
        let ended = wait_until_exited(host, &id)?;
        assert_eq!(ended["exitCode"], 137, "{class}: {ended}");
        assert_eq!(ended["reason"], "OOMKilled", "{class}: {ended}");
        pod.remove()?;
        assert_nothing_left(host).context(class)?;
    }
    Ok(())
}
