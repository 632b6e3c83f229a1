//! Pods through containerd's CRI plugin with crictl: the same with the runtime classes `runc`, the
//! reference, and `ferry`.

use std::fs;

use anyhow::{Context, Result};
use ferry_tests::ctr::{BUSYBOX, assert_prints_nothing, wait_for};
use ferry_tests::layers::{CNI, CRICTL};
use ferry_tests::versions::{chosen, task_lab_over};
use ferry_tests::{Host, Lab, skip};
use serde_json::{Value, json};

const CLASSES: [&str; 2] = ["runc", "ferry"];
const IDLE: &str = "echo ready; trap 'exit 3' TERM; while :; do usleep 50000; done";

/// A host with the CRI plugin, CNI plugins, crictl and images for it; none where it cannot be made.
fn lab() -> Result<Option<Lab>> {
    if let Some(missing) = CRICTL.missing() {
        skip(&missing);
        return Ok(None);
    }
    let lab = task_lab_over(&[&CRICTL, chosen()?.0.cri(), &CNI])?;
    let host = lab.host("a");
    // ctr now and then returns from an export before all of it is in the file.
    host.run(&format!(
        "for try in 1 2 3; do
             ctr image export /tmp/images docker.io/library/pause:latest {BUSYBOX} &&
             ctr --namespace k8s.io image import /tmp/images && exit 0
         done; exit 1"
    ))?;
    // It learns of images by their events.
    wait_for(host, "crictl images", "pause")?;
    wait_for(host, "crictl images", "busybox")?;
    Ok(Some(lab))
}

/// Standard output of `crictl COMMAND`, which must succeed.
fn crictl(host: &Host, command: &str) -> Result<String> {
    Ok(host.run(&format!("crictl {command}"))?.stdout.trim_end().to_owned())
}

/// A pod that runs.
struct Pod<'a> {
    host: &'a Host,
    id: String,
}

impl<'a> Pod<'a> {
    fn run(host: &'a Host, class: &str) -> Result<Self> {
        let config = json!({
            "metadata": { "name": "pod", "namespace": "default", "uid": "uid", "attempt": 0 },
            "hostname": "pod",
            "log_directory": "/tmp/logs",
            "linux": { "cgroup_parent": "/pods" },
        });
        fs::write(host.root().join("tmp/pod.json"), config.to_string()).context("write a pod")?;
        let id = crictl(host, &format!("runp --runtime {class} /tmp/pod.json"))?;
        Ok(Self { host, id })
    }

    /// Starts a container of the pod; its id.
    fn start(&self, name: &str, script: &str, memory: Option<u64>) -> Result<String> {
        let config = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": BUSYBOX },
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": { "resources": { "memory_limit_in_bytes": memory.unwrap_or(0) } },
        });
        let file = self.host.root().join("tmp/container.json");
        fs::write(file, config.to_string()).context("write a container")?;
        let create = format!("create {} /tmp/container.json /tmp/pod.json", self.id);
        let id = crictl(self.host, &create)?;
        crictl(self.host, &format!("start {id}"))?;
        Ok(id)
    }

    fn remove(self) -> Result<()> {
        crictl(self.host, &format!("stopp {}", self.id))?;
        crictl(self.host, &format!("rmp {}", self.id))?;
        self.host.run("rm -r /tmp/logs").map(drop)
    }
}

/// What the runtime says of container `id`.
fn state(host: &Host, id: &str) -> Result<Value> {
    let all: Value = serde_json::from_str(&crictl(host, &format!("inspect {id}"))?)?;
    Ok(all["status"].clone())
}

fn wait_until_exited(host: &Host, id: &str) -> Result<Value> {
    wait_for(host, &format!("crictl inspect {id}"), "CONTAINER_EXITED")?;
    state(host, id)
}

/// Fails if a pod has left something on the host.
fn assert_nothing_left(host: &Host) -> Result<()> {
    assert_prints_nothing(
        host,
        "pgrep -a containerd-shim; ls /run/containerd/s /run/containerd/runc/k8s.io \
         /run/containerd/io.containerd.runtime.v2.task/k8s.io /run/netns 2>/dev/null | \
         grep -v :; grep -o '/run/containerd/[^ ]*/rootfs' /proc/mounts",
    )
}

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
