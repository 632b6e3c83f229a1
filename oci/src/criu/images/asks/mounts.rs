//! Mounts, with all that CRIU would heed.

use super::super::super::ImageError;
use super::super::super::decode::{fields, records};
use super::super::mounts::{MNTS_MAGIC, kind};
use super::text;

/// A mount that CRIU would make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// Its number, and that of the mount it is on.
    pub id: u32,
    /// See `id`.
    pub parent: u32,
    /// Number of the device: mounts with the same one may be bound from each other.
    pub device: u32,
    /// File system; empty if it is none of CRIU's.
    pub kind: String,
    /// The part of the file system that is mounted.
    pub root: String,
    /// Where it is.
    pub target: String,
    /// What is mounted.
    pub source: String,
    /// Flags of mount(2).
    pub flags: u32,
    /// Flags of the file system.
    pub file_system_flags: u32,
    /// Who restores has to bring it, under this name.
    pub key: Option<String>,
    /// Its place was deleted when it was dumped, or a plugin has to mount it.
    pub odd: bool,
}

pub(super) fn parse(image: &[u8]) -> Result<Vec<Asked>, ImageError> {
    let mut mounts = Vec::new();
    for record in records(image, MNTS_MAGIC)? {
        let mut mount = Asked::default();
        let (mut external, mut name) = (false, None);
        for field in fields(record?) {
            let field = field?;
            match field.number {
                1 => kind(field.number32().into()).clone_into(&mut mount.kind),
                2 => mount.id = field.number32(),
                3 => mount.device = field.number32(),
                4 => mount.parent = field.number32(),
                5 => mount.flags = field.number32(),
                6 => mount.root = text(&field)?,
                7 => mount.target = text(&field)?,
                8 => mount.source = text(&field)?,
                12 | 16 => mount.odd |= field.value != 0,
                13 => external |= field.value != 0,
                14 => name = Some(text(&field)?),
                17 => mount.file_system_flags = field.number32(),
                18 => mount.key = Some(text(&field)?),
                // Options, and who propagates to whom within the container.
                9..=11 | 15 => {}
                _ => return Err(ImageError::Format("a mount with something unknown")),
            }
        }
        // The root is the key then.
        if external {
            mount.key.get_or_insert_with(|| mount.root.clone());
        }
        if let Some(name) = name {
            // CRIU would mount any file system that is named.
            mount.kind = format!("{name} by name");
        }
        mounts.push(mount);
    }
    Ok(mounts)
}
