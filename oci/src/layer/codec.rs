//! The stream: a header, records, an end record that counts them.
//!
//! ```text
//!   "FERRYLYR" format:u16
//!   record = tag:u8 fields          path, name, value = length:u32 bytes          numbers little-endian
//!   a file record is followed by extents: 1 length:u32 bytes │ 2 length:u64 (a hole) │ 0 (the end)
//!   end record = tag count:u64
//! ```

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::manifest::{Meta, Time};
use super::sys::MAX_XATTR;
use super::{Error, FORMAT, Result};

const MAGIC: &[u8; 8] = b"FERRYLYR";
/// Longest path and link target, bytes: the kernel's PATH_MAX without its zero.
const MAX_PATH: usize = 4095;
/// Longest name of an attribute, bytes.
const MAX_XATTR_NAME: usize = 255;
/// Most attributes of one file. The kernel bounds the list of names to 64 KiB.
const MAX_XATTRS: usize = 4096;
/// Most data in one extent, bytes.
pub(super) const MAX_DATA: usize = 1 << 20;

/// One record of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    Remove { path: PathBuf },
    Dir { path: PathBuf, meta: Meta, clear: bool },
    File { path: PathBuf, meta: Meta, size: u64 },
    Symlink { path: PathBuf, meta: Meta, target: PathBuf },
    Fifo { path: PathBuf, meta: Meta },
    Device { path: PathBuf, meta: Meta, block: bool, major: u32, minor: u32 },
    Link { path: PathBuf, to: PathBuf },
    Times { path: PathBuf, mtime: Time },
    End { count: u64 },
}

/// A piece of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// That many bytes follow.
    Data(usize),
    /// That many zeros are left out.
    Hole(u64),
    /// The file is complete.
    End,
}

pub(super) fn write_header(out: &mut impl Write) -> Result<()> {
    out.write_all(MAGIC).and_then(|()| out.write_all(&FORMAT.to_le_bytes())).map_err(Error::Stream)
}

pub(super) fn read_header(input: &mut impl Read) -> Result<()> {
    if &take::<8>(input)? != MAGIC {
        return Err(Error::Malformed("it is no writable layer"));
    }
    match u16::from_le_bytes(take(input)?) {
        FORMAT => Ok(()),
        other => Err(Error::Version(other)),
    }
}

pub(super) fn write_record(out: &mut impl Write, record: &Record) -> Result<()> {
    let mut buf = Vec::with_capacity(256);
    match record {
        Record::Remove { path } => {
            buf.push(1);
            put_path(&mut buf, path)?;
        }
        Record::Dir { path, meta, clear } => {
            buf.extend([2, u8::from(*clear)]);
            put_path(&mut buf, path)?;
            put_meta(&mut buf, meta)?;
        }
        Record::File { path, meta, size } => {
            buf.push(3);
            put_path(&mut buf, path)?;
            put_meta(&mut buf, meta)?;
            buf.extend(size.to_le_bytes());
        }
        Record::Symlink { path, meta, target } => {
            buf.push(4);
            put_path(&mut buf, path)?;
            put_meta(&mut buf, meta)?;
            put_bytes(&mut buf, target.as_os_str().as_bytes(), MAX_PATH)?;
        }
        Record::Fifo { path, meta } => {
            buf.push(5);
            put_path(&mut buf, path)?;
            put_meta(&mut buf, meta)?;
        }
        Record::Device { path, meta, block, major, minor } => {
            buf.extend([6, u8::from(*block)]);
            put_path(&mut buf, path)?;
            put_meta(&mut buf, meta)?;
            buf.extend(major.to_le_bytes());
            buf.extend(minor.to_le_bytes());
        }
        Record::Link { path, to } => {
            buf.push(7);
            put_path(&mut buf, path)?;
            put_path(&mut buf, to)?;
        }
        Record::Times { path, mtime } => {
            buf.push(8);
            put_path(&mut buf, path)?;
            put_time(&mut buf, *mtime);
        }
        Record::End { count } => {
            buf.push(255);
            buf.extend(count.to_le_bytes());
        }
    }
    out.write_all(&buf).map_err(Error::Stream)
}

