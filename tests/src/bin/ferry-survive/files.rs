//! Open files: their places, those without a name, those that are appended to, and locks.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::sys;
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const F_GETFL: i32 = 3;
const F_GETLK: i32 = 5;
const F_SETLK: i32 = 6;
const F_OFD_GETLK: i32 = 36;
const F_OFD_SETLK: i32 = 37;
const READ_LOCK: i16 = 0;
const WRITE_LOCK: i16 = 1;
const NO_LOCK: i16 = 2;
const FLOCK: i64 = 73;
const EXCLUSIVE: i64 = 2;
const NOT_BLOCKING: i64 = 4;
const UNLOCK: i64 = 8;

/// A path in the root file system that nobody else uses.
pub(crate) fn scratch(name: &str) -> Result<PathBuf, Wrong> {
    let folder = PathBuf::from(format!("/var/survive-{}", std::process::id()));
    fs::create_dir_all(&folder).at("make a folder")?;
    Ok(folder.join(name))
}

fn make(name: &str) -> Result<File, Wrong> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(true).open(scratch(name)?);
    file.at("make a file")
}

fn rest(file: &mut File) -> Result<String, Wrong> {
    let mut text = String::new();
    file.read_to_string(&mut text).at("read a file")?;
    Ok(text)
}

/// Places, access and flags; two descriptors that share a place, and a folder.
pub(crate) fn open(turn: &mut Turn) -> Done {
    let mut file = make("open")?;
    file.write_all(b"0123456789")?;
    file.seek(SeekFrom::Start(4))?;
    let mut same_place = file.try_clone()?;
    let mut reader = File::open(scratch("open")?)?;
    reader.seek(SeekFrom::Start(7))?;
    let folder = File::open("/var")?;
    let flags = |file: &File| sys::control_fd(file.as_raw_fd(), F_GETFL, 0);
    let (was, numbers) = ([flags(&file)?, flags(&reader)?], [file.as_raw_fd(), reader.as_raw_fd()]);
    if turn.pass()? {
        file.seek(SeekFrom::Start(5))?;
    }
    same("the flags", [flags(&file)?, flags(&reader)?], was)?;
    same("the numbers", [file.as_raw_fd(), reader.as_raw_fd()], numbers)?;
    holds("the folder is one", folder.metadata()?.is_dir())?;
    let mut byte = [0];
    same_place.read_exact(&mut byte)?;
    same("the byte at the place that both share", byte, *b"4")?;
    same("the rest", rest(&mut file)?, "56789".to_owned())?;
    same("the reader's rest", rest(&mut reader)?, "789".to_owned())?;
    holds("the reader cannot write", reader.write_all(b"x").is_err())
}

/// Files whose names are gone, one of which was made without any, and one with a name left.
pub(crate) fn deleted(turn: &mut Turn) -> Done {
    let mut file = make("deleted")?;
    file.write_all(b"without a name")?;
    fs::remove_file(scratch("deleted")?)?;
    let mut linked = make("linked")?;
    linked.write_all(b"by another name")?;
    fs::rename(scratch("linked")?, scratch("renamed")?)?;
    let mut folders = make("in-folder")?;
    folders.write_all(b"x")?;
    if turn.pass()? {
        file.write_all(b"!")?;
    }
    same("the number of names", file.metadata()?.nlink(), 0)?;
    for (file, expected) in [(&mut file, "without a name"), (&mut linked, "by another name")] {
        same("the place", file.stream_position()?, expected.len() as u64)?;
        file.rewind()?;
        same("the content", rest(file)?, expected.to_owned())?;
    }
    linked.write_all(b".")?;
    same("by its name", fs::read_to_string(scratch("renamed")?)?, "by another name.".to_owned())?;
    holds("the name is not back", !scratch("deleted")?.exists())
}

/// Every write goes to the end, wherever another descriptor has put that.
pub(crate) fn appended(turn: &mut Turn) -> Done {
    let path = scratch("appended")?;
    let mut file = OpenOptions::new().append(true).create(true).open(&path)?;
    file.write_all(b"one ")?;
    if turn.pass()? {
        file.write_all(b"more ")?;
    }
    let mut other = OpenOptions::new().append(true).open(&path)?;
    other.write_all(b"two ")?;
    file.write_all(b"three")?;
    let text = fs::read_to_string(&path)?;
    fs::remove_file(&path)?;
    same("the file", text, "one two three".to_owned())
}

/// Of fcntl(2).
#[repr(C)]
struct Lock {
    kind: i16,
    whence: i16,
    start: i64,
    length: i64,
    pid: i32,
}

impl Lock {
    fn of(kind: i16, start: i64) -> Self {
        Self { kind, whence: 0, start, length: 10, pid: 0 }
    }

    fn call(&mut self, file: &File, command: i32) -> std::io::Result<()> {
        let at = std::ptr::from_mut(self).addr().cast_signed() as i64;
        sys::control_fd(file.as_raw_fd(), command, at).map(drop)
    }
}

/// A lock of the process, one of an open file, and one of flock(2), each seen by somebody else.
pub(crate) fn locks(turn: &mut Turn) -> Done {
    let file = make("locked")?;
    let whole = make("locked-whole")?;
    Lock::of(WRITE_LOCK, 0).call(&file, F_SETLK)?;
    Lock::of(READ_LOCK, 100).call(&file, F_OFD_SETLK)?;
    sys::call(FLOCK, [whole.as_raw_fd().into(), EXCLUSIVE, 0, 0, 0])?;
    if turn.pass()? {
        sys::call(FLOCK, [whole.as_raw_fd().into(), UNLOCK, 0, 0, 0])?;
    }
    let me = std::process::id().cast_signed();
    // 1 and 2: wrong locks of the first file; 3: no lock of the other.
    let look = move || -> Result<i32, Wrong> {
        let mut other = OpenOptions::new();
        let file = other.read(true).write(true).open(format!("/var/survive-{me}/locked"))?;
        let mut lock = Lock::of(READ_LOCK, 0);
        lock.call(&file, F_GETLK)?;
        if lock.kind != WRITE_LOCK || lock.pid != me {
            return Ok(1);
        }
        let mut lock = Lock::of(WRITE_LOCK, 100);
        lock.call(&file, F_OFD_GETLK)?;
        let mut reads = Lock::of(READ_LOCK, 100);
        reads.call(&file, F_OFD_GETLK)?;
        if lock.kind != READ_LOCK || reads.kind != NO_LOCK {
            return Ok(2);
        }
        let whole = other.open(format!("/var/survive-{me}/locked-whole"))?;
        let taken = sys::call(FLOCK, [whole.as_raw_fd().into(), EXCLUSIVE | NOT_BLOCKING, 0, 0, 0]);
        Ok(if taken.is_ok() { 3 } else { 0 })
    };
    let child = sys::spawn(|| look().unwrap_or(4))?;
    same("what another process sees", sys::wait(child)?, Some(0))
}
