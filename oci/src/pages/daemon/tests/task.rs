//! A process that is restored: it plays CRIU for itself, then does to its memory what a script says, and
//! compares every byte with what should be there.
#![allow(unsafe_code)] // Memory of its own, userfaultfd, fork.

use std::io::{BufRead, Write};
use std::os::unix::net::UnixStream;

use crate::pages::PAGE;

/// Pages that a task has in the beginning.
pub(super) const PAGES: usize = 1536;
/// Pages of its window: memory may be moved behind those.
pub(super) const WINDOW: usize = 2 * PAGES;
/// Its first address, not at the border of a chunk.
pub(super) const BASE: u64 = 0x10_0000_0000 + 37 * PAGE;

const UNMAPPED: u64 = 0;
const ZERO: u64 = 1;
const ORIGINAL: u64 = 2;
const WRITTEN: u64 = 1 << 63;

/// First word of original page `page` of `space`; word `i` of it is that plus `i`. `None` for zeros.
pub(super) fn content(space: u32, page: usize) -> Option<u64> {
    let seed = u64::from(space) << 40 | (page as u64) << 16 | 7;
    (!page.is_multiple_of(5)).then(|| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1)
}

struct Task {
    space: u32,
    socket: Option<UnixStream>,
    /// What each page of the window should hold.
    model: Box<[u64; WINDOW]>,
    children: [i32; 4096],
    born: usize,
    depth: usize,
}

fn fail(what: &str, page: usize, got: u64, wanted: u64) -> ! {
    // No allocation: this may be a forked child.
    let mut buffer = [0u8; 256];
    let mut rest = &mut buffer[..];
    let _ = writeln!(
        rest,
        "task {}: {what}, page {page}: {got:#x}, should be {wanted:#x}",
        std::process::id()
    );
    let len = 256 - rest.len();
    // SAFETY: writes from a buffer of ours, then ends this process.
    unsafe {
        libc::write(2, buffer.as_ptr().cast(), len);
        libc::_exit(10)
    }
}

fn addr(page: usize) -> u64 {
    BASE + page as u64 * PAGE
}

fn check(rc: i64, what: &str) {
    if rc == -1 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        fail(what, 0, errno as u64, 0);
    }
}

impl Task {
    /// Compares `pages` pages.
    fn read(&self, from: usize, pages: usize) {
        for page in from..from + pages {
            let first = match self.model[page] {
                UNMAPPED => continue,
                ZERO => None,
                value if value & WRITTEN != 0 => Some(value),
                value => content(self.space, (value - ORIGINAL) as usize),
            };
            for word in 0..PAGE / 8 {
                let wanted = first.map_or(0, |first| first.wrapping_add(word));
                // SAFETY: mapped, as the model says.
                let got = unsafe { std::ptr::read_volatile((addr(page) + word * 8) as *const u64) };
                if got != wanted {
                    fail("wrong content", page, got, wanted);
                }
            }
        }
    }

    fn write(&mut self, from: usize, pages: usize) {
        for page in from..from + pages {
            if self.model[page] == UNMAPPED {
                continue;
            }
            let first = WRITTEN | (page as u64) << 20 | (self.depth as u64) << 50;
            for word in 0..PAGE / 8 {
                // SAFETY: mapped, as the model says.
                unsafe {
                    std::ptr::write_volatile((addr(page) + word * 8) as *mut u64, first + word)
                };
            }
            self.model[page] = first;
        }
    }

    fn is_mapped(&self, from: usize, pages: usize) -> bool {
        self.model[from..from + pages].iter().all(|value| *value != UNMAPPED)
    }

    fn remove(&mut self, from: usize, pages: usize) {
        if self.is_mapped(from, pages) {
            let len = pages * PAGE as usize;
            // SAFETY: memory of this test alone.
            let rc = unsafe { libc::madvise(addr(from) as *mut _, len, libc::MADV_DONTNEED) };
            check(rc.into(), "madvise");
            self.model[from..from + pages].fill(ZERO);
        }
    }

    /// Forks a child that finds zeros there, as the parent wished.
    fn wipe(&mut self, from: usize, pages: usize) {
        let len = pages * PAGE as usize;
        // SAFETY: memory of this test alone.
        let rc = unsafe { libc::madvise(addr(from) as *mut _, len, libc::MADV_WIPEONFORK) };
        check(rc.into(), "madvise");
        self.fork(|child| child.model[from..from + pages].fill(ZERO));
    }