pub(super) fn read_record(input: &mut impl Read) -> Result<Record> {
    let [tag] = take(input)?;
    Ok(match tag {
        1 => Record::Remove { path: take_path(input)? },
        2 => {
            let clear = take_bool(input)?;
            Record::Dir { path: take_dir_path(input)?, meta: take_meta(input)?, clear }
        }
        3 => {
            let (path, meta) = (take_path(input)?, take_meta(input)?);
            let size = u64::from_le_bytes(take(input)?);
            if i64::try_from(size).is_err() {
                return Err(Error::Malformed("a file is larger than files can be"));
            }
            Record::File { path, meta, size }
        }
        4 => {
            let (path, meta) = (take_path(input)?, take_meta(input)?);
            let target = take_bytes(input, MAX_PATH)?;
            if target.is_empty() || target.contains(&0) {
                return Err(Error::Malformed("a link leads nowhere"));
            }
            Record::Symlink { path, meta, target: OsString::from_vec(target).into() }
        }
        5 => Record::Fifo { path: take_path(input)?, meta: take_meta(input)? },
        6 => {
            let block = take_bool(input)?;
            let (path, meta) = (take_path(input)?, take_meta(input)?);
            let (major, minor) =
                (u32::from_le_bytes(take(input)?), u32::from_le_bytes(take(input)?));
            if (block, major, minor) == (false, 0, 0) {
                return Err(Error::Malformed("a device is a whiteout"));
            }
            Record::Device { path, meta, block, major, minor }
        }
        7 => Record::Link { path: take_path(input)?, to: take_path(input)? },
        8 => Record::Times { path: take_dir_path(input)?, mtime: take_time(input)? },
        255 => Record::End { count: u64::from_le_bytes(take(input)?) },
        _ => return Err(Error::Malformed("a record has an unknown tag")),
    })
}

/// Writes the head of an extent; of data, the bytes must follow.
pub(super) fn write_extent(out: &mut impl Write, extent: &Extent) -> Result<()> {
    let written = match extent {
        Extent::End => out.write_all(&[0]),
        Extent::Data(len) => {
            let len = u32::try_from(*len).map_err(|_| Error::Malformed("an extent is too long"))?;
            out.write_all(&[1]).and_then(|()| out.write_all(&len.to_le_bytes()))
        }
        Extent::Hole(len) => out.write_all(&[2]).and_then(|()| out.write_all(&len.to_le_bytes())),
    };
    written.map_err(Error::Stream)
}

/// Reads the head of an extent.
pub(super) fn read_extent(input: &mut impl Read) -> Result<Extent> {
    match take(input)? {
        [0] => Ok(Extent::End),
        [1] => match u32::from_le_bytes(take(input)?) as usize {
            len @ 1..=MAX_DATA => Ok(Extent::Data(len)),
            _ => Err(Error::Malformed("an extent has a wrong length")),
        },
        [2] => Ok(Extent::Hole(u64::from_le_bytes(take(input)?))),
        _ => Err(Error::Malformed("an extent has an unknown tag")),
    }
}

/// Fills `buffer` from the stream.
pub(super) fn read_data(input: &mut impl Read, buffer: &mut [u8]) -> Result<()> {
    input.read_exact(buffer).map_err(Error::Stream)
}

fn put_bytes(buf: &mut Vec<u8>, bytes: &[u8], limit: usize) -> Result<()> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if bytes.len() > limit {
        let source = io::Error::from_raw_os_error(libc::ENAMETOOLONG);
        let path = PathBuf::from(String::from_utf8_lossy(&bytes[..64.min(bytes.len())]).as_ref());
        return Err(Error::Io { doing: "send", path, source });
    }
    buf.extend(len.to_le_bytes());
    buf.extend(bytes);
    Ok(())
}

