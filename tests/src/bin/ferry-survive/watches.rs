//! inotify, on each kind of file system.

#![expect(unsafe_code, reason = "system calls")]

use std::ffi::{CString, c_char, c_int};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::files::scratch;
use crate::sys::{self, check};
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const NOT_BLOCKING: c_int = 0o4000;
const MODIFY: u32 = 2;
const CREATE: u32 = 0x100;

unsafe extern "C" {
    fn inotify_init1(flags: c_int) -> c_int;
    fn inotify_add_watch(fd: c_int, path: *const c_char, mask: u32) -> c_int;
    fn inotify_rm_watch(fd: c_int, watch: c_int) -> c_int;
}

pub(crate) fn tmpfs(turn: &mut Turn) -> Done {
    watched(turn, Path::new("/scratch"))
}

pub(crate) fn bind(turn: &mut Turn) -> Done {
    watched(turn, Path::new("/bind"))
}

pub(crate) fn root(turn: &mut Turn) -> Done {
    let folder = scratch("watched")?;
    fs::create_dir(&folder)?;
    watched(turn, &folder)
}

fn watch(fd: c_int, path: &Path, mask: u32) -> Result<c_int, Wrong> {
    let path =
        CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Wrong("path".into()))?;
    // SAFETY: a text that ends with a zero.
    check(unsafe { inotify_add_watch(fd, path.as_ptr(), mask) }).at("watch it")
}

/// A folder and a file in it are watched, and go on being watched under the same numbers.
fn watched(turn: &mut Turn, parent: &Path) -> Done {
    let folder = parent.join(format!("watched-{}", std::process::id()));
    fs::create_dir(&folder).at("make a folder")?;
    fs::write(folder.join("file"), "before").at("make a file")?;
    // SAFETY: a plain number.
    let mut events = sys::made(unsafe { inotify_init1(NOT_BLOCKING) })?;
    let of_folder = watch(events.as_raw_fd(), &folder, CREATE)?;
    let of_file = watch(events.as_raw_fd(), &folder.join("file"), MODIFY)?;
    if turn.pass()? {
        // SAFETY: plain numbers.
        check(unsafe { inotify_rm_watch(events.as_raw_fd(), of_file) })?;
        read(&mut events)?;
    }
    same("what has happened", read(&mut events)?, vec![])?;
    fs::write(folder.join("new"), "x")?;
    same("after a file was made", read(&mut events)?, vec![(of_folder, CREATE)])?;
    fs::write(folder.join("file"), "after")?;
    let found = read(&mut events)?;
    // One for making it empty, one for writing.
    holds(&format!("a file was written: {found:?}"), found.contains(&(of_file, MODIFY)))
}

/// Watch and mask of all events that wait.
fn read(events: &mut File) -> Result<Vec<(c_int, u32)>, Wrong> {
    let mut bytes = [0; 4096];
    let length = match events.read(&mut bytes) {
        Ok(length) => length,
        Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => 0,
        Err(err) => return Err(err.into()),
    };
    let (mut rest, mut found) = (&bytes[..length], Vec::new());
    while let [a, b, c, d, e, f, g, h, _, _, _, _, i, j, k, l, name @ ..] = rest {
        found.push((i32::from_ne_bytes([*a, *b, *c, *d]), u32::from_ne_bytes([*e, *f, *g, *h])));
        rest = &name[u32::from_ne_bytes([*i, *j, *k, *l]) as usize..];
    }
    Ok(found)
}
