//! A process that does to its memory what a test tells it, for the tests of this folder.
//!
//! It is this test program once more, which by a variable of its environment does not come as far as
//! its tests: those would run beside a second thread, and it is the first one that is looked at.
//! Commands come as lines on its standard input; each is answered by a line that begins with `@`.
#![allow(unsafe_code)] // The memory is mapped, moved and written by system calls and addresses.

mod crowd;
mod remaps;

use std::collections::HashMap;
use std::ffi::c_void;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write, stdin};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use crate::pages::PAGE;

const ENV: &str = "FERRY_TEST_WORKLOAD";
const SIZE: usize = PAGE as usize;

/// A running workload, with a process group of its own. Killed with all its children when dropped.
pub(crate) struct Workload {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Workload {
    pub(crate) fn start() -> Self {
        Self::start_by(&[])
    }

    /// Starts it as arguments of the command `by`.
    pub(crate) fn start_by(by: &[&str]) -> Self {
        let me = std::env::current_exe().unwrap();
        let mut words: Vec<_> = by.iter().map(Into::into).collect::<Vec<std::ffi::OsString>>();
        words.push(me.into());
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .env(ENV, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut workload = Self { child, input, output };
        assert_eq!(workload.answer(), "ready");
        workload
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends a command and waits for its answer.
    pub(crate) fn tell(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    pub(crate) fn send(&mut self, command: &str) {
        // In one piece: a command may be read by a single call.
        self.input.write_all(format!("{command}\n").as_bytes()).unwrap();
    }

    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the workload has ended");
            if let Some(answer) = line.strip_prefix('@') {
                return answer.trim().to_owned();
            }
        }
    }

    /// The same, as an address.
    pub(crate) fn address(&mut self, command: &str) -> u64 {
        u64::from_str_radix(&self.tell(command), 16).unwrap()
    }

    /// The processes of the workload.
    pub(crate) fn pids(&self) -> Vec<i32> {
        members(self.pid())
    }

    /// Stops all its processes, and waits until every thread of them stands.
    pub(crate) fn stop(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            kill(-self.pid(), libc::SIGSTOP);
            let before = self.pids();
            let standing = before.iter().all(|pid| {
                let tasks =
                    fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
                tasks.map(|t| t.path().join("stat")).all(|stat| {
                    matches!(
                        fs::read(stat).ok().and_then(|s| field(&s, 3)).as_deref(),
                        None | Some("T" | "Z")
                    )
                })
            });
            if standing && before == self.pids() {
                return;
            }
            assert!(Instant::now() < deadline, "the workload does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn go_on(&self) {
        kill(-self.pid(), libc::SIGCONT);
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        kill(-self.pid(), libc::SIGKILL);
        let _ = self.child.wait();
        // Its children are not ours to wait for; they must not be seen any more, though.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !members(self.pid()).is_empty() && Instant::now() < deadline {
            kill(-self.pid(), libc::SIGKILL);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: the call takes numbers only.
    unsafe { libc::kill(pid, signal) };
}

/// Processes of a process group that have not ended.
pub(crate) fn members(group: i32) -> Vec<i32> {
    let mut pids: Vec<i32> = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
            field(&stat, 5).is_some_and(|g| g == group.to_string())
                && field(&stat, 3).is_some_and(|s| s != "Z" && s != "X")
        })
        .collect();
    pids.sort_unstable();
    pids
}

/// A field of `/proc/PID/stat`, counted from 1; not the second, which is the name.
pub(crate) fn field(stat: &[u8], number: usize) -> Option<String> {
    let behind = stat.iter().rposition(|b| *b == b')')? + 1;
    let text = std::str::from_utf8(&stat[behind..]).ok()?;
    text.split_whitespace().nth(number - 3).map(Into::into)
}

/// Run by the C library before main.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    if std::env::var_os(ENV).is_some() {
        obey();
    }
}

/// Does what it is told until nobody is left to tell it.
fn obey() -> ! {
    let mut areas = Areas::default();
    answer("ready");
    let mut byte = [0u8];
    let mut line = Vec::new();
    // Unbuffered: an exec must not lose what is yet to come.
    while stdin().read(&mut byte).unwrap_or(0) == 1 {
        if byte[0] != b'\n' {
            line.push(byte[0]);
            continue;
        }
        let words = String::from_utf8(std::mem::take(&mut line)).unwrap();
        let words: Vec<&str> = words.split_whitespace().collect();
        answer(&areas.run(&words));
    }
    std::process::exit(0);
}

fn answer(text: &str) {
    // Not println!, which takes a lock that a fork would copy.
    let line = format!("@{text}\n");
    // SAFETY: the bytes are those of `line`.
    unsafe { libc::write(1, line.as_ptr().cast(), line.len()) };
}

