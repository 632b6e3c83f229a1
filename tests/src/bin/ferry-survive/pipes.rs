//! Pipes and FIFOs with data in them.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use crate::files::scratch;
use crate::sys;
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const F_SETFL: i32 = 4;
const F_SETPIPE_SZ: i32 = 1031;
const F_GETPIPE_SZ: i32 = 1032;
const O_NONBLOCK: i64 = 0o4000;
const MKNOD: i64 = 133;
const FIFO: i64 = 0o10_600;

/// More than one page.
fn data() -> Vec<u8> {
    (0..10_000).map(|n| sys::byte(5, n)).collect()
}

pub(crate) fn pipe(turn: &mut Turn) -> Done {
    let (mut answers, told) = std::io::pipe()?;
    // Another process has the other end of a pipe.
    let child = sys::spawn(|| {
        let mut told = told;
        let _ = told.write_all(b"hello");
        loop {
            std::thread::park();
        }
    })?;
    let (mut from, mut to) = std::io::pipe()?;
    sys::control_fd(to.as_raw_fd(), F_SETPIPE_SZ, 1 << 18)?;
    sys::control_fd(from.as_raw_fd(), F_SETFL, O_NONBLOCK)?;
    let size = sys::control_fd(to.as_raw_fd(), F_GETPIPE_SZ, 0)?;
    to.write_all(&data())?;
    if turn.pass()? {
        from.read_exact(&mut [0])?;
    }
    same("the size of the pipe", sys::control_fd(to.as_raw_fd(), F_GETPIPE_SZ, 0)?, size)?;
    drained(&mut from)?;
    let err = from.read(&mut [0]).err().map(|err| err.kind());
    same("reading an empty pipe", err, Some(std::io::ErrorKind::WouldBlock))?;
    to.write_all(b"goes on")?;
    let mut more = [0; 7];
    from.read_exact(&mut more)?;
    same("what goes through it", more, *b"goes on")?;
    drop(to);
    same("the end", from.read(&mut [0])?, 0)?;
    let mut hello = [0; 5];
    answers.read_exact(&mut hello)?;
    same("what the other process has said", hello, *b"hello")?;
    sys::end(child)?;
    same("its end", answers.read(&mut [0])?, 0)
}

pub(crate) fn fifo(turn: &mut Turn) -> Done {
    let path = scratch("fifo")?;
    let name =
        CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Wrong("name".into()))?;
    sys::call(MKNOD, [name.as_ptr().addr().cast_signed() as i64, FIFO, 0, 0, 0])
        .at("make a FIFO")?;
    // Both at once, or the first would wait for the second.
    let mut both = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut from = File::open(&path)?;
    let mut to = OpenOptions::new().write(true).open(&path)?;
    to.write_all(&data())?;
    if turn.pass()? {
        both.read_exact(&mut [0])?;
        both.write_all(b"?")?;
    }
    drained(&mut from)?;
    to.write_all(b"1")?;
    both.write_all(b"2")?;
    // One who opens it by its name finds the same.
    let mut other = File::open(&path)?;
    let mut two = [0; 2];
    other.read_exact(&mut two)?;
    same("what goes through it", two, *b"12")?;
    drop((both, to));
    same("the end", from.read(&mut [0])?, 0)?;
    holds("its name is there", std::fs::remove_file(path).is_ok())
}

fn drained(from: &mut impl Read) -> Done {
    let mut found = vec![0; data().len()];
    from.read_exact(&mut found).at("read what was in it")?;
    holds("the data is as it was", found == data())
}
