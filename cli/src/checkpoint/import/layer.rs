//! podman's two pieces of a writable layer, made one that containerd applies: whiteouts first, then the
//! archive of what is there. containerd keeps both inside the container's root.

use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tar::{Builder, EntryType, Header};

use crate::untar;

/// The longest path, bytes.
const LONGEST: usize = 4096;
/// What ends an archive.
const END: [u8; 1024] = [0; 1024];

/// The paths in `deleted.files`, without the slash before them.
///
/// # Errors
/// When it is no list of paths from the root.
pub(super) fn deleted(bytes: &[u8]) -> Result<Vec<String>> {
    let paths: Vec<String> = serde_json::from_slice(bytes).context("decode it")?;
    let plain = |path: String| {
        let inner = path.strip_prefix('/').unwrap_or(&path);
        let good = inner.len() <= LONGEST
            && !inner.contains('\0')
            && inner.split('/').all(|part| !matches!(part, "" | "." | ".."));
        ensure!(good, "{path:?} leads out of the container, or nowhere");
        Ok(inner.to_owned())
    };
    paths.into_iter().map(plain).collect()
}

/// Writes the layer: what is `deleted`, `files` of ours, and what the archive `changed` has, if it is
/// there, of which no more than `room` bytes are unpacked: it may be packed once more.
///
/// # Errors
/// When `changed` cannot be read or unpacks to more, or `out` does not take it.
pub(super) fn write(
    out: &mut dyn Write,
    deleted: &[String],
    files: &[(String, Vec<u8>)],
    changed: &Path,
    room: u64,
) -> io::Result<()> {
    for path in deleted {
        let at = path.rfind('/').map_or(0, |slash| slash + 1);
        let (folder, name) = path.split_at(at);
        out.write_all(&entry(&format!("{folder}.wh.{name}"), b"")?)?;
    }
    for (path, bytes) in files {
        out.write_all(&entry(path.trim_start_matches('/'), bytes)?)?;
    }
    // The other archive goes on, and has an end.
    match changed.exists() {
        true => copy(untar::open(changed)?, out, room),
        false => out.write_all(&END),
    }
}

/// Writes an archive of at most `room` bytes, as it unpacks.
fn copy(archive: impl Read, out: &mut dyn Write, room: u64) -> io::Result<()> {
    let copied = io::copy(&mut archive.take(room.saturating_add(1)), out)?;
    if copied > room {
        let text = format!("{} unpacks to more than there is room for", super::FILES);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(())
}

/// A file in an archive that goes on.
fn entry(path: &str, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(bytes.len() as u64);
    let mut builder = Builder::new(Vec::new());
    builder.append_data(&mut header, path, bytes)?;
    let mut written = builder.into_inner()?;
    written.truncate(written.len() - END.len());
    Ok(written)
}
