//! Sending changes: from the source's upper directory into a stream.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::codec::{Extent, MAX_DATA, Record, write_extent, write_header, write_record};
use super::delta::Change;
use super::manifest::{Entry, Kind};
use super::root::Root;
use super::sys;
use super::{Error, Result};

/// `RAMFS_MAGIC` of linux/magic.h, which nix does not have.
const RAMFS: FsType = FsType(0x8584_58f6);

/// Whether the container can write while the changes are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// It runs. What changes meanwhile comes with the next delta.
    Live,
    /// It is frozen. What changes nevertheless is an error.
    Frozen,
}

/// What was sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Number of steps.
    pub entries: u64,
    /// Bytes of file contents, without holes.
    pub bytes: u64,
    /// Paths of which it is not known whether the destination now has what the manifest says: to be given to
    /// [`super::Manifest::forget`]. Empty after a frozen pass.
    pub unsettled: Vec<PathBuf>,
}

/// Sends `changes` of the upper directory `upper` to `out`.
///
/// A file whose size changes while it is read is cut or filled with zeros to the size announced; it has
/// changed, so the next delta brings it again.
///
/// # Errors
/// [`Error::Stream`] when `out` does not take it, [`Error::Io`] when a file cannot be read,
/// [`Error::Changed`] in a frozen pass.
pub fn encode(upper: &Path, changes: &[Change], pass: Pass, out: impl Write) -> Result<Encoded> {
    let root = Root::open(upper)?;
    let fs = fstatfs(root.as_fd()).map_err(|e| Error::io("look at", Path::new(""), e))?;
    let settles = ![TMPFS_MAGIC, RAMFS].contains(&fs.filesystem_type());
    let mut sender = Sender {
        root,
        pass,
        settles,
        out: BufWriter::with_capacity(256 << 10, out),
        buffer: vec![0; MAX_DATA],
        sent: Encoded::default(),
        lost: HashSet::new(),
    };
    write_header(&mut sender.out)?;
    for change in changes {
        sender.send(change)?;
    }
    write_record(&mut sender.out, &Record::End { count: sender.sent.entries })?;
    sender.out.flush().map_err(Error::Stream)?;
    Ok(sender.sent)
}

struct Sender<'a, W: Write> {
    root: Root,
    pass: Pass,
    /// Whether the file system stamps a file at the first write through a mapping after a write-back.
    settles: bool,
    out: BufWriter<W>,
    buffer: Vec<u8>,
    sent: Encoded,
    /// Files that could not be sent, so that nothing can be linked to them.
    lost: HashSet<&'a Path>,
}

impl<'a, W: Write> Sender<'a, W> {
    fn send(&mut self, change: &'a Change) -> Result<()> {
        let record = match change {
            Change::Remove(path) => Record::Remove { path: path.clone() },
            Change::Times { path, mtime } => Record::Times { path: path.clone(), mtime: *mtime },
            Change::Link { path, to } if self.lost.contains(to.as_path()) => {
                self.sent.unsettled.push(path.clone());
                return Ok(());
            }
            Change::Link { path, to } => Record::Link { path: path.clone(), to: to.clone() },
            Change::Create { path, entry, clear, links } => {
                let (path, meta) = (path.clone(), entry.meta.clone());
                match &entry.kind {
                    Kind::File => return self.send_file(change, entry, links),
                    Kind::Dir { .. } => Record::Dir { path, meta, clear: *clear },
                    Kind::Symlink(target) => Record::Symlink { path, meta, target: target.clone() },
                    Kind::Fifo => Record::Fifo { path, meta },
                    Kind::Char(major, minor) | Kind::Block(major, minor) => Record::Device {
                        path,
                        meta,
                        block: matches!(entry.kind, Kind::Block(..)),
                        major: *major,
                        minor: *minor,
                    },
                    Kind::Socket | Kind::Whiteout => Record::Remove { path },
                }
            }
        };
        self.sent.entries += 1;
        write_record(&mut self.out, &record)
    }