/// Areas that were mapped, by name: address and pages.
#[derive(Default)]
struct Areas(HashMap<String, (u64, u64)>);

impl Areas {
    fn run(&mut self, words: &[&str]) -> String {
        let number = |i: usize| words[i].parse::<u64>().unwrap();
        let fail = || std::io::Error::last_os_error().to_string();
        match words[0] {
            // map NAME PAGES PROT [FLAG]
            "map" => {
                let extra = match words.get(4) {
                    Some(&"droppable") => 0x08,
                    Some(&"shared") => libc::MAP_SHARED,
                    Some(&"locked") => libc::MAP_PRIVATE | libc::MAP_LOCKED,
                    Some(&"huge") => libc::MAP_PRIVATE | libc::MAP_HUGETLB,
                    Some(&"down") => libc::MAP_PRIVATE | libc::MAP_GROWSDOWN,
                    _ => libc::MAP_PRIVATE,
                };
                let Some(at) = map(0, number(2), prot(words[3]), extra | libc::MAP_ANONYMOUS)
                else {
                    return fail();
                };
                self.0.insert(words[1].into(), (at, number(2)));
                format!("{at:x}")
            }
            // mapfile NAME PAGES PATH private|shared
            "mapfile" => {
                let file = fs::OpenOptions::new().read(true).write(true).open(words[3]).unwrap();
                let flags =
                    if words[4] == "private" { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
                let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
                // SAFETY: a new mapping at an address that the kernel chooses.
                let at = unsafe {
                    libc::mmap(null_mut(), number(2) as usize * SIZE, prot("rw"), flags, fd, 0)
                };
                if at == libc::MAP_FAILED {
                    return fail();
                }
                self.0.insert(words[1].into(), (at as u64, number(2)));
                format!("{:x}", at as u64)
            }
            // huge NAME PAGES: aligned, and asking for transparent huge pages
            "thp" => {
                let pages = number(2);
                let at =
                    map(0, pages + 1024, prot("none"), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                let at = at.unwrap().next_multiple_of(2 << 20);
                map(
                    at,
                    pages,
                    prot("rw"),
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                );
                advise(at, pages, libc::MADV_HUGEPAGE);
                self.0.insert(words[1].into(), (at, pages));
                format!("{at:x}")
            }
            // again NAME: maps it anew at the same place
            "again" => {
                let (at, pages) = self.0[words[1]];
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                map(at, pages, prot("rw"), flags).map_or_else(fail, |a| format!("{a:x}"))
            }
            // fill NAME FROM TO VALUE
            "fill" => {
                let (at, _) = self.0[words[1]];
                for page in number(2)..number(3) {
                    write(at + page * PAGE, page.wrapping_mul(2_654_435_761) ^ number(4));
                }
                "ok".into()
            }
            // read NAME FROM TO
            "read" => {
                let (at, _) = self.0[words[1]];
                // SAFETY: the test maps before it reads.
                let sum = (number(2)..number(3)).fold(0u64, |sum, page| unsafe {
                    sum.wrapping_add(((at + page * PAGE) as *const u64).read_volatile())
                });
                sum.to_string()
            }
            // advise NAME FROM TO ADVICE
            "advise" => {
                let (at, _) = self.0[words[1]];
                let done = advise(at + number(2) * PAGE, number(3) - number(2), number(4) as i32);
                if done { "ok".into() } else { fail() }
            }
            "unmap" => {
                let (at, _) = self.0[words[1]];
                let len = (number(3) - number(2)) as usize * SIZE;
                // SAFETY: the test uses no more what it unmaps.
                unsafe { libc::munmap((at + number(2) * PAGE) as *mut c_void, len) };
                "ok".into()
            }
            "protect" => {
                let (at, pages) = self.0[words[1]];
                // SAFETY: the test uses no more what it protects.
                unsafe { libc::mprotect(at as *mut c_void, pages as usize * SIZE, prot(words[2])) };
                "ok".into()
            }
            // move NAME PAGES: mremap to another place, and to another size
            "move" => {
                let (at, pages) = self.0[words[1]];
                let to = map(0, number(2), prot("none"), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                let Some(at) = remap(at, pages, number(2), to) else {
                    return fail();
                };
                self.0.insert(words[1].into(), (at, number(2)));
                format!("{at:x}")
            }
            // place NAME OTHER PAGE PAGES: at that page of the other
            "place" => {
                let at = self.0[words[2]].0 + number(3) * PAGE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let Some(at) = map(at, number(4), prot("rw"), flags) else {
                    return fail();
                };
                self.0.insert(words[1].into(), (at, number(4)));
                format!("{at:x}")
            }
            // put NAME OTHER PAGE: moves it to that page of the other
            "put" => {
                let (at, pages) = self.0[words[1]];
                let to = self.0[words[2]].0 + number(3) * PAGE;
                remap(at, pages, pages, Some(to)).map_or_else(fail, |at| format!("{at:x}"))
            }
            "lock" | "unlock" => {
                let (at, pages) = self.0[words[1]];
                let lock = if words[0] == "lock" { libc::mlock } else { libc::munlock };
                // SAFETY: the area is mapped.
                let done = unsafe { lock(at as *const c_void, pages as usize * SIZE) };
                if done == 0 { "ok".into() } else { fail() }
            }
            // brk PAGES: grows the heap and writes to it
            "brk" => {
                // SAFETY: nothing else of this process uses the heap that way.
                let at = unsafe { libc::sbrk(number(1) as isize * SIZE as isize) } as u64;
                for page in 0..number(1) {
                    write(at.next_multiple_of(PAGE) - PAGE + page * PAGE, page ^ 0xbbbb);
                }
                format!("{at:x}")
            }
            "stack" => deep(number(1)).to_string(),
            "threads" => {
                for thread in 0..number(2) {
                    let (at, pages) = self.0[words[1]];
                    std::thread::spawn(move || {
                        let mut random = Random(thread + 1);
                        loop {
                            write(at + random.below(pages) * PAGE, random.next());
                        }
                    });
                }
                "ok".into()
            }
            // fork NAME FROM TO VALUE: a child that writes there and stays
            "fork" => {
                // SAFETY: the child only writes to memory, and waits.
                match unsafe { libc::fork() } {
                    0 => {
                        self.run(&[&["fill"], &words[1..]].concat());
                        answer("child");
                        loop {
                            // SAFETY: the call takes nothing.
                            unsafe { libc::pause() };
                        }
                    }
                    pid => pid.to_string(),
                }
            }
            "vfork" => vfork().to_string(),
            "exec" => {
                let mut args = std::env::args_os();
                let program = args.next().unwrap();
                Command::new(program).args(args).exec().to_string()
            }
            "direct" => {
                let file = fs::OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_DIRECT)
                    .open(std::env::current_exe().unwrap());
                file.map_or_else(
                    |e| e.to_string(),
                    |f| {
                        std::mem::forget(f);
                        "ok".into()
                    },
                )
            }
            // counters NAME THREADS, relays NAME THREADS, vforker NAME: they count in its first word
            "counters" | "relays" | "vforker" => {
                let (at, _) = self.0[words[1]];
                match words[0] {
                    "counters" => crowd::counters(at, number(2)),
                    "relays" => crowd::relays(at, number(2)),
                    _ => crowd::vfork(at),
                }
                "ok".into()
            }
            "sleepers" => {
                crowd::sleepers(number(1));
                "ok".into()
            }
            "remap" => {
                remaps::start(number(1));
                "ok".into()
            }
            "remapped" => remaps::told(),
            "block" => super::super::inject::tests::block(words[1]),
            "stress" => {
                for thread in 0..number(1) {
                    std::thread::spawn(move || stress(Random(number_seed(thread))));
                }
                "ok".into()
            }
            other => format!("unknown {other}"),
        }
    }
}

fn number_seed(thread: u64) -> u64 {
    u64::from(std::process::id()) << 8 | thread | 1
}

fn prot(text: &str) -> i32 {
    let bit = |c, prot| if text.contains(c) && text != "none" { prot } else { 0 };
    bit('r', libc::PROT_READ) | bit('w', libc::PROT_WRITE) | bit('x', libc::PROT_EXEC)
}

fn map(at: u64, pages: u64, prot: i32, flags: i32) -> Option<u64> {
    // SAFETY: a new mapping; where it is a fixed one the caller owns the place.
    let at = unsafe { libc::mmap(at as *mut c_void, pages as usize * SIZE, prot, flags, -1, 0) };
    (at != libc::MAP_FAILED).then_some(at as u64)
}

fn remap(at: u64, old: u64, new: u64, to: Option<u64>) -> Option<u64> {
    let flags = libc::MREMAP_MAYMOVE | if to.is_some() { libc::MREMAP_FIXED } else { 0 };
    let to = to.unwrap_or_default() as *mut c_void;
    // SAFETY: the caller owns both places.
    let at = unsafe {
        libc::mremap(at as *mut c_void, old as usize * SIZE, new as usize * SIZE, flags, to)
    };
    (at != libc::MAP_FAILED).then_some(at as u64)
}

fn advise(at: u64, pages: u64, advice: i32) -> bool {
    // SAFETY: the area is mapped, and nothing needs its contents.
    unsafe { libc::madvise(at as *mut c_void, pages as usize * SIZE, advice) == 0 }
}

/// Writes to three places of a page.
fn write(page: u64, value: u64) {
    for offset in [0, 2048, 4088] {
        // SAFETY: the test maps before it writes.
        unsafe { ((page + offset) as *mut u64).write_volatile(value ^ offset) };
    }
}

/// Uses so many pages of stack.
#[inline(never)]
fn deep(pages: u64) -> u64 {
    let mut page = [0u8; SIZE];
    page[(pages % 4096) as usize] = 1;
    std::hint::black_box(&mut page);
    if pages == 0 { 0 } else { deep(pages - 1) + u64::from(page[(pages % 4096) as usize]) }
}

/// A child that shares this memory until it is killed. The parent goes on: no vfork(2), but the same
/// to the kernel's memory management.
fn vfork() -> i32 {
    extern "C" fn child(_: *mut c_void) -> i32 {
        loop {
            // SAFETY: the call takes nothing.
            unsafe { libc::pause() };
        }
    }
    let stack = map(0, 16, prot("rw"), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).unwrap();
    let top = (stack + 16 * PAGE) as *mut c_void;
    // SAFETY: the child has a stack of its own and touches nothing.
    unsafe { libc::clone(child, top, libc::CLONE_VM | libc::SIGCHLD, null_mut()) }
}

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Maps, unmaps, moves, drops, forks and writes until it is killed.
fn stress(mut random: Random) {
    const AREAS: usize = 12;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let mut areas = [(0u64, 0u64); AREAS];
    let mut children = [0i32; 2];
    loop {
        let area = &mut areas[random.below(AREAS as u64) as usize];
        if area.1 == 0 {
            let pages = 1 + random.below(1200);
            *area = (map(0, pages, prot("rw"), flags).unwrap(), pages);
            if random.below(3) == 0 {
                advise(area.0, pages, libc::MADV_HUGEPAGE);
            }
        }
        let (at, pages) = *area;
        let from = random.below(pages);
        let count = 1 + random.below(pages - from);
        match random.below(64) {
            0 => {
                // SAFETY: nothing else uses the area.
                unsafe { libc::munmap(at as *mut c_void, pages as usize * SIZE) };
                *area = (0, 0);
            }
            1 => drop(map(at, pages, prot("rw"), flags | libc::MAP_FIXED)),
            2 | 3 => {
                let new = 1 + random.below(1200);
                let to = (random.below(2) == 0).then(|| map(0, new, prot("none"), flags).unwrap());
                // Not possible where mprotect(2) or mlock(2) have split it.
                *area = remap(at, pages, new, to).map_or(*area, |at| (at, new));
            }
            4..8 => drop(advise(at + from * PAGE, count, libc::MADV_DONTNEED)),
            8 => drop(advise(at + from * PAGE, count, libc::MADV_FREE)),
            9 => {
                // SAFETY: nobody writes to it meanwhile.
                unsafe {
                    let len = count as usize * SIZE;
                    libc::mprotect((at + from * PAGE) as *mut c_void, len, libc::PROT_NONE);
                    libc::mprotect((at + from * PAGE) as *mut c_void, len, prot("rw"));
                }
            }
            10 => {
                for page in from..from + count {
                    // SAFETY: the area is mapped.
                    unsafe { ((at + page * PAGE) as *const u8).read_volatile() };
                }
            }
            11 => {
                let child = &mut children[random.below(2) as usize];
                // SAFETY: the child only writes to memory, and waits; a process that was forked here
                // is killed and waited for here.
                unsafe {
                    if *child > 0 {
                        libc::kill(*child, libc::SIGKILL);
                        libc::waitpid(*child, null_mut(), 0);
                    }
                    *child = libc::fork();
                    if *child == 0 {
                        for page in 0..pages {
                            if random.below(4) == 0 {
                                write(at + page * PAGE, random.next());
                            }
                        }
                        loop {
                            write(at + random.below(pages) * PAGE, random.next());
                            let time = libc::timespec { tv_sec: 0, tv_nsec: 100_000 };
                            libc::nanosleep(&raw const time, null_mut());
                        }
                    }
                }
            }
            12 => {
                // SAFETY: the area is mapped.
                unsafe {
                    libc::mlock(at as *const c_void, SIZE);
                    libc::munlock(at as *const c_void, SIZE);
                }
            }
            13..40 => {
                for _ in 0..16 {
                    write(at + random.below(pages) * PAGE, random.next());
                }
            }
            _ => {
                for page in from..from + count.min(64) {
                    write(at + page * PAGE, random.next());
                }
            }
        }
        if random.below(4) == 0 {
            let time = libc::timespec { tv_sec: 0, tv_nsec: 50_000 };
            // SAFETY: the time is read only.
            unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &raw const time, null_mut()) };
        }
    }
}
