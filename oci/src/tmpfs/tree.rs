//! What is in a tree, as one number.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use twox_hash::XxHash3_128;

/// The largest tree that is looked at: bytes in files, entries, and folders within folders.
const BYTES: u64 = 1 << 20;
const ENTRIES: usize = 2000;
const DEPTH: usize = 32;

/// Changes with everything that an archive of the tree has, and with which names are links to one file.
/// `None` for a tree that is too large.
///
/// Contents are read: a program that writes to mapped memory leaves no other trace in a tmpfs.
///
/// # Errors
/// When something cannot be read.
pub(super) fn digest(root: &Path) -> io::Result<Option<u128>> {
    let device = fs::metadata(root)?.dev();
    let mut tree = Tree { device, hash: XxHash3_128::new(), bytes: 0, entries: 0 };
    Ok(tree.folder(root, 0)?.then(|| tree.hash.finish_128()))
}

struct Tree {
    device: u64,
    hash: XxHash3_128,
    bytes: u64,
    entries: usize,
}

impl Tree {
    /// False when it is too large.
    fn folder(&mut self, folder: &Path, depth: usize) -> io::Result<bool> {
        self.meta(&fs::metadata(folder)?);
        let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
        self.entries += entries.len();
        if self.entries > ENTRIES || depth > DEPTH {
            return Ok(false);
        }
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (name, path, meta) = (entry.file_name(), entry.path(), entry.metadata()?);
            self.hash.write(&(name.len() as u64).to_le_bytes());
            self.hash.write(name.as_bytes());
            let kind = meta.file_type();
            if meta.dev() != self.device {
                // What is mounted there is somebody else's.
                continue;
            }
            if kind.is_dir() {
                if !self.folder(&path, depth + 1)? {
                    return Ok(false);
                }
                continue;
            }
            self.meta(&meta);
            if kind.is_symlink() {
                self.hash.write(fs::read_link(&path)?.as_os_str().as_bytes());
            } else if kind.is_file() {
                self.bytes += meta.len();
                // A file with holes may be longer than all memory.
                if self.bytes > BYTES {
                    return Ok(false);
                }
                self.hash.write(&content(&path)?);
            }
        }
        // Else a file moved from the end of one folder to its parent would not be seen.
        self.hash.write(b"/");
        Ok(true)
    }

    fn meta(&mut self, meta: &fs::Metadata) {
        let numbers =
            [meta.mode().into(), meta.uid().into(), meta.gid().into(), meta.rdev(), meta.ino()];
        let times = [meta.mtime(), meta.mtime_nsec()].map(i64::cast_unsigned);
        let size = if meta.is_dir() { 0 } else { meta.len() };
        for number in numbers.into_iter().chain(times).chain([meta.nlink(), size]) {
            self.hash.write(&number.to_le_bytes());
        }
    }
}

fn content(path: &Path) -> io::Result<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let mut bytes = Vec::new();
    file.take(BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
