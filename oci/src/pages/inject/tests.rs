//! Processes in every state in which one may be met.
#![allow(unsafe_code)] // The system calls that are to be interrupted, called as they are.

mod standing;

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::pages::tracker::probe;
use crate::pages::tracker::workload::{Random, Workload, kill};

macro_rules! need_userfaultfd {
    ($name:literal) => {
        let found = probe();
        if !found.write_protect {
            println!("skipped: {}: {}", $name, found.write_protect_why);
            return;
        }
    };
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::SeqCst);
}

/// What a workload does when it is told to be in a system call: says what came of it.
pub(crate) fn block(what: &str) -> String {
    let begin = Instant::now();
    let time = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    let mut byte = [0u8; 2];
    let mut input = libc::pollfd { fd: 0, events: libc::POLLIN, revents: 0 };
    let word = 0u32;
    // SAFETY: system calls on locals and on the standard input of a process that only a test uses.
    let result = unsafe {
        match what {
            "read" => libc::read(0, byte.as_mut_ptr().cast(), 2) as i64,
            "nanosleep" => libc::syscall(libc::SYS_nanosleep, &raw const time, null_mut::<u8>()),
            "futex" => libc::syscall(
                libc::SYS_futex,
                &raw const word,
                libc::FUTEX_WAIT,
                0,
                &raw const time,
            ),
            "poll" => libc::poll(&raw mut input, 1, -1).into(),
            "epoll" => {
                let epoll = libc::epoll_create1(0);
                let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };
                libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, 0, &raw mut event);
                loop {
                    let events = libc::epoll_wait(epoll, &raw mut event, 1, -1);
                    let interrupted =
                        io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
                    if events >= 0 || !interrupted {
                        break events.into();
                    }
                }
            }
            "signals" => {
                let handler = count as extern "C" fn(libc::c_int);
                libc::signal(libc::SIGRTMIN(), handler as libc::sighandler_t);
                let mut none: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut none);
                while SIGNALS.load(Ordering::SeqCst) < 500 {
                    libc::ppoll(null_mut(), 0, &raw const time, &raw const none);
                }
                500
            }
            "spin" => spin() as i64,
            "seccomp" => seccomp(),
            "userfaultfd" => libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1),
            other => panic!("{other}"),
        }
    };
    if matches!(what, "poll" | "epoll") {
        // SAFETY: the buffer has room for two bytes.
        unsafe { libc::read(0, byte.as_mut_ptr().cast(), 2) };
    }
    let errno = if result < 0 { io::Error::last_os_error().raw_os_error() } else { None };
    format!("{result} {} {}", errno.unwrap_or(0), begin.elapsed().as_millis())
}

/// Something with many registers in use, whose result tells whether one was changed.
fn spin() -> u64 {
    let mut random = Random(88_172_645_463_325_252);
    let (mut whole, mut parts) = (0u64, [1.0f64; 8]);
    for _ in 0..20_000_000u32 {
        let value = random.next();
        whole = whole.rotate_left(7) ^ value;
        for (at, part) in parts.iter_mut().enumerate() {
            *part = part.mul_add(0.999, (value >> at & 0xff) as f64);
        }
    }
    parts.iter().fold(whole, |sum, part| sum ^ part.to_bits()) >> 1
}

/// Has the kernel kill this process when it calls userfaultfd(2).
unsafe fn seccomp() -> i64 {
    let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_userfaultfd as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program and its statements outlive the call.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program).into()
    }
}

/// Everything of a process that an injection could leave behind.
fn traces(pid: i32) -> (usize, String, String) {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
    (fds, line("TracerPid"), line("SigBlk"))
}

