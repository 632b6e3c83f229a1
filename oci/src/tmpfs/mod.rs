//! File systems in memory that a container brings along, carried beside CRIU.
//!
//! ```text
//!   source        prepare ── archive of each ─────────┐            frozen: changed? archive again
//!                                                     ▼                        │
//!   destination                     mount, unpack, give it to CRIU             ▼
//!                                   as an external mount            held: unpack again, if so
//! ```
//! CRIU starts a `tar` for every tmpfs at both ends of a move, and needs a mount of its own for one
//! with mounts below it: 1 ms each and more, inside the pause. These file systems are small and
//! rarely change, so all of it is done before, and in the pause they are only looked at. To CRIU
//! they are mounts that somebody else makes (`--external mnt[...]`).
//!
//! What is carried is what CRIU's tar carries: no extended attributes, times in whole seconds.
//! Anything unusual is left to CRIU as ever: see [`find`].

mod archive;
mod arriving;
mod find;
mod leaving;
mod tree;

pub use arriving::{Arriving, clear};
pub use find::find;
pub use leaving::Leaving;

use serde::{Deserialize, Serialize};

/// One of them, as it stands in the record of a dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Where it is in the container.
    pub at: String,
    /// What is said to be mounted there.
    pub source: String,
    /// Options of the file system, as mount(8) takes them: `ro` if nobody may ever write to it.
    pub options: String,
    /// xxh3-128 of the archive that is valid.
    pub checksum: String,
}

impl Tmpfs {
    /// What CRIU calls it.
    pub fn key(&self) -> String {
        format!("ferry{}", self.at)
    }
}

/// Archive of the mount with this number, made while the container runs.
pub fn early_archive(number: usize) -> String {
    format!("tmpfs-{number}.ferry")
}

/// Whether a file is one of those.
pub fn is_early_archive(name: &str) -> bool {
    name.starts_with("tmpfs-") && name.ends_with(".ferry")
}

/// The same, made when it was frozen, if something had changed.
pub fn late_archive(number: usize) -> String {
    format!("ferry-tmpfs-{number}.img")
}

/// Options that a file system may have to be carried. Others are not known to do no harm.
fn is_known(option: &str) -> bool {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    let plain = value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'%');
    plain
        && matches!(
            name,
            "rw" | "ro"
                | "size"
                | "nr_inodes"
                | "nr_blocks"
                | "mode"
                | "uid"
                | "gid"
                | "inode32"
                | "inode64"
        )
}

#[cfg(test)]
mod tests;
