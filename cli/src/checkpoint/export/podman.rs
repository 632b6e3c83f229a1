//! What podman knows of a container, made of what containerd knows.

use serde_json::{Value, json};

use super::Contents;
use crate::checkpoint::archive;

/// By it checkpointctl finds the name of a container of containerd's.
const NAME: &str = "io.kubernetes.cri.container-name";
/// What an export calls a container's `/dev/shm`. podman takes a mount of that very name out of what it
/// imports, for its own, which it is told not to make; under this one the container has it when podman
/// starts it anew.
pub(in crate::checkpoint) const KEPT_SHM: &str = "/dev/shm/";
/// podman's default for `/dev/shm`, bytes.
const SHM: u64 = 65_536_000;
/// When nothing has happened yet, as Go writes it.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// `config.dump`. The name of a field is the one of podman's `ContainerConfig`; what podman makes anew
/// at an import (storage, cgroup, log, pid files) is left out.
pub(super) fn config(contents: &Contents<'_>, spec: &Value) -> Value {
    let (record, summary) = (contents.record, contents.summary);
    let of = |id: &str| id.split_once(':').map_or(id, |(_, hex)| hex).to_owned();
    let id = archive::digest_of(format!("{}/{}", contents.namespace, record.id).as_bytes());
    let user = &spec["process"]["user"];
    let number = |key: &str| user[key].as_u64().unwrap_or_default();
    let user = match (number("uid"), number("gid")) {
        (0, 0) => String::new(),
        (uid, gid) => format!("{uid}:{gid}"),
    };
    json!({
        "id": of(&id),
        "name": record.id,
        "rootfsImageID": of(contents.config),
        "rootfsImageName": record.image,
        "RawImageName": record.image,
        "idMappingsOptions": { "HostUIDMapping": true, "HostGIDMapping": true },
        "command": spec["process"]["args"],
        "user": user,
        // What is in /dev/shm is among CRIU's images. podman would put a folder of its own there,
        // which CRIU has no use for, and take that for its content at the next checkpoint.
        "NoShm": true,
        "NOShmShare": true,
        "shmSize": SHM,
        // Files that the dumped container has not.
        "passwd": false,
        "createdTime": summary.created,
        "checkpointedTime": summary.created,
        "restoredTime": NEVER,
        "restored": false,
        "cgroupsMode": "enabled",
        "logDriver": "k8s-file",
        "runtime": "runc",
        "stopSignal": 15,
        "stopTimeout": 10,
        "sdnotifyMode": "container",
    })
}

/// `spec.dump`.
pub(super) fn spec(spec: &Value, id: &str) -> Value {
    let mut spec = spec.clone();
    if spec["annotations"][NAME].is_null() {
        if !spec["annotations"].is_object() {
            spec["annotations"] = json!({});
        }
        spec["annotations"][NAME] = json!(id);
    }
    let mounts = spec["mounts"].as_array_mut().into_iter().flatten();
    for mount in mounts.filter(|mount| mount["destination"] == "/dev/shm") {
        mount["destination"] = json!(KEPT_SHM);
    }
    spec
}
