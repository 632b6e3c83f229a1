//! What has a descriptor and is no file: eventfd, signalfd, epoll.

#![expect(unsafe_code, reason = "system calls")]

use std::ffi::c_int;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;

use crate::signals::{self, SIGUSR1, Set};
use crate::sys::{self, check};
use crate::turn::{Done, In, Turn, Wrong, same};

const NOT_BLOCKING: c_int = 0o4000;
const SEMAPHORE: c_int = 1;
const ADD: c_int = 1;
const MODIFY: c_int = 3;
const IN: u32 = 1;
const EDGE: u32 = 1 << 31;

/// epoll_event.
#[repr(C, packed)]
#[derive(Clone, Copy, Default)]
struct Event {
    events: u32,
    data: u64,
}

unsafe extern "C" {
    fn eventfd(value: u32, flags: c_int) -> c_int;
    fn signalfd(fd: c_int, set: *const Set, flags: c_int) -> c_int;
    fn epoll_create1(flags: c_int) -> c_int;
    fn epoll_ctl(epoll: c_int, what: c_int, fd: c_int, event: *mut Event) -> c_int;
    fn epoll_wait(epoll: c_int, events: *mut Event, most: c_int, time: c_int) -> c_int;
}

fn event(value: u32, flags: c_int) -> Result<File, Wrong> {
    // SAFETY: plain numbers.
    sys::made(unsafe { eventfd(value, flags | NOT_BLOCKING) }).at("make an eventfd")
}

fn number(file: &mut File) -> Result<u64, Wrong> {
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes).at("read a number")?;
    Ok(u64::from_ne_bytes(bytes))
}

/// A counter.
pub(crate) fn events(turn: &mut Turn) -> Done {
    let mut counter = event(40, 0)?;
    counter.write_all(&2_u64.to_ne_bytes())?;
    if turn.pass()? {
        counter.write_all(&1_u64.to_ne_bytes())?;
    }
    same("the counter", number(&mut counter)?, 42)?;
    nothing(&mut counter)
}

/// A counter that is taken one by one.
pub(crate) fn semaphore(turn: &mut Turn) -> Done {
    let mut semaphore = event(2, SEMAPHORE)?;
    if turn.pass()? {
        number(&mut semaphore)?;
    }
    same("the first number", number(&mut semaphore)?, 1)?;
    same("the second number", number(&mut semaphore)?, 1)?;
    nothing(&mut semaphore)
}

fn nothing(file: &mut File) -> Done {
    let err = file.read(&mut [0; 8]).err().map(|err| err.kind());
    same("reading nothing", err, Some(ErrorKind::WouldBlock))
}

/// Signals that wait behind a descriptor, of two kinds.
pub(crate) fn signals(turn: &mut Turn) -> Done {
    let (me, realtime) = (std::process::id().cast_signed(), signals::FIRST_REALTIME + 2);
    let mut set = signals::set_of(SIGUSR1);
    set[0] |= signals::set_of(realtime)[0];
    signals::block(SIGUSR1);
    signals::block(realtime);
    // SAFETY: a set.
    let mut file = sys::made(unsafe { signalfd(-1, &raw const set, NOT_BLOCKING) })?;
    sys::send(me, SIGUSR1)?;
    sys::send(me, realtime)?;
    sys::send(me, realtime)?;
    let mut take = || -> Result<i32, Wrong> {
        let mut info = [0; 128];
        file.read_exact(&mut info).at("read a signal")?;
        Ok(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
    };
    if turn.pass()? {
        take()?;
    }
    same("the signals", [take()?, take()?, take()?], [SIGUSR1, realtime, realtime])?;
    sys::send(me, realtime)?;
    same("a later signal", take()?, realtime)
}

/// One that is ready, one that will be, and a set of another in it.
pub(crate) fn poll(turn: &mut Turn) -> Done {
    let make = || {
        // SAFETY: a plain number.
        sys::made(unsafe { epoll_create1(0) })
    };
    let (outer, inner) = (make()?, make()?);
    let control = |epoll: &File, what, fd: c_int, events, data| {
        let mut event = Event { events, data };
        // SAFETY: one event.
        check(unsafe { epoll_ctl(epoll.as_raw_fd(), what, fd, &raw mut event) })
    };
    let (mut ready, mut nested) = (event(1, 0)?, event(0, 0)?);
    let (mut from, mut to) = std::io::pipe()?;
    control(&outer, ADD, ready.as_raw_fd(), IN, 111)?;
    control(&outer, ADD, from.as_raw_fd(), IN | EDGE, 1 << 40 | 222)?;
    control(&inner, ADD, nested.as_raw_fd(), IN, 333)?;
    control(&outer, ADD, inner.as_raw_fd(), IN, 444)?;
    let wait = |epoll: &File| -> Result<Vec<(u32, u64)>, Wrong> {
        let mut events = [Event::default(); 8];
        // SAFETY: room for as many.
        let count = check(unsafe { epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), 8, 0) })?;
        let mut found: Vec<_> =
            events[..count as usize].iter().map(|event| (event.events, event.data)).collect();
        found.sort_unstable_by_key(|(_, data)| *data);
        Ok(found)
    };
    if turn.pass()? {
        control(&outer, MODIFY, ready.as_raw_fd(), IN, 112)?;
    }
    same("what is ready", wait(&outer)?, vec![(IN, 111)])?;
    number(&mut ready)?;
    same("what is ready after a read", wait(&outer)?, vec![])?;
    nested.write_all(&1_u64.to_ne_bytes())?;
    same("what is ready in the other set", wait(&inner)?, vec![(IN, 333)])?;
    same("what is ready by the other set", wait(&outer)?, vec![(IN, 444)])?;
    number(&mut nested)?;
    to.write_all(b"x")?;
    same("what is ready by a pipe", wait(&outer)?, vec![(IN, 1 << 40 | 222)])?;
    // It says that once.
    same("what is ready once more", wait(&outer)?, vec![])?;
    from.read_exact(&mut [0]).map_err(Wrong::from)
}
