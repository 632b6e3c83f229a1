//! Keeps the kernel ready for breakpoints.
//!
//! CRIU stops each task at an exact place with a breakpoint of the processor, at both ends. To the
//! kernel that is a performance event, and the first one of a machine (`account_event` in
//! `kernel/events/core.c`) makes it patch its scheduler on every processor and wait until all have seen
//! that: 5 to 25 ms in a virtual machine, in the middle of the pause. It stays so as long as any
//! event is open, and a second more.

// Reason: perf_event_open(2) has no safe wrapper that closes its descriptor on exec.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use perf_event_open_sys as perf;
use perf_event_open_sys::bindings::{
    PERF_COUNT_SW_DUMMY, PERF_FLAG_FD_CLOEXEC, PERF_TYPE_SOFTWARE, perf_event_attr,
};

/// There wherever the kernel has performance events (`perf_event_open(2)`).
const PARANOID: &str = "/proc/sys/kernel/perf_event_paranoid";

/// A kernel that is ready as long as this lives.
#[derive(Debug)]
pub struct Breakpoints {
    _event: OwnedFd,
}

impl Breakpoints {
    /// Opens an event that counts nothing. Takes as long as the first breakpoint would have.
    ///
    /// # Errors
    /// When the kernel has no such events, or does not let us have one.
    pub fn keep_ready() -> io::Result<Self> {
        let mut attributes = perf_event_attr {
            size: u32::try_from(size_of::<perf_event_attr>()).unwrap_or_default(),
            type_: PERF_TYPE_SOFTWARE,
            config: u64::from(PERF_COUNT_SW_DUMMY),
            ..Default::default()
        };
        attributes.set_disabled(1);
        // Of a task: events of a processor do not concern the scheduler. Of our first thread: it
        // lives as long as we do.
        let task = std::process::id().cast_signed();
        let flags = std::ffi::c_ulong::from(PERF_FLAG_FD_CLOEXEC);
        // SAFETY: the attributes say their own size, and live as long as the call.
        let fd = unsafe { perf::perf_event_open(&mut attributes, task, -1, -1, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, for us alone.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { _event: event })
    }

    /// Whether [`Breakpoints::keep_ready`] can work here. Opens nothing.
    pub fn is_possible() -> bool {
        Path::new(PARANOID).exists()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_open_as_long_as_it_lives() {
        let open = || {
            let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let is_event =
                |link: &std::path::PathBuf| link.to_string_lossy().contains("perf_event");
            links.filter_map(|e| std::fs::read_link(e.path()).ok()).filter(is_event).count()
        };
        if !Breakpoints::is_possible() {
            println!(
                "skipped: the kernel is kept ready for breakpoints: there is no {PARANOID} here"
            );
            return;
        }
        let ready = Breakpoints::keep_ready().unwrap();
        assert_eq!(open(), 1);
        drop(ready);
        assert_eq!(open(), 0);
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod measure {
    use super::*;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use nix::sys::ptrace;
    use nix::unistd::Pid;

    /// A process that is ours to trace.
    struct Traced(Child);

    impl Traced {
        fn start() -> Self {
            let child = Command::new("sleep").arg("100").spawn().unwrap();
            let traced = Self(child);
            ptrace::seize(traced.pid(), ptrace::Options::empty()).unwrap();
            ptrace::interrupt(traced.pid()).unwrap();
            nix::sys::wait::waitpid(traced.pid(), None).unwrap();
            traced
        }

        fn pid(&self) -> Pid {
            Pid::from_raw(self.0.id().cast_signed())
        }
    }

    impl Drop for Traced {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    /// `cargo test --release -p ferry-oci measure_a_breakpoint -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn measure_a_breakpoint() {
        let address = std::mem::offset_of!(libc::user, u_debugreg);
        let set = || {
            let traced = Traced::start();
            let start = Instant::now();
            ptrace::write_user(traced.pid(), address as ptrace::AddressType, 0x1000).unwrap();
            start.elapsed()
        };
        for _ in 0..5 {
            // What was open before is forgotten after a second.
            std::thread::sleep(Duration::from_millis(1500));
            let first = set();
            std::thread::sleep(Duration::from_millis(1500));
            let opening = Instant::now();
            let ready = Breakpoints::keep_ready().unwrap();
            let opening = opening.elapsed();
            println!("first breakpoint {first:?}; opening {opening:?}, then {:?}", set());
            drop(ready);
        }
    }
}
