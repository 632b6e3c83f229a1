//! Timers: what is left of them goes on, and those that repeat themselves go on too.

#![expect(unsafe_code, reason = "system calls")]

use std::ffi::{c_int, c_uint, c_void};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use crate::signals;
use crate::sys::{self, check};
use crate::turn::{Done, In, Turn, Wrong, holds, same};

/// What the long timers begin with, and seconds that are more than a test takes.
const LONG: i64 = 10_000;
const TEST: i64 = 1_000;

const REAL: c_int = 0;
const VIRTUAL: c_int = 1;
const CLOCK_REALTIME: c_int = 0;
pub(crate) const CLOCK_MONOTONIC: c_int = 1;
pub(crate) const CLOCK_BOOTTIME: c_int = 7;
const ABSOLUTE: c_int = 1;
const NOT_BLOCKING: c_int = 0o4000;
const SIGALRM: c_int = 14;

/// itimerval and itimerspec: seconds and parts of one; first what comes again and again, then what
/// is left.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Timer {
    again: [i64; 2],
    left: [i64; 2],
}

/// sigevent.
#[repr(C)]
struct Event {
    value: usize,
    signal: c_int,
    kind: c_int,
    rest: [u64; 6],
}

unsafe extern "C" {
    #[link_name = "alarm"]
    fn set_alarm(seconds: c_uint) -> c_uint;
    fn setitimer(which: c_int, new: *const Timer, old: *mut Timer) -> c_int;
    fn getitimer(which: c_int, now: *mut Timer) -> c_int;
    fn timer_create(clock: c_int, event: *mut Event, id: *mut *mut c_void) -> c_int;
    fn timer_settime(id: *mut c_void, f: c_int, new: *const Timer, old: *mut Timer) -> c_int;
    fn timer_gettime(id: *mut c_void, now: *mut Timer) -> c_int;
    fn timerfd_create(clock: c_int, flags: c_int) -> c_int;
    fn timerfd_settime(fd: c_int, f: c_int, new: *const Timer, old: *mut Timer) -> c_int;
    fn timerfd_gettime(fd: c_int, now: *mut Timer) -> c_int;
    fn clock_gettime(clock: c_int, now: *mut [i64; 2]) -> c_int;
}

/// What a clock says, in nanoseconds.
pub(crate) fn now(clock: c_int) -> Result<i64, Wrong> {
    let mut now = [0, 0];
    // SAFETY: room for the time.
    check(unsafe { clock_gettime(clock, &raw mut now) })?;
    Ok(now[0] * 1_000_000_000 + now[1])
}

/// A long timer has gone on, by no more time than has gone by for all.
fn has_gone_on(what: &str, left: i64, begun: SystemTime) -> Done {
    let most = begun.elapsed().unwrap_or_default().as_secs() as i64 + 2;
    let gone = LONG - left;
    holds(
        &format!("{what}: {gone} s are gone of {LONG} s, at most {most}"),
        (0..=most).contains(&gone),
    )
}

pub(crate) fn alarm(turn: &mut Turn) -> Done {
    let begun = SystemTime::now();
    // SAFETY: plain numbers.
    unsafe { set_alarm(LONG as c_uint) };
    if turn.pass()? {
        // SAFETY: as above.
        unsafe { set_alarm((LONG - TEST) as c_uint) };
    }
    // SAFETY: as above.
    let left = unsafe { set_alarm(0) };
    has_gone_on("the alarm", left.into(), begun)
}

static TICKS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn tick(_: c_int) {
    TICKS.fetch_add(1, Ordering::Relaxed);
}

/// One of 20 ms that is heard by a handler, and a long one of the process's own time.
pub(crate) fn intervals(turn: &mut Turn) -> Done {
    signals::handle(SIGALRM, tick)?;
    let set = |which, timer: Timer| {
        // SAFETY: one timer, and nobody asks for the old one.
        check(unsafe { setitimer(which, &raw const timer, std::ptr::null_mut()) })
    };
    set(REAL, Timer { again: [0, 20_000], left: [0, 20_000] })?;
    let (begun, long) = (SystemTime::now(), Timer { again: [77, 5], left: [LONG, 0] });
    set(VIRTUAL, long)?;
    if turn.pass()? {
        set(REAL, Timer::default())?;
    }
    let ticks = TICKS.load(Ordering::Relaxed);
    sleep(Duration::from_millis(300))?;
    let more = TICKS.load(Ordering::Relaxed) - ticks;
    set(REAL, Timer::default())?;
    holds(&format!("ticks come: {more} in 300 ms"), (3..=16).contains(&more))?;
    let mut left = Timer::default();
    // SAFETY: room for one.
    check(unsafe { getitimer(VIRTUAL, &raw mut left) })?;
    same("what comes again", left.again, long.again)?;
    has_gone_on("the process's timer", left.left[0], begun)
}

