//! Pods on a host, and what crictl says of them.

use std::fs;

use anyhow::{Context, Result};
use ferry_tests::ctr::{BUSYBOX, assert_prints_nothing, wait_for};
use ferry_tests::layers::{CNI, CRICTL, Layer};
use ferry_tests::versions::{chosen, task_lab_over};
use ferry_tests::{Host, Lab, skip};
use serde_json::{Value, json};

/// A host with the CRI plugin, CNI plugins, crictl and images for it; none where it cannot be made.
pub(crate) fn lab() -> Result<Option<Lab>> {
    lab_over(&[])
}

/// [`lab`] over more layers.
pub(crate) fn lab_over(more: &[&'static Layer]) -> Result<Option<Lab>> {
    if let Some(missing) = CRICTL.missing() {
        skip(&missing);
        return Ok(None);
    }
    let layers = [more, &[&CRICTL, chosen()?.0.cri(), &CNI]].concat();
    let lab = task_lab_over(&layers)?;
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
pub(crate) fn crictl(host: &Host, command: &str) -> Result<String> {
    Ok(host.run(&format!("crictl {command}"))?.stdout.trim_end().to_owned())
}

/// A pod that runs.
pub(crate) struct Pod<'a> {
    host: &'a Host,
    pub(crate) id: String,
}

impl<'a> Pod<'a> {
    pub(crate) fn run(host: &'a Host, class: &str) -> Result<Self> {
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
    pub(crate) fn start(&self, name: &str, script: &str, memory: Option<u64>) -> Result<String> {
        self.start_from(BUSYBOX, name, script, memory)
    }

    /// Starts one from an image, or from the archive of a checkpoint.
    pub(crate) fn start_from(
        &self,
        image: &str,
        name: &str,
        script: &str,
        memory: Option<u64>,
    ) -> Result<String> {
        let config = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": image },
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

    pub(crate) fn remove(self) -> Result<()> {
        crictl(self.host, &format!("stopp {}", self.id))?;
        crictl(self.host, &format!("rmp {}", self.id))?;
        self.host.run("rm -r /tmp/logs").map(drop)
    }
}

/// What the runtime says of container `id`.
pub(crate) fn state(host: &Host, id: &str) -> Result<Value> {
    let all: Value = serde_json::from_str(&crictl(host, &format!("inspect {id}"))?)?;
    Ok(all["status"].clone())
}

pub(crate) fn wait_until_exited(host: &Host, id: &str) -> Result<Value> {
    wait_for(host, &format!("crictl inspect {id}"), "CONTAINER_EXITED")?;
    state(host, id)
}

/// Fails if a pod has left something on the host.
pub(crate) fn assert_nothing_left(host: &Host) -> Result<()> {
    assert_prints_nothing(
        host,
        "pgrep -a containerd-shim; ls /run/containerd/s /run/containerd/runc/k8s.io \
         /run/containerd/io.containerd.runtime.v2.task/k8s.io /run/netns 2>/dev/null | \
         grep -v :; grep -o '/run/containerd/[^ ]*/rootfs' /proc/mounts",
    )
}
