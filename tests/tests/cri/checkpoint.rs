//! What Kubernetes does with checkpoints: an archive of a running container, from which another pod's
//! container starts. containerd restores it by the annotation `RestoreFromPath`.

use anyhow::{Context, Result, ensure};
use ferry_tests::ctr::{BUSYBOX, wait_for};
use ferry_tests::layers::REGISTRY;
use ferry_tests::versions::{Containerd, can_checkpoint, chosen};
use ferry_tests::{Host, skip};

use crate::CLASSES;
use crate::pod::{Pod, assert_nothing_left, crictl, lab_over, state};

/// containerd pulls the image of a container that it restores, whether it has it or not.
const IMAGE: &str = "localhost:5000/busybox:latest";
const ARCHIVE: &str = "/tmp/one.tar";
/// Counts in its memory, in a file of its own and in its log. Starts no processes: the reference cannot
/// dump a container in which one just ends.
const COUNTS: &str = "mkfifo /never; exec 9<>/never; n=0; \
                      while :; do n=$((n + 1)); echo $n >/count; echo line $n; read -t 0.05 <&9; done";

#[test]
fn a_container_of_a_pod_is_checkpointed_and_goes_on_in_another_pod() -> Result<()> {
    if matches!(chosen()?.0, Containerd::V1_7 | Containerd::V2_4) {
        skip("containerd 1.7 and 2.4 restore no containers of pods");
        return Ok(());
    }
    if !can_checkpoint()? {
        skip("this runc cannot checkpoint");
        return Ok(());
    }
    let Some(lab) = lab_over(&[&REGISTRY])? else { return Ok(()) };
    let host = lab.host("a");
    let _registry = host.spawn("exec docker-registry serve /etc/registry.yml")?;
    wait_for(host, "busybox wget -q -O - http://127.0.0.1:5000/v2/", "{}")?;
    host.run(&format!("ctr image tag {BUSYBOX} {IMAGE} && ctr image push --plain-http {IMAGE}"))?;
    crictl(host, &format!("pull {IMAGE}"))?;
    for class in CLASSES {
        let pod = Pod::run(host, class)?;
        let id = pod.start_from(IMAGE, "one", COUNTS, None)?;
        until(host, &id, 10)?;
        crictl(host, &format!("checkpoint --export {ARCHIVE} {id}")).context(class)?;
        let at = count(host, &id)?;
        // It goes on.
        until(host, &id, at + 10).context(class)?;
        pod.remove()?;

        let pod = Pod::run(host, class)?;
        let id = pod.start_from(ARCHIVE, "one", "exit 1", None).context(class)?;
        let now = count(host, &id)?;
        ensure!(now >= 10 && now <= at + 10, "{class}: {now} after a checkpoint before {at}");
        until(host, &id, now + 10).context(class)?;
        assert_eq!(state(host, &id)?["state"], "CONTAINER_RUNNING", "{class}");
        let log = crictl(host, &format!("logs {id}"))?;
        // containerd does not bring back what was logged before.
        let goes_on = log.lines().any(|line| line == format!("line {}", now + 5));
        ensure!(goes_on, "{class}: no line {}: {log}", now + 5);
        pod.remove()?;
        host.run(&format!("rm {ARCHIVE}"))?;
        assert_nothing_left(host).context(class)?;
    }
    Ok(())
}

/// What the container has counted to.
fn count(host: &Host, id: &str) -> Result<u32> {
    // It may be about to write.
    let script = "while ! [ -s /count ]; do :; done; cat /count";
    let count = crictl(host, &format!("exec -s {id} sh -c '{script}'"))?;
    count.parse().with_context(|| format!("its count is {count:?}"))
}

fn until(host: &Host, id: &str, least: u32) -> Result<()> {
    host.wait_until("it counts", |_| count(host, id).is_ok_and(|count| count >= least))
}
