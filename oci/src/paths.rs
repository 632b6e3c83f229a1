//! Where ferry keeps its state on a host. All of it lives on a tmpfs: it speaks of running tasks
//! and ends with them when the host restarts.

use std::path::{Path, PathBuf};

/// Root of ferry's run-time state.
pub const RUN: &str = "/run/ferry";
/// Sockets of the Ferry service, one per shim.
pub const SOCKETS: &str = "/run/ferry/s";
/// Checkpoint images of migrations under way, one folder each.
pub const IMAGES: &str = "/run/ferry/images";
/// Records of migrations that have been decided, one JSON file each.
pub const RECORDS: &str = "/run/ferry/records";
/// File in a container's bundle that names the socket of its Ferry service.
pub const BUNDLE_FILE: &str = "ferry.json";

/// Folder of the images of `migration`.
pub fn images(migration: &str) -> PathBuf {
    Path::new(IMAGES).join(migration)
}

/// Record of `migration`.
pub fn record(migration: &str) -> PathBuf {
    Path::new(RECORDS).join(format!("{migration}.json"))
}

/// Whether `id` is safe in a path and in the name of a firewall table.
pub fn is_migration_id(id: &str) -> bool {
    (8..=64).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}
