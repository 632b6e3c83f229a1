//! IPC of System V.

#![expect(unsafe_code, reason = "system calls")]

use std::ffi::{c_int, c_long, c_void};
use std::io;

use crate::sys::{self, Memory, PAGE, check};
use crate::turn::{Done, In, Turn, Wrong, same};

const CREATE: c_int = 0o1000;
const EXCLUSIVE: c_int = 0o2000;
const REMOVE: c_int = 0;
const SETVAL: c_int = 16;
const GETVAL: c_int = 12;
const NOT_WAITING: c_int = 0o4000;
const UNDO: i16 = 0x1000;

unsafe extern "C" {
    fn shmget(key: c_int, length: usize, flags: c_int) -> c_int;
    fn shmat(id: c_int, at: *const c_void, flags: c_int) -> *mut c_void;
    fn shmctl(id: c_int, command: c_int, data: *mut c_void) -> c_int;
    fn semget(key: c_int, count: c_int, flags: c_int) -> c_int;
    fn semctl(id: c_int, number: c_int, command: c_int, ...) -> c_int;
    fn semop(id: c_int, steps: *mut Step, count: usize) -> c_int;
    fn msgget(key: c_int, flags: c_int) -> c_int;
    fn msgsnd(id: c_int, message: *const Text, length: usize, flags: c_int) -> c_int;
    fn msgrcv(id: c_int, message: *mut Text, length: usize, kind: c_long, flags: c_int) -> isize;
    fn msgctl(id: c_int, command: c_int, data: *mut c_void) -> c_int;
}

/// sembuf.
#[repr(C)]
struct Step {
    number: u16,
    by: i16,
    flags: i16,
}

/// msgbuf.
#[repr(C)]
struct Text {
    kind: c_long,
    text: [u8; 16],
}

/// A key of this process alone.
fn key(n: u32) -> c_int {
    (0x5000_0000 + (std::process::id() << 4) + n).cast_signed()
}

fn segment(key: c_int, flags: c_int) -> io::Result<c_int> {
    // SAFETY: plain numbers.
    check(unsafe { shmget(key, 4 * PAGE, flags | 0o640) })
}

fn attached(id: c_int) -> io::Result<Memory> {
    // SAFETY: the kernel chooses where, so nothing that is in use is touched.
    Memory::mapped(unsafe { shmat(id, std::ptr::null(), 0) }, 4 * PAGE)
}

/// By its key and its id, attached; and one that is marked for removal.
pub(crate) fn shared_memory(turn: &mut Turn) -> Done {
    let id = segment(key(1), CREATE | EXCLUSIVE)?;
    let memory = attached(id)?;
    memory.fill(11);
    let child = sys::spawn(move || {
        while memory.get(0) != 0xdd {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        memory.set(1, 0xee);
        0
    })?;
    if turn.pass()? {
        memory.set(PAGE, memory.get(PAGE) ^ 1);
    }
    same("the first byte that differs", memory.differs(11), None)?;
    same("the id of the key", segment(key(1), 0)?, id)?;
    memory.set(0, 0xdd);
    same("the end of the other process", sys::wait(child)?, Some(0))?;
    let again = attached(id)?;
    same("what is found by the id", [again.get(0), again.get(1)], [0xdd, 0xee])?;
    // SAFETY: removing takes no data.
    check(unsafe { shmctl(id, REMOVE, std::ptr::null_mut()) }).at("remove it")?;
    Ok(())
}

/// Three values, and what is undone at the end of a process.
pub(crate) fn semaphores(turn: &mut Turn) -> Done {
    let open = |flags| {
        // SAFETY: plain numbers.
        check(unsafe { semget(key(2), 3, flags | 0o600) })
    };
    let id = open(CREATE | EXCLUSIVE)?;
    for (n, value) in [3, 0, 17].into_iter().enumerate() {
        // SAFETY: this command takes a number.
        check(unsafe { semctl(id, n as c_int, SETVAL, value as c_int) })?;
    }
    if turn.pass()? {
        step(id, 2, -1, 0)?;
    }
    same("the id of the key", open(0)?, id)?;
    let values = || {
        // SAFETY: this command takes nothing.
        (0..3).map(|n| check(unsafe { semctl(id, n, GETVAL) })).collect::<io::Result<Vec<_>>>()
    };
    same("the values", values()?, vec![3, 0, 17])?;
    let child = sys::spawn(|| i32::from(step(id, 0, -2, UNDO).is_err()))?;
    same("the end of the other process", sys::wait(child)?, Some(0))?;
    same("the values after another process", values()?, vec![3, 0, 17])?;
    step(id, 0, -3, 0)?;
    same("the values after a change", values()?, vec![0, 0, 17])?;
    // SAFETY: removing takes nothing.
    check(unsafe { semctl(id, 0, REMOVE) }).at("remove them")?;
    Ok(())
}

fn step(id: c_int, number: u16, by: i16, flags: i16) -> io::Result<()> {
    let mut step = Step { number, by, flags };
    // SAFETY: one step.
    check(unsafe { semop(id, &raw mut step, 1) }).map(drop)
}

/// Messages of two kinds in their order.
pub(crate) fn messages(turn: &mut Turn) -> Done {
    // SAFETY: plain numbers.
    let open = |flags| check(unsafe { msgget(key(3), flags | 0o600) });
    let id = open(CREATE | EXCLUSIVE)?;
    let receive = |kind| -> Result<(i64, u8, isize), Wrong> {
        let mut text = Text { kind: 0, text: [0; 16] };
        // SAFETY: room for the text.
        let length = unsafe { msgrcv(id, &raw mut text, 16, kind, NOT_WAITING) };
        if length < 0 {
            Err(io::Error::last_os_error().into())
        } else {
            Ok((text.kind, text.text[0], length))
        }
    };
    for (kind, first, length) in [(1, b'a', 16), (2, b'b', 5), (1, b'c', 1)] {
        let text = Text { kind, text: [first; 16] };
        // SAFETY: the text has that length.
        check(unsafe { msgsnd(id, &raw const text, length, 0) })?;
    }
    if turn.pass()? {
        receive(1)?;
    }
    same("the id of the key", open(0)?, id)?;
    same("the first of kind 2", receive(2).at("receive it")?, (2, b'b', 5))?;
    same("the first", receive(0).at("receive it")?, (1, b'a', 16))?;
    same("the last", receive(0).at("receive it")?, (1, b'c', 1))?;
    // SAFETY: removing takes no data.
    check(unsafe { msgctl(id, REMOVE, std::ptr::null_mut()) }).at("remove them")?;
    Ok(())
}
