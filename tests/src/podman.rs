//! Podman on test hosts.
//!
//! It keeps its containers beside containerd's, in a folder on a real disk, where CRIU can look their
//! files up.

use anyhow::Result;

use crate::{Host, Output};

/// Podman on hosts that have no systemd and cgroups of both versions; to be sourced.
pub const SETUP: &str = r#"
export PODMAN_IGNORE_CGROUPSV1_WARNING=1
pod() {
    podman --root /var/lib/containerd/podman --runroot /run/podman --storage-driver overlay \
        --runtime runc --cgroup-manager cgroupfs --events-backend file "$@"
}
"#;

/// Gives podman the image as containerd has it. After [`SETUP`].
const LOAD: &str = r#"
set -e
# ctr now and then returns from an export before all of it is in the file.
for try in 1 2 3; do
    ! pod image exists $IMAGE || break
    ctr image export /run/image.tar $IMAGE
    pod load --quiet --input /run/image.tar >/dev/null || true
    rm /run/image.tar
done
pod image exists $IMAGE
"#;

/// Runs `podman COMMAND` on `host`, which has to succeed.
///
/// # Errors
/// With what it says.
pub fn podman(host: &Host, command: &str) -> Result<Output> {
    host.run(&format!("{SETUP}\npod {command}"))
}

/// Gives podman `image` as containerd on `host` has it.
///
/// # Errors
/// When it does not take it.
pub fn load(host: &Host, image: &str) -> Result<()> {
    host.run(&format!("IMAGE={image}\n{SETUP}\n{LOAD}")).map(drop)
}
