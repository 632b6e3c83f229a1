//! The mounts of a container.

use super::super::ImageError;
use super::super::decode::{fields, records};
use serde::Serialize;

pub(super) const MNTS_MAGIC: u32 = 0x5556_3928;

/// CRIU's number of a file system in memory.
pub(super) const TMPFS: u64 = 5;

/// CRIU's numbers of file systems.
const KINDS: [(u64, &str); 19] = [
    (1, "proc"),
    (2, "sysfs"),
    (3, "devtmpfs"),
    (4, "binfmt_misc"),
    (TMPFS, "tmpfs"),
    (6, "devpts"),
    (7, "simfs"),
    (8, "pstore"),
    (9, "securityfs"),
    (10, "fusectl"),
    (11, "debugfs"),
    (12, "cgroup"),
    (13, "aufs"),
    (14, "mqueue"),
    (15, "fuse"),
    (17, "overlay"),
    (18, "autofs"),
    (19, "tracefs"),
    (23, "cgroup2"),
];

/// One mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where it is.
    pub target: String,
    /// File system.
    pub kind: String,
    /// What is mounted: a device, or a name.
    pub source: String,
    /// The part of the file system that is mounted.
    pub root: String,
    /// Whoever restores has to bring it: CRIU has only noted where it was.
    pub external: bool,
}

/// Name of the file system that has `number`; empty if there is none.
pub(super) fn kind(number: u64) -> &'static str {
    KINDS.iter().find(|kind| kind.0 == number).map_or("", |kind| kind.1)
}

pub(super) fn parse(image: &[u8]) -> Result<Vec<Mount>, ImageError> {
    let mut mounts = Vec::new();
    for record in records(image, MNTS_MAGIC)? {
        let mut mount = Mount::default();
        let (mut kind, mut name) = ("", String::new());
        for field in fields(record?) {
            let field = field?;
            match field.number {
                1 => kind = self::kind(field.value),
                6 => mount.root = field.text(),
                7 => mount.target = field.text(),
                8 => mount.source = field.text(),
                13 => mount.external |= field.value != 0,
                14 => name = field.text(),
                // Since CRIU 3.17 a mount's key says so too.
                18 => mount.external = true,
                _ => {}
            }
        }
        mount.kind = if kind.is_empty() { name } else { kind.to_owned() };
        mounts.push(mount);
    }
    Ok(mounts)
}