    fn unmap(&mut self, from: usize, pages: usize) {
        // SAFETY: memory of this test alone.
        let rc = unsafe { libc::munmap(addr(from) as *mut _, pages * PAGE as usize) };
        check(rc.into(), "munmap");
        self.model[from..from + pages].fill(UNMAPPED);
    }

    fn remap(&mut self, from: usize, pages: usize, to: usize) {
        let apart = from + pages <= to || to + pages <= from;
        if !apart || !self.is_mapped(from, pages) {
            return;
        }
        // One mapping at a time: pages that were moved here are mappings of their own.
        for at in 0..pages {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let (old, new, len) = (addr(from + at), addr(to + at), PAGE as usize);
            // SAFETY: memory of this test alone.
            let rc =
                unsafe { libc::mremap(old as *mut _, len, len, flags, new as *mut libc::c_void) };
            check(rc as i64, "mremap");
            self.model[to + at] = std::mem::replace(&mut self.model[from + at], UNMAPPED);
        }
    }

    /// Moves pages that are one mapping at once.
    fn shift(&mut self, from: usize, pages: usize, to: usize) {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let len = pages * PAGE as usize;
        // SAFETY: memory of this test alone.
        let rc = unsafe {
            libc::mremap(addr(from) as *mut _, len, len, flags, addr(to) as *mut libc::c_void)
        };
        check(rc as i64, "mremap");
        for at in 0..pages {
            self.model[to + at] = std::mem::replace(&mut self.model[from + at], UNMAPPED);
        }
    }

    /// Forks; the child runs `and` and ends.
    fn fork(&mut self, and: impl FnOnce(&mut Self)) {
        // SAFETY: the child allocates nothing and takes no lock.
        match unsafe { libc::fork() } {
            0 => {
                self.depth += 1;
                self.born = 0;
                and(self);
                self.read(0, WINDOW);
                self.join();
                // SAFETY: ends this process.
                unsafe { libc::_exit(0) }
            }
            pid => {
                check(pid.into(), "fork");
                self.children[self.born] = pid;
                self.born += 1;
            }
        }
    }

    fn join(&mut self) {
        for pid in &self.children[..self.born] {
            let mut status = 0;
            // SAFETY: waits for a child of ours.
            unsafe { libc::waitpid(*pid, &raw mut status, 0) };
            if status != 0 {
                fail("a child failed", *pid as usize, status as u64, 0);
            }
        }
        self.born = 0;
    }

    /// `count` operations at random.
    fn random(&mut self, seed: u64, count: usize, forks: bool) {
        let mut state = seed;
        let mut below = |bound: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % bound
        };
        for step in 0..count {
            let (from, pages) = (below(WINDOW - 40), 1 + below(30));
            match below(if forks && self.depth < 2 { 20 } else { 19 }) {
                0..=9 => self.read(from, pages),
                10..=12 => self.write(from, 1 + pages / 8),
                13..=15 => self.remove(from, pages),
                16 => self.unmap(from, pages),
                17..=18 => self.remap(from, 1 + pages / 4, below(WINDOW - 40)),
                _ => {
                    let seed = seed ^ (step as u64) << 7;
                    self.fork(|child| child.random(seed, count / 4, true));
                }
            }
        }
    }

    /// Runs a script: operations and numbers of pages, separated by semicolons.
    fn run(&mut self, script: &str) {
        for step in script.split(';').map(str::trim).filter(|step| !step.is_empty()) {
            let mut words = step.split_whitespace();
            let name = words.next().unwrap_or_default();
            let n: Vec<usize> = words.clone().filter_map(|word| word.parse().ok()).collect();
            match name {
                "read" => self.read(n[0], n[1]),
                "write" => self.write(n[0], n[1]),
                "remove" => self.remove(n[0], n[1]),
                "unmap" => self.unmap(n[0], n[1]),
                "remap" => self.shift(n[0], n[1], n[2]),
                "check" => self.read(0, WINDOW),
                "fork-check" => self.fork(|_| {}),
                // The child changes and checks its memory before the parent's child-to-be is asked for.
                "fork-write" => self.fork(|child| child.write(n[0], n[1])),
                "fork-remove" => self.fork(|child| child.remove(n[0], n[1])),
                "fork-fork" => self.fork(|child| {
                    child.remove(n[0], n[1]);
                    child.fork(|_| {});
                }),
                // A child that stays for some time before it looks.
                "fork-later" => self.fork(|_| sleep(n[0])),
                "random" => self.random(n[0] as u64, n[1], false),
                "random-forks" => self.random(n[0] as u64, n[1], true),
                "sleep" => sleep(n[0]),
                "join" => self.join(),
                "bounce" => {
                    // Each changes the table of segments, and so fills the log.
                    for at in 0..n[0] {
                        self.remove((at * 2) % PAGES, 1);
                    }
                }
                "marker" => self.marker(),
                "zombie" => self.say_to_criu(&(-4711i32).to_le_bytes()),
                "hang-up" => self.socket = None,
                "wipe" => self.wipe(n[0], n[1]),
                "say" => {
                    println!("{}", words.next().unwrap_or_default());
                    let _ = std::io::stdout().flush();
                }
                "wait" => {
                    let mut line = String::new();
                    let _ = std::io::stdin().lock().read_line(&mut line);
                    if line.is_empty() {
                        std::process::exit(11);
                    }
                }
                _ => panic!("no such step: {step}"),
            }
        }
    }

    fn say_to_criu(&mut self, bytes: &[u8]) {
        let socket = self.socket.as_mut().expect("socket of the restore");
        socket.write_all(bytes).expect("page daemon listens");
    }

    fn marker(&mut self) {
        self.say_to_criu(&0x5253_5446u32.to_le_bytes());
        self.socket = None;
    }

    /// Makes the memory and its userfaultfd, and sends that to the page daemon.
    fn restore(space: u32, mut socket: UnixStream) -> Self {
        let uffd = register(BASE, PAGES * PAGE as usize);
        send_uffd(&mut socket, space, uffd);
        let mut model = Box::new([UNMAPPED; WINDOW]);
        for (page, value) in model.iter_mut().enumerate().take(PAGES) {
            *value = ORIGINAL + page as u64;
        }
        Self { space, socket: Some(socket), model, children: [0; 4096], born: 0, depth: 0 }
    }
}

