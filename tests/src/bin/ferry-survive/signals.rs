//! Signals: those that wait, and what is done when they come.

#![expect(unsafe_code, reason = "handlers and system calls")]

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys::{self, check};
use crate::turn::{Done, In, Turn, Wrong, holds, same};

/// The first that a program may use.
pub(crate) const FIRST_REALTIME: c_int = 34;
const SIGHUP: c_int = 1;
pub(crate) const SIGUSR1: c_int = 10;
const SIGUSR2: c_int = 12;
const BLOCK: c_int = 0;
const UNBLOCK: c_int = 1;
const INFO: c_int = 4;
const ON_STACK: c_int = 0x0800_0000;
const RESTART: c_int = 0x1000_0000;
const TGKILL: i64 = 234;
const IGNORE: usize = 1;

/// sigset_t.
pub(crate) type Set = [u64; 16];

/// struct sigaction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Action {
    handler: usize,
    mask: Set,
    flags: c_int,
    restorer: usize,
}

/// siginfo_t of a signal that was sent.
#[repr(C)]
#[derive(Default)]
struct Info {
    signal: c_int,
    errno: c_int,
    code: c_int,
    pad: c_int,
    pid: c_int,
    uid: c_int,
    value: usize,
    rest: [u64; 12],
}

/// stack_t.
#[repr(C)]
#[derive(Debug, PartialEq, Eq)]
struct Stack {
    at: usize,
    flags: c_int,
    length: usize,
}

unsafe extern "C" {
    fn sigprocmask(how: c_int, new: *const Set, old: *mut Set) -> c_int;
    fn sigaction(signal: c_int, new: *const Action, old: *mut Action) -> c_int;
    fn sigqueue(pid: c_int, signal: c_int, value: usize) -> c_int;
    fn sigtimedwait(set: *const Set, info: *mut Info, time: *const [i64; 2]) -> c_int;
    fn sigaltstack(new: *const Stack, old: *mut Stack) -> c_int;
}

pub(crate) fn set_of(signal: c_int) -> Set {
    let mut set = [0; 16];
    set[0] = 1 << (signal - 1);
    set
}

/// Blocks a signal for this thread.
pub(crate) fn block(signal: c_int) {
    // SAFETY: a set, and nobody asks for the old one.
    unsafe { sigprocmask(BLOCK, &set_of(signal), std::ptr::null_mut()) };
}

/// Has a function called when a signal comes, and calls that are interrupted go on.
pub(crate) fn handle(signal: c_int, handler: extern "C" fn(c_int)) -> io::Result<()> {
    let handler = (handler as *const ()).expose_provenance();
    act(signal, Action { handler, flags: RESTART, ..Action::default() })
}

fn act(signal: c_int, action: Action) -> io::Result<()> {
    // SAFETY: the handlers of this program store to atomics alone.
    check(unsafe { sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

/// Lines of this process's status.
pub(crate) fn status(names: &[&str]) -> Result<Vec<String>, Wrong> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let is_asked = |line: &&str| names.iter().any(|name| line.split(':').next() == Some(name));
    Ok(text.lines().filter(is_asked).map(str::to_owned).collect())
}

/// Takes one that waits: its value, and who has sent it.
fn take(signal: c_int) -> io::Result<(usize, c_int)> {
    let mut info = Info::default();
    // SAFETY: a set, room for what is known of the signal, and a time.
    check(unsafe { sigtimedwait(&set_of(signal), &raw mut info, &[0, 0]) })?;
    Ok((info.value, info.pid))
}

/// One for the process, one for its thread, and three of one kind with their values and order.
pub(crate) fn pending(turn: &mut Turn) -> Done {
    let me = std::process::id().cast_signed();
    for signal in [SIGUSR1, SIGUSR2, FIRST_REALTIME] {
        block(signal);
    }
    sys::send(me, SIGUSR1)?;
    sys::call(TGKILL, [me.into(), me.into(), SIGUSR2.into(), 0, 0])?;
    for value in [11, 12, 13] {
        // SAFETY: plain numbers.
        check(unsafe { sigqueue(me, FIRST_REALTIME, value) })?;
    }
    let lines = || status(&["SigPnd", "ShdPnd", "SigBlk"]);
    let was = lines()?;
    if turn.pass()? {
        take(FIRST_REALTIME)?;
    }
    same("what waits", lines()?, was)?;
    for value in [11, 12, 13] {
        same("value and sender", take(FIRST_REALTIME).at("take one")?, (value, me))?;
    }
    same("the process's sender", take(SIGUSR1).at("take the process's")?.1, me)?;
    same("the thread's sender", take(SIGUSR2).at("take the thread's")?.1, me)?;
    holds("there are no more", take(FIRST_REALTIME).is_err())
}

static CALLS: AtomicUsize = AtomicUsize::new(0);
static PLACE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn called(_: c_int, _: *const Info, _: *const c_void) {
    let here = 0_u8;
    PLACE.store((&raw const here).addr(), Ordering::Relaxed);
    CALLS.fetch_add(1, Ordering::Relaxed);
}

/// Handler, mask and flags; the rest is the C library's.
fn actions() -> io::Result<Vec<(usize, u64, c_int)>> {
    let read = |signal| {
        let mut action = Action::default();
        // SAFETY: room for what is set.
        check(unsafe { sigaction(signal, std::ptr::null(), &raw mut action) })?;
        Ok((action.handler, action.mask[0], action.flags))
    };
    // Two are the C library's own.
    (1..65).filter(|signal| ![32, 33].contains(signal)).map(read).collect()
}

/// A handler on a stack of its own, one that is ignored, and all that is set.
pub(crate) fn handlers(turn: &mut Turn) -> Done {
    let stack = vec![0_u64; 8192].leak();
    let stack = Stack { at: stack.as_mut_ptr().expose_provenance(), flags: 0, length: 8192 * 8 };
    // SAFETY: the stack is never freed.
    check(unsafe { sigaltstack(&raw const stack, std::ptr::null_mut()) })?;
    let handler = (called as *const ()).expose_provenance();
    let action =
        Action { handler, mask: set_of(SIGUSR2), flags: INFO | ON_STACK | RESTART, restorer: 0 };
    act(SIGUSR1, action)?;
    act(SIGHUP, Action { handler: IGNORE, ..Action::default() })?;
    let lines = || status(&["SigBlk", "SigIgn", "SigCgt"]);
    let was = (actions()?, lines()?);
    if turn.pass()? {
        act(SIGUSR1, Action { flags: INFO | ON_STACK, ..action })?;
    }
    same("what is done when signals come", (actions()?, lines()?), was)?;
    let me = std::process::id().cast_signed();
    // SAFETY: a set, and nobody asks for the old one.
    unsafe { sigprocmask(UNBLOCK, &set_of(SIGUSR1), std::ptr::null_mut()) };
    sys::send(me, SIGHUP)?;
    sys::call(TGKILL, [me.into(), me.into(), SIGUSR1.into(), 0, 0])?;
    same("the number of calls", CALLS.load(Ordering::Relaxed), 1)?;
    let place = PLACE.load(Ordering::Relaxed);
    holds("it runs on its stack", (stack.at..stack.at + stack.length).contains(&place))
}