fn put_path(buf: &mut Vec<u8>, path: &Path) -> Result<()> {
    put_bytes(buf, path.as_os_str().as_bytes(), MAX_PATH)
}

fn put_time(buf: &mut Vec<u8>, time: Time) {
    buf.extend(time.seconds.to_le_bytes());
    buf.extend(time.nanoseconds.to_le_bytes());
}

fn put_meta(buf: &mut Vec<u8>, meta: &Meta) -> Result<()> {
    for number in [meta.mode, meta.uid, meta.gid] {
        buf.extend(number.to_le_bytes());
    }
    put_time(buf, meta.mtime);
    let count = u32::try_from(meta.xattrs.len()).unwrap_or(u32::MAX);
    buf.extend(count.to_le_bytes());
    for (name, value) in &meta.xattrs {
        put_bytes(buf, name, MAX_XATTR_NAME)?;
        put_bytes(buf, value, MAX_XATTR)?;
    }
    Ok(())
}

fn take<const N: usize>(input: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes).map_err(Error::Stream)?;
    Ok(bytes)
}

fn take_bool(input: &mut impl Read) -> Result<bool> {
    match take(input)? {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(Error::Malformed("a flag is neither set nor unset")),
    }
}

fn take_bytes(input: &mut impl Read, limit: usize) -> Result<Vec<u8>> {
    let len = u32::from_le_bytes(take(input)?) as usize;
    if len > limit {
        return Err(Error::Malformed("a text is too long"));
    }
    let mut bytes = vec![0; len];
    input.read_exact(&mut bytes).map_err(Error::Stream)?;
    Ok(bytes)
}

/// A path below the root: relative, without `.`, `..` and doubled slashes; empty for the root itself.
fn take_dir_path(input: &mut impl Read) -> Result<PathBuf> {
    let bytes = take_bytes(input, MAX_PATH)?;
    let path = PathBuf::from(OsString::from_vec(bytes));
    let plain: PathBuf = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
    if plain.as_os_str() != path.as_os_str() || path.as_os_str().as_bytes().contains(&0) {
        return Err(Error::Malformed("a path leads out of the layer"));
    }
    Ok(path)
}

/// As [`take_dir_path`], but not the root itself.
fn take_path(input: &mut impl Read) -> Result<PathBuf> {
    let path = take_dir_path(input)?;
    if path.as_os_str().is_empty() {
        return Err(Error::Malformed("a path is empty"));
    }
    Ok(path)
}

fn take_time(input: &mut impl Read) -> Result<Time> {
    let seconds = i64::from_le_bytes(take(input)?);
    match u32::from_le_bytes(take(input)?) {
        nanoseconds @ 0..1_000_000_000 => Ok(Time { seconds, nanoseconds }),
        _ => Err(Error::Malformed("a time has more than a second of nanoseconds")),
    }
}

fn take_meta(input: &mut impl Read) -> Result<Meta> {
    let mode = u32::from_le_bytes(take(input)?);
    let (uid, gid) = (u32::from_le_bytes(take(input)?), u32::from_le_bytes(take(input)?));
    let mtime = take_time(input)?;
    let count = u32::from_le_bytes(take(input)?) as usize;
    if mode > 0o7777 || uid == u32::MAX || gid == u32::MAX || count > MAX_XATTRS {
        return Err(Error::Malformed("a file has impossible metadata"));
    }
    let mut xattrs = Vec::new();
    for _ in 0..count {
        let name = take_bytes(input, MAX_XATTR_NAME)?;
        if name.is_empty() || name.contains(&0) || super::scan::is_local(&name) {
            return Err(Error::Malformed("an attribute is none that is carried over"));
        }
        xattrs.push((name, take_bytes(input, MAX_XATTR)?));
    }
    Ok(Meta { mode, uid, gid, mtime, xattrs })
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
