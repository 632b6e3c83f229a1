//! Terminals: the container's own, and a pair that the program has made.

use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsRawFd;

use crate::sys;
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const TCGETS: u64 = 0x5401;
const TCSETS: u64 = 0x5402;
const TIOCGPGRP: u64 = 0x540f;
const TIOCGSID: u64 = 0x5429;
const TIOCGWINSZ: u64 = 0x5413;
const TIOCSWINSZ: u64 = 0x5414;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGPTN: u64 = 0x8004_5430;
const ECHO: u32 = 8;
const VMIN: usize = 6;
const O_NOCTTY: i32 = 0o400;

/// termios, as the kernel has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Settings {
    input: u32,
    output: u32,
    control: u32,
    local: u32,
    line: u8,
    characters: [u8; 19],
}

/// Rows, columns, and two that nobody uses.
type Size = [u16; 4];

fn get<T: Default>(fd: i32, request: u64) -> Result<T, Wrong> {
    let mut value = T::default();
    sys::control_device(fd, request, &mut value).at("ask the terminal")?;
    Ok(value)
}

/// Makes both differ from what a new terminal has.
fn set(fd: i32, rows: u16) -> Result<(Settings, Size), Wrong> {
    let mut settings: Settings = get(fd, TCGETS)?;
    settings.local &= !ECHO;
    settings.characters[VMIN] = 3;
    sys::control_device(fd, TCSETS, &mut settings)?;
    let mut size: Size = [rows, 133, 0, 0];
    sys::control_device(fd, TIOCSWINSZ, &mut size)?;
    Ok((get(fd, TCGETS)?, size))
}

fn now(fd: i32) -> Result<(Settings, Size), Wrong> {
    Ok((get(fd, TCGETS)?, get(fd, TIOCGWINSZ)?))
}

/// The one that the container was started with: its name, settings, size, session and group.
pub(crate) fn own(turn: &mut Turn) -> Done {
    holds("there is a terminal", std::io::stdin().is_terminal())?;
    let was = set(0, 41)?;
    let place = || -> Result<_, Wrong> {
        let name = fs::read_link("/proc/self/fd/0")?;
        Ok((name, get::<i32>(0, TIOCGPGRP)?, get::<i32>(0, TIOCGSID)?))
    };
    let (was_place, control) = (place()?, turn.is_control());
    if turn.pass()? {
        sys::control_device(0, TIOCSWINSZ, &mut [40_u16, 133, 0, 0])?;
    }
    same("settings and size", now(0)?, was)?;
    same("name, group and session", place()?, was_place)?;
    let mut tty = OpenOptions::new().write(true).open("/dev/tty").at("open it by its name")?;
    if !control {
        tty.write_all(b"survived\n")?;
        let mut typed = [0; 5];
        std::io::stdin().read_exact(&mut typed).at("read what is typed")?;
        same("what is typed", typed, *b"typed")?;
    }
    Ok(())
}

/// A pair of the program's own, with something that was written and not read.
pub(crate) fn pair(turn: &mut Turn) -> Done {
    let mut master = open("/dev/ptmx")?;
    sys::control_device(master.as_raw_fd(), TIOCSPTLCK, &mut 0_i32)?;
    let number: u32 = get(master.as_raw_fd(), TIOCGPTN)?;
    let name = format!("/dev/pts/{number}");
    let mut slave = open(&name)?;
    let was = set(slave.as_raw_fd(), 51)?;
    slave.write_all(b"waits")?;
    if turn.pass()? {
        sys::control_device(slave.as_raw_fd(), TIOCSWINSZ, &mut [50_u16, 133, 0, 0])?;
    }
    same("settings and size", now(slave.as_raw_fd())?, was)?;
    same("number", get(master.as_raw_fd(), TIOCGPTN)?, number)?;
    let mut waits = [0; 5];
    master.read_exact(&mut waits)?;
    same("what was written and not read", waits, *b"waits")?;
    master.write_all(b"line\n")?;
    let mut line = [0; 5];
    slave.read_exact(&mut line)?;
    same("what goes through it", line, *b"line\n")?;
    let mut again = open(&name).at("open it by its name")?;
    again.write_all(b"again").map_err(Wrong::from)
}

fn open(path: &str) -> Result<File, Wrong> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(O_NOCTTY).open(path).at(path)
}