/// Sleeps through signals, by the clock of all.
fn sleep(time: Duration) -> Result<(), Wrong> {
    let end = now(CLOCK_MONOTONIC)? + time.as_nanos() as i64;
    while now(CLOCK_MONOTONIC)? < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Of both clocks, with a signal of their own and without any.
pub(crate) fn posix(turn: &mut Turn) -> Done {
    const NONE: c_int = 1;
    const SIGNAL: c_int = 0;
    let begun = SystemTime::now();
    signals::block(signals::FIRST_REALTIME + 5);
    let timer = Timer { again: [9, 9], left: [LONG, 0] };
    let mut ids = Vec::new();
    for (clock, kind) in [(CLOCK_MONOTONIC, SIGNAL), (CLOCK_REALTIME, NONE)] {
        let mut event =
            Event { value: 31, signal: signals::FIRST_REALTIME + 5, kind, rest: [0; 6] };
        let mut id = std::ptr::null_mut();
        // SAFETY: an event and room for the id.
        check(unsafe { timer_create(clock, &raw mut event, &raw mut id) })?;
        // SAFETY: the id is one; nobody asks for the old timer.
        check(unsafe { timer_settime(id, 0, &raw const timer, std::ptr::null_mut()) })?;
        ids.push(id);
    }
    let listed = || std::fs::read_to_string("/proc/self/timers").at("read the list of timers");
    let was = listed()?;
    if turn.pass()? {
        let changed = Timer { left: [LONG - TEST, 0], ..timer };
        // SAFETY: as above.
        check(unsafe { timer_settime(ids[0], 0, &raw const changed, std::ptr::null_mut()) })?;
    }
    same("the list of timers", listed()?, was)?;
    for (n, id) in ids.into_iter().enumerate() {
        let mut left = Timer::default();
        // SAFETY: the id is one, and there is room.
        check(unsafe { timer_gettime(id, &raw mut left) })?;
        same("what comes again", left.again, timer.again)?;
        has_gone_on(&format!("timer {n}"), left.left[0], begun)?;
    }
    Ok(())
}

fn make(clock: c_int, flags: c_int, timer: Timer) -> Result<std::fs::File, Wrong> {
    // SAFETY: plain numbers.
    let file = sys::made(unsafe { timerfd_create(clock, NOT_BLOCKING) })?;
    let none = std::ptr::null_mut();
    // SAFETY: a timer; nobody asks for the old one.
    check(unsafe { timerfd_settime(file.as_raw_fd(), flags, &raw const timer, none) })?;
    Ok(file)
}

/// A long one, and one to a moment.
pub(crate) fn descriptors(turn: &mut Turn) -> Done {
    let begun = SystemTime::now();
    let again = [3, 500];
    let long = make(CLOCK_MONOTONIC, 0, Timer { again, left: [LONG, 0] })?;
    let moment = now(CLOCK_BOOTTIME)? / 1_000_000_000 + LONG;
    let until = make(CLOCK_BOOTTIME, ABSOLUTE, Timer { again, left: [moment, 0] })?;
    if turn.pass()? {
        let shorter = Timer { again, left: [LONG - TEST, 0] };
        // SAFETY: as above.
        check(unsafe {
            timerfd_settime(long.as_raw_fd(), 0, &raw const shorter, std::ptr::null_mut())
        })?;
    }
    for (what, file) in [("the long one", &long), ("the one to a moment", &until)] {
        let mut left = Timer::default();
        // SAFETY: room for one.
        check(unsafe { timerfd_gettime(file.as_raw_fd(), &raw mut left) })?;
        same("what comes again", left.again, again)?;
        has_gone_on(what, left.left[0], begun)?;
    }
    Ok(())
}

/// One that goes off again and again, and has when the moment comes, which nobody has heard yet.
pub(crate) fn expired(turn: &mut Turn) -> Done {
    let every = [0, 10_000_000];
    let mut short = make(CLOCK_MONOTONIC, 0, Timer { again: every, left: every })?;
    sleep(Duration::from_millis(30))?;
    if turn.pass()? {
        let none = std::ptr::null_mut();
        // SAFETY: as above.
        check(unsafe { timerfd_settime(short.as_raw_fd(), 0, &Timer::default(), none) })?;
    }
    for time in ["for the first time", "once more", "for the third time"] {
        sleep(Duration::from_millis(50))?;
        let mut count = [0; 8];
        short.read_exact(&mut count).at(&format!("read it {time}"))?;
        holds("it has gone off", u64::from_ne_bytes(count) > 0)?;
    }
    Ok(())
}