    fn send_file(&mut self, change: &'a Change, entry: &Entry, links: &[PathBuf]) -> Result<()> {
        let Change::Create { path, .. } = change else {
            return Ok(());
        };
        let Some(file) = self.open(path, entry, links)? else {
            if self.pass == Pass::Frozen {
                return Err(Error::Changed { path: path.clone() });
            }
            self.lost.insert(path);
            self.sent.unsettled.push(path.clone());
            return Ok(());
        };
        if self.pass == Pass::Live {
            // Before it is read, after it was looked at; see the module's documentation.
            let settled = self.settles && sys::write_back(file.as_fd()).is_ok();
            if !settled {
                self.sent.unsettled.push(path.clone());
                self.sent.unsettled.extend_from_slice(links);
            }
        }
        let failed = |e| Error::Io { doing: "read", path: path.clone(), source: e };
        let size = file.metadata().map_err(failed)?.len();
        if self.pass == Pass::Frozen && size != entry.size {
            return Err(Error::Changed { path: path.clone() });
        }
        self.sent.entries += 1;
        let (path, meta) = (path.clone(), entry.meta.clone());
        write_record(&mut self.out, &Record::File { path: path.clone(), meta, size })?;
        self.send_contents(&path, &file, size)?;
        write_extent(&mut self.out, &Extent::End)
    }

    /// Sends exactly `size` bytes.
    fn send_contents(&mut self, path: &Path, file: &File, size: u64) -> Result<()> {
        let mut at = 0;
        while at < size {
            let data = next_data(file, at).map_err(|e| Error::io("read", path, e))?;
            let data = data.unwrap_or(size).min(size);
            if data > at {
                write_extent(&mut self.out, &Extent::Hole(data - at))?;
                at = data;
                continue;
            }
            let hole = lseek(file, at.cast_signed(), Whence::SeekHole);
            let end = hole.map_or(size, |hole| hole.cast_unsigned().clamp(at + 1, size));
            while at < end {
                let len = usize::try_from(end - at).unwrap_or(MAX_DATA).min(MAX_DATA);
                let got = file.read_at(&mut self.buffer[..len], at);
                let got = got.map_err(|e| Error::io("read", path, e))?;
                if got == 0 {
                    // Cut short while we read.
                    if self.pass == Pass::Frozen {
                        return Err(Error::Changed { path: path.to_owned() });
                    }
                    return write_extent(&mut self.out, &Extent::Hole(size - at));
                }
                write_extent(&mut self.out, &Extent::Data(got))?;
                self.out.write_all(&self.buffer[..got]).map_err(Error::Stream)?;
                at += got as u64;
                self.sent.bytes += got as u64;
            }
        }
        Ok(())
    }

    /// Opens the file by whichever of its names still leads to it; `None` when none does.
    fn open(&mut self, path: &Path, entry: &Entry, links: &[PathBuf]) -> Result<Option<File>> {
        for name in std::iter::once(path).chain(links.iter().map(PathBuf::as_path)) {
            let file = match self.root.read(name) {
                Ok(file) => file,
                Err(
                    Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ESTALE | Errno::ENXIO,
                ) => {
                    continue;
                }
                Err(e) => return Err(Error::io("open", name, e)),
            };
            let found = file.metadata().map_err(|e| Error::io("look at", name, e))?;
            if found.is_file() && found.ino() == entry.ino {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }
}

/// Where the next data lies from `at` on; `None` when only a hole follows.
fn next_data(file: &File, at: u64) -> nix::Result<Option<u64>> {
    match lseek(file, at.cast_signed(), Whence::SeekData) {
        Ok(data) => Ok(Some(data.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        // A file system that does not know holes.
        Err(Errno::EINVAL) => Ok(Some(at)),
        Err(e) => Err(e),
    }
}