/// Waits until the process sleeps in a system call.
fn wait_asleep(pid: i32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !matches!(Status::read(pid).unwrap().state, 'S') {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
    // It may have slept before it read the command.
    thread::sleep(Duration::from_millis(50));
}

fn assert_userfaultfd(fd: &OwnedFd) {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    assert_eq!(link.to_str(), Some(LINK));
}

/// Interrupts a workload in the system call many times; gives what the call then answered:
/// its result, error number and how long it took, ms.
fn interrupted(what: &str, times: u32, pause: Duration, end: &str) -> (i64, i64, i64) {
    let mut workload = Workload::start();
    let pid = workload.pid();
    workload.send(&format!("block {what}"));
    wait_asleep(pid);
    let before = traces(pid);
    for _ in 0..times {
        assert_userfaultfd(&take_userfaultfd(pid, &[]).unwrap().fd);
        assert_eq!(traces(pid), before);
        thread::sleep(pause);
    }
    if !end.is_empty() {
        workload.send(end);
    }
    let answer = workload.answer();
    let numbers: Vec<i64> = answer.split(' ').map(|n| n.parse().unwrap()).collect();
    (numbers[0], numbers[1], numbers[2])
}

const SHORT: Duration = Duration::from_millis(1);

#[test]
fn a_read_goes_on_as_if_nothing_had_been() {
    need_userfaultfd!("a_read_goes_on_as_if_nothing_had_been");
    let (result, errno, _) = interrupted("read", 30, SHORT, "x");
    assert_eq!((result, errno), (2, 0));
}

#[test]
fn poll_and_epoll_wait_see_their_event() {
    need_userfaultfd!("poll_and_epoll_wait_see_their_event");
    assert_eq!(interrupted("poll", 30, SHORT, "x").0, 1);
    assert_eq!(interrupted("epoll", 30, SHORT, "x").0, 1);
}

#[test]
fn a_sleep_lasts_as_long_as_it_should_and_no_longer() {
    need_userfaultfd!("a_sleep_lasts_as_long_as_it_should_and_no_longer");
    let (result, errno, took) = interrupted("nanosleep", 12, Duration::from_millis(50), "");
    assert_eq!((result, errno), (0, 0));
    assert!((1000..1600).contains(&took), "{took} ms");
    let (result, errno, took) = interrupted("futex", 12, Duration::from_millis(50), "");
    assert_eq!((result, errno), (-1, libc::ETIMEDOUT.into()));
    assert!((1000..1600).contains(&took), "{took} ms");
}

#[test]
fn a_process_that_computes_keeps_its_registers() {
    need_userfaultfd!("a_process_that_computes_keeps_its_registers");
    let expected = spin().to_string();
    let mut workload = Workload::start();
    let pid = workload.pid();
    workload.send("block spin");
    let begin = Instant::now();
    let mut stops = 0;
    while begin.elapsed() < Duration::from_millis(300) || stops < 20 {
        assert_userfaultfd(&take_userfaultfd(pid, &[]).unwrap().fd);
        stops += 1;
    }
    assert_eq!(workload.answer().split(' ').next(), Some(expected.as_str()));
}

/// Signals come all the time while `stop` stops the process again and again; none is lost.
fn loses_no_signal(stop: impl Fn(i32)) {
    let mut workload = Workload::start();
    let pid = workload.pid();
    workload.send("block signals");
    wait_asleep(pid);
    let before = traces(pid);
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..500 {
                // SAFETY: the call takes numbers only.
                unsafe { libc::syscall(libc::SYS_kill, pid, libc::SIGRTMIN()) };
                if number % 4 == 0 {
                    thread::sleep(Duration::from_micros(300));
                }
            }
        });
        for _ in 0..100 {
            stop(pid);
        }
    });
    assert!(workload.answer().starts_with("500 "));
    assert_eq!(traces(pid).1, before.1);
    assert_eq!(workload.tell("map a 1 rw").len(), 12);
}

#[test]
fn no_signal_is_lost() {
    need_userfaultfd!("no_signal_is_lost");
    loses_no_signal(|pid| drop(take_userfaultfd(pid, &[]).unwrap()));
}