/// Maps memory at `base` and registers it as CRIU does.
pub(super) fn register(base: u64, len: usize) -> i32 {
    // SAFETY: memory at addresses that nothing else uses; structures as the kernel has them.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(base as *mut _, len, access, flags, -1, 0);
        check(at as i64, "mmap");
        let uffd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        check(uffd, "userfaultfd");
        let mut api = [0xaau64, 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6, 0];
        check(libc::ioctl(uffd as i32, 0xc018_aa3f, api.as_mut_ptr()).into(), "UFFDIO_API");
        let mut area = [base, len as u64, 1, 0];
        check(libc::ioctl(uffd as i32, 0xc020_aa00, area.as_mut_ptr()).into(), "UFFDIO_REGISTER");
        uffd as i32
    }
}

/// Sends a userfaultfd as CRIU does, and closes it here.
pub(super) fn send_uffd(socket: &mut UnixStream, space: u32, uffd: i32) {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    socket.write_all(&space.to_le_bytes()).expect("page daemon listens");
    let fds = [uffd];
    let rights = [ControlMessage::ScmRights(&fds)];
    let byte = [std::io::IoSlice::new(b"\0")];
    let fd = std::os::fd::AsRawFd::as_raw_fd(socket);
    sendmsg::<()>(fd, &byte, &rights, MsgFlags::empty(), None).expect("send the descriptor");
    // SAFETY: a descriptor of ours that is used no more.
    unsafe { libc::close(uffd) };
}

/// Has `command` inherit `socket`, for tasks that are restored together.
pub(super) fn inherit(command: &mut std::process::Command, socket: &UnixStream) {
    use std::os::fd::AsRawFd;
    use std::os::unix::process::CommandExt;
    let fd = socket.as_raw_fd();
    command.env("FERRY_TEST_SOCKET_FD", fd.to_string());
    // SAFETY: between fork and exec, a plain call.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(fd, libc::F_SETFD, 0);
            Ok(())
        });
    }
}

fn sleep(millis: usize) {
    // SAFETY: a plain call; it allocates nothing.
    unsafe { libc::usleep(millis as u32 * 1000) };
}

/// The task's process; in a run of the tests it does nothing.
#[test]
fn task_process() {
    let Ok(script) = std::env::var("FERRY_TEST_SCRIPT") else { return };
    let var = |name: &str| std::env::var(name).expect(name);
    use std::os::fd::FromRawFd;
    let socket = match std::env::var("FERRY_TEST_SOCKET_FD") {
        // SAFETY: left open for this process.
        Ok(fd) => unsafe { UnixStream::from_raw_fd(fd.parse().expect("number")) },
        Err(_) => UnixStream::connect(var("FERRY_TEST_SOCKET")).expect("page daemon listens"),
    };
    let mut task = Task::restore(var("FERRY_TEST_SPACE").parse().expect("space"), socket);
    task.run(&script);
    task.join();
    println!("right");
    std::process::exit(0);
}
