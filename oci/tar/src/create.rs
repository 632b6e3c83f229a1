//! Making an archive of a tree.
//!
//! As GNU tar does with CRIU's options: other file systems are left out but for the folders they
//! are mounted on, sockets are left out, extended attributes are not looked at, times are whole
//! seconds. What it would do in a special way is left to it: hard links, files with holes, names
//! and numbers that need an extension, large files, for which compression pays.

use crate::Stop;
use crate::gzip;
use crate::ustar::{BLOCK, END, Entry, Kind};
use rustix::fs::{AtFlags, Dev, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Larger files and archives are compressed, by the real tar. Bytes.
const LARGE: usize = 8 << 20;
/// Folders within folders; more is unusual.
const DEEP: usize = 64;

/// An archive of `folder`.
///
/// # Errors
/// [`Stop::Real`] when there is something unusual in it, or it cannot be read.
pub fn pack(folder: &OsStr) -> Result<Vec<u8>, Stop> {
    Ok(gzip::pack(&archive(folder)?))
}

/// Writes it to the output.
///
/// # Errors
/// As [`pack`]; when it cannot be written.
pub fn run(folder: &OsStr) -> Result<(), Stop> {
    let mut packed = &pack(folder)?[..];
    let output = std::io::stdout();
    while !packed.is_empty() {
        match rustix::io::write(output.as_fd(), packed) {
            Ok(count) => packed = &packed[count..],
            Err(Errno::INTR) => {}
            Err(err) => return Err(Stop::Failed("write the archive", err.into())),
        }
    }
    Ok(())
}

fn archive(folder: &OsStr) -> Result<Vec<u8>, Stop> {
    let root = rustix::fs::open(folder, FOLDER, Mode::empty()).map_err(real)?;
    let stat = rustix::fs::fstat(&root).map_err(real)?;
    let mut writer = Writer { archive: Vec::with_capacity(64 << 10), device: stat.st_dev };
    writer.header(Kind::Folder, b"./", &stat, b"")?;
    writer.folder(root, b"./", 0)?;
    writer.archive.resize(writer.archive.len() + END, 0);
    Ok(writer.archive)
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Whatever goes wrong while nothing is written: the real tar may have something to say about it.
fn real(_: Errno) -> Stop {
    Stop::Real
}

struct Writer {
    archive: Vec<u8>,
    /// The file system that is archived.
    device: Dev,
}

impl Writer {
    fn header(&mut self, kind: Kind, name: &[u8], stat: &Stat, link: &[u8]) -> Result<(), Stop> {
        let entry = Entry::new(kind, name, stat, link).ok_or(Stop::Real)?;
        self.archive.extend(entry.encode().ok_or(Stop::Real)?);
        Ok(())
    }

    fn folder(&mut self, folder: OwnedFd, path: &[u8], depth: usize) -> Result<(), Stop> {
        if depth > DEEP {
            return Err(Stop::Real);
        }
        let mut entries = Dir::read_from(&folder).map_err(real)?;
        while let Some(entry) = entries.read() {
            let entry = entry.map_err(real)?;
            let name = entry.file_name();
            if !matches!(name.to_bytes(), b"." | b"..") {
                self.entry(folder.as_fd(), name, path, depth)?;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        folder: BorrowedFd<'_>,
        name: &CStr,
        path: &[u8],
        depth: usize,
    ) -> Result<(), Stop> {
        let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(real)?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let Some(kind) = Kind::of(file_type) else {
            // A socket lives in its process; there is nothing to archive.
            return if file_type == FileType::Socket { Ok(()) } else { Err(Stop::Real) };
        };
        let mut path = [path, name.to_bytes()].concat();
        match kind {
            Kind::Folder => {
                path.push(b'/');
                self.header(kind, &path, &stat, b"")?;
                if stat.st_dev != self.device {
                    return Ok(());
                }
                let open = FOLDER | OFlags::NOFOLLOW;
                let inner = rustix::fs::openat(folder, name, open, Mode::empty()).map_err(real)?;
                return self.folder(inner, &path, depth + 1);
            }
            // Names of one file: the archive would have to say so.
            _ if stat.st_nlink > 1 => return Err(Stop::Real),
            Kind::File => return self.file(folder, name, &path, &stat),
            Kind::Link => {
                let link = rustix::fs::readlinkat(folder, name, Vec::new()).map_err(real)?;
                self.header(kind, &path, &stat, link.to_bytes())?;
            }
            Kind::Char | Kind::Block | Kind::Fifo => self.header(kind, &path, &stat, b"")?,
        }
        Ok(())
    }

    fn file(
        &mut self,
        folder: BorrowedFd<'_>,
        name: &CStr,
        path: &[u8],
        stat: &Stat,
    ) -> Result<(), Stop> {
        let size = usize::try_from(stat.st_size).map_err(|_| Stop::Real)?;
        let has_holes = i128::from(stat.st_blocks) * 512 < i128::from(stat.st_size);
        if has_holes || size > LARGE || self.archive.len() + size > LARGE {
            return Err(Stop::Real);
        }
        self.header(Kind::File, path, stat, b"")?;
        let start = self.archive.len();
        let blocks = size.div_ceil(BLOCK) * BLOCK;
        self.archive.resize(start + blocks, 0);
        if size == 0 {
            return Ok(());
        }
        let open = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(folder, name, open, Mode::empty()).map_err(real)?;
        let mut rest = &mut self.archive[start..start + size];
        while !rest.is_empty() {
            match rustix::io::read(&file, &mut *rest) {
                Ok(0) => return Err(Stop::Real),
                Ok(count) => rest = &mut rest[count..],
                Err(Errno::INTR) => {}
                Err(_) => return Err(Stop::Real),
            }
        }
        Ok(())
    }
}