#[test]
fn a_process_whose_filter_forbids_it_lives() {
    need_userfaultfd!("a_process_whose_filter_forbids_it_lives");
    let mut workload = Workload::start();
    assert!(workload.tell("block seccomp").starts_with("0 "));
    assert_userfaultfd(&take_userfaultfd(workload.pid(), &[]).unwrap().fd);
    assert_eq!(workload.tell("map a 1 rw").len(), 12);
    // The filter is in force again.
    workload.send("block userfaultfd");
    let deadline = Instant::now() + Duration::from_secs(10);
    while !matches!(Status::read(workload.pid()), Err(_) | Ok(Status { state: 'Z', .. })) {
        assert!(Instant::now() < deadline, "the process lives on");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(matches!(take_userfaultfd(workload.pid(), &[]), Err(InjectError::Gone(_))));
}

#[test]
fn a_stopped_process_is_refused_and_left_stopped() {
    let mut workload = Workload::start();
    workload.stop();
    let error = take_userfaultfd(workload.pid(), &[]).unwrap_err();
    assert!(matches!(error, InjectError::Stopped(_)), "{error}");
    assert_eq!(Status::read(workload.pid()).unwrap().state, 'T');
    workload.go_on();
    assert_eq!(workload.tell("map a 1 rw").len(), 12);
}

#[test]
fn a_traced_process_is_refused_with_the_tracer() {
    let workload = Workload::start();
    let pid = workload.pid();
    let Ok(Seized { tracee, .. }) = Tracee::seize(pid) else {
        panic!("not seized");
    };
    let error = take_userfaultfd(pid, &[]).unwrap_err();
    // The kernel names the thread.
    // SAFETY: the call takes nothing.
    let thread = unsafe { libc::gettid() };
    assert!(matches!(error, InjectError::Traced { by, .. } if by == thread), "{error}");
    tracee.stop(STOP).unwrap();
    assert!(tracee.release(RESTORE));
    assert_eq!(Status::read(pid).unwrap().tracer, 0);
}

/// A cgroup of a test; removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(hierarchy: &str) -> Option<Self> {
        let mounted = format!("/sys/fs/cgroup/{hierarchy}/cgroup.procs");
        fs::metadata(mounted).ok()?;
        let name = format!("ferry-test-{}-{hierarchy}", std::process::id());
        let path = PathBuf::from(format!("/sys/fs/cgroup/{hierarchy}/{name}"));
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Thaws a cgroup in time for its processes to be killed.
struct Thaw<'a>(&'a Cgroup, &'a str, &'a str);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        self.0.write(self.1, self.2);
    }
}

fn frozen_is_refused(hierarchy: &str, file: &str, freeze: &str, thaw: &str) -> bool {
    let Some(cgroup) = Cgroup::new(hierarchy) else {
        return false;
    };
    let mut workload = Workload::start();
    let pid = workload.pid();
    cgroup.write("cgroup.procs", &pid.to_string());
    let thaw = Thaw(&cgroup, file, thaw);
    cgroup.write(file, freeze);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !Status::read(pid).unwrap().frozen {
        assert!(Instant::now() < deadline, "not frozen: {:?}", Status::read(pid));
        thread::sleep(Duration::from_millis(1));
    }
    let error = take_userfaultfd(pid, &[]).unwrap_err();
    assert!(matches!(error, InjectError::Frozen(_)), "{error}");
    drop(thaw);
    assert_eq!(workload.tell("map a 1 rw").len(), 12);
    true
}

#[test]
fn a_frozen_process_is_refused() {
    let one = frozen_is_refused("freezer", "freezer.state", "FROZEN", "THAWED");
    let two = ["unified", "."].iter().any(|h| frozen_is_refused(h, "cgroup.freeze", "1", "0"));
    if !one && !two {
        println!("skipped: a_frozen_process_is_refused: no cgroup with a freezer");
    }
}

