//! What is written down beside CRIU's images, by ferry and by podman. All of it may be missing.

use ferry_oci::criu::DumpOptions;
use serde::{Deserialize, Serialize};

/// What ferry writes: `ferry.json` beside the images and, with more in it, a blob of the image.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Recorded {
    pub(super) version: Option<u32>,
    pub(super) ferry: Option<String>,
    pub(super) criu: Option<String>,
    pub(super) runc: Option<String>,
    pub(super) kernel: Option<String>,
    pub(super) container: Option<String>,
    pub(super) created: Option<String>,
    pub(super) exit: Option<bool>,
    pub(super) snapshotter: Option<String>,
    pub(super) options: Option<DumpOptions>,
    pub(super) statistics: Option<Taken>,
}

/// What a checkpoint took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Taken {
    /// How long the container stood still, microseconds.
    pub(super) frozen_us: Option<u64>,
    /// How long the dump took, microseconds.
    pub(super) dump_us: Option<u64>,
    /// Bytes of its memory.
    pub(super) memory_bytes: Option<u64>,
}

/// podman's `config.dump`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Podman {
    pub(super) id: Option<String>,
    pub(super) name: Option<String>,
    pub(super) rootfs_image_name: Option<String>,
    #[serde(rename = "runtime")]
    pub(super) oci_runtime: Option<String>,
    pub(super) checkpointed_time: Option<String>,
}

/// An OCI runtime spec: what of it is told.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Spec {
    process: Option<Process>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Process {
    args: Option<Vec<String>>,
}

impl Spec {
    /// The command that the container was started with.
    pub(super) fn command(self) -> Option<Vec<String>> {
        self.process?.args
    }
}