#[test]
fn a_process_may_end_at_any_moment() {
    need_userfaultfd!("a_process_may_end_at_any_moment");
    for micros in (0..40).map(|n| n * 25) {
        let workload = Workload::start();
        let pid = workload.pid();
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_micros(micros));
            kill(pid, libc::SIGKILL);
        });
        match take_userfaultfd(pid, &[]) {
            Ok(taken) => assert_userfaultfd(&taken.fd),
            Err(InjectError::Gone(_)) => {}
            Err(error) => panic!("{error:?}"),
        }
        killer.join().unwrap();
    }
}

#[test]
fn stops_that_somebody_else_waits_for_are_seen() {
    need_userfaultfd!("stops_that_somebody_else_waits_for_are_seen");
    let mut workload = Workload::start();
    let pid = workload.pid();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let mut stolen = 0;
            while !done.load(Ordering::SeqCst) {
                let mut status = 0;
                // SAFETY: the status is a local. A child that has ended is left to its owner: it has
                // not ended while this runs.
                let found =
                    unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG | libc::__WALL) };
                stolen += u32::from(found == pid);
            }
            stolen
        });
        for _ in 0..50 {
            assert_userfaultfd(&take_userfaultfd(pid, &[]).unwrap().fd);
        }
        done.store(true, Ordering::SeqCst);
        assert!(waiter.join().unwrap() > 0, "nothing was stolen, so nothing was tested");
    });
    assert_eq!(workload.tell("map a 1 rw").len(), 12);
}

#[test]
fn an_inherited_copy_is_closed_and_no_other() {
    need_userfaultfd!("an_inherited_copy_is_closed_and_no_other");
    let mut workload = Workload::start();
    let pid = workload.pid();
    let mut make = || -> i32 {
        let answer = workload.tell("block userfaultfd");
        answer.split(' ').next().unwrap().parse().unwrap()
    };
    let (ours, own) = (make(), make());
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    let known = pidfd_getfd(&pidfd, ours, PidfdGetfdFlags::empty()).unwrap();
    take_userfaultfd(pid, &[known.as_fd()]).unwrap();
    let open = |fd: i32| fs::symlink_metadata(format!("/proc/{pid}/fd/{fd}")).is_ok();
    assert!(!open(ours) && open(own));
}

#[test]
fn a_full_table_of_descriptors_is_an_error_and_nothing_more() {
    need_userfaultfd!("a_full_table_of_descriptors_is_an_error_and_nothing_more");
    let mut workload = Workload::start();
    let pid = workload.pid();
    let limit = libc::rlimit { rlim_cur: 3, rlim_max: 3 };
    // SAFETY: the limit is a local, and the old one is not asked for.
    unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, null_mut()) };
    let error = take_userfaultfd(pid, &[]).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(matches!(error, InjectError::Refused { .. }), "{error}");
    assert!(source.contains("Too many open files"), "{source}");
    assert_eq!(traces(pid).1, "TracerPid:\t0");
    assert_eq!(workload.tell("map a 1 rw").len(), 12);
}

/// How long a process stands still. Prints it.
#[test]
#[ignore = "a measurement"]
fn measure_the_stop() {
    let workload = Workload::start();
    let pid = workload.pid();
    let instruction = arch::instruction(pid).unwrap();
    let mut times = Vec::new();
    let mut whole = Vec::new();
    for _ in 0..200 {
        let tracee = seize(pid).unwrap();
        let begin = Instant::now();
        within(&tracee, pid, instruction, &[]).unwrap();
        assert!(tracee.release(RESTORE));
        times.push(begin.elapsed());
        let begin = Instant::now();
        drop(take_userfaultfd(pid, &[]).unwrap());
        whole.push(begin.elapsed());
    }
    times.sort();
    whole.sort();
    println!("stop: median {:?}, 95 % {:?}, max {:?}", times[100], times[190], times[199]);
    println!("all of it: median {:?}, max {:?}", whole[100], whole[199]);
}
