//! Takes a userfaultfd of another process: the handle by which the writes of that process are tracked.
//! And has all of its threads stand still while areas are registered with it ([`while_standing`]).
//!
//! A process can only make one for itself. So it is stopped by ptrace(2) for about 0.1 ms, made to
//! call userfaultfd(2), its new descriptor is copied by pidfd_getfd(2) and closed there again.
//!
//! ```text
//! PTRACE_INTERRUPT ─▶ stop ─▶ userfaultfd ─▶ stop ─▶ (pidfd_getfd) ─▶ close ─▶ stop ─▶ detach
//!                      │ registers and signal mask saved                       │ restored
//! ```
//!
//! What makes it safe:
//! - Every stop at which registers are set is one on the way to handling a signal. There, and only
//!   there, the kernel decides whether an interrupted system call is restarted, so a process that was
//!   blocked in one goes on as after any stop. (epoll_wait(2) and the like give EINTR after any stop.)
//! - Signals are blocked meanwhile, so no handler runs on registers that are not its own.
//! - The instruction that is run is one of the vdso. Nothing is written into the process.
//! - A thread that was stopped within a restartable sequence is let go and stopped again: the kernel
//!   would take the foreign instruction for the end of the sequence.
//! - Seccomp filters are suspended, or the process is left alone.
//! - Whatever fails, the registers are put back first. A process that cannot be stopped to do so (it
//!   was frozen in that very moment) is waited for by the thread that does all this.
//! - Stops are looked for by asking for their reason, never by wait(2): what is waited for could be
//!   taken by someone else in this process who waits for all children, and the other way round.

#[cfg_attr(target_arch = "x86_64", path = "inject/x86_64.rs")]
#[cfg_attr(not(target_arch = "x86_64"), path = "inject/unsupported.rs")]
mod arch;
mod leaked;
mod rseq;
mod standstill;
#[cfg(test)]
pub(super) mod tests;
mod tracee;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::freezer::Freezer;
pub use standstill::while_standing;
use tracee::{Seized, Tracee};

/// How long a process is given to stop. One that runs stops in microseconds, if there is a CPU.
const STOP: Duration = Duration::from_millis(250);

/// How long it may take to put the registers back before the caller is told.
const RESTORE: Duration = Duration::from_secs(2);

/// How often a process is let go because it is within a restartable sequence.
const SEQUENCES: u32 = 50;

/// `UFFD_USER_MODE_ONLY`: what an unprivileged process may make.
const USER_MODE_ONLY: u64 = 1;

/// What the link of a userfaultfd in `/proc/PID/fd` reads.
const LINK: &str = "anon_inode:[userfaultfd]";

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Taken {
    /// It, not yet enabled.
    pub fd: OwnedFd,
    /// How long the process was attached to, and stood still for most of it.
    pub stopped: Duration,
}

/// Why no userfaultfd was taken. The process is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// It ended.
    #[error("process {0} is gone")]
    Gone(i32),
    /// A debugger, or something of the kind, holds it.
    #[error("process {pid} is traced by process {by}")]
    Traced {
        /// The process.
        pid: i32,
        /// Who traces it; 0 when that is not known.
        by: i32,
    },
    /// It was stopped by a signal.
    #[error("process {0} is stopped")]
    Stopped(i32),
    /// Its cgroup is frozen.
    #[error("process {0} is frozen")]
    Frozen(i32),
    /// It did not stop in time: it sleeps without heeding signals, or was frozen just now.
    #[error("process {0} does not stop")]
    Unstoppable(i32),
    /// It has a seccomp filter that cannot be suspended here.
    #[error("the seccomp filter of process {0} cannot be suspended")]
    Seccomp(i32),
    /// Not a process of this machine's own word size, or this architecture is not supported.
    #[error("process {0} is of an architecture that is not supported")]
    Architecture(i32),
    /// There is no instruction in the process by which it could be made to call the kernel.
    #[error("process {0} has no instruction for a system call")]
    NoInstruction(i32),
    /// It kept being within restartable sequences.
    #[error("process {0} is always within a restartable sequence")]
    Sequence(i32),
    /// The kernel refused the process its userfaultfd.
    #[error("process {pid} may not make a userfaultfd")]
    Refused {
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something that should have worked did not.
    #[error("{step} of process {pid}")]
    Io {
        /// The process.
        pid: i32,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl InjectError {
    fn io(pid: i32, step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::ESRCH) => Self::Gone(pid),
            _ => Self::Io { pid, step, source },
        }
    }
}

/// Has process `pid` make a userfaultfd for its memory and gives it to us, not yet enabled. The
/// process is stopped for about 0.1 ms and keeps nothing of it.
///
/// A process that forks while it has the descriptor hands it on to its child. `known` are the
/// userfaultfds taken before: copies of them are closed in `pid` in the same stop.
///
/// Processes that share their memory share what is tracked: one is enough for all of them.
///
/// # Errors
/// As [`InjectError`] says. The process is unharmed then.
pub fn take_userfaultfd(pid: i32, known: &[BorrowedFd<'_>]) -> Result<Taken, InjectError> {
    let leaked = leaked::copies(pid, known);
    let (result, results) = mpsc::channel();
    // ptrace(2) binds the process to one thread, and lets it go when that ends.
    thread::Builder::new()
        .name("inject".into())
        .spawn(move || run(pid, &leaked, &result))
        .map_err(InjectError::io(pid, "start a thread for the tracing"))?;
    results.recv().unwrap_or(Err(InjectError::Unstoppable(pid)))
}

/// Does it, reports once, and ends only when the process is as it was.
fn run(pid: i32, leaked: &[i32], result: &mpsc::Sender<Result<Taken, InjectError>>) {
    let report = |outcome| {
        // The caller waits for exactly one result; a second one finds nobody.
        let _ = result.send(outcome);
    };
    let instruction = match arch::instruction(pid) {
        Ok(instruction) => instruction,
        Err(error) => return report(Err(error)),
    };
    for _ in 0..SEQUENCES {
        let tracee = match seize(pid) {
            Ok(tracee) => tracee,
            Err(error) => return report(Err(error)),
        };
        let begin = Instant::now();
        let outcome = within(&tracee, pid, instruction, leaked);
        if !tracee.release(RESTORE) {
            report(Err(InjectError::Unstoppable(pid)));
            while !tracee.release(RESTORE) {}
            return;
        }
        let stopped = begin.elapsed();
        log::debug!("process {pid}: attached for {stopped:?}");
        match outcome {
            // The kernel's own name for what it waits in may have come too late for the first look.
            Err(InjectError::Unstoppable(_)) if Status::read(pid).is_ok_and(|s| s.frozen) => {
                return report(Err(InjectError::Frozen(pid)));
            }
            // Leaving it alone for a moment lets it come out of the sequence.
            Err(InjectError::Sequence(_)) => thread::sleep(Duration::from_micros(50)),
            outcome => return report(outcome.map(|fd| Taken { fd, stopped })),
        }
    }
    report(Err(InjectError::Sequence(pid)));
}

/// Attaches to the process when nothing speaks against it.
fn seize(pid: i32) -> Result<Tracee, InjectError> {
    let status = Status::read(pid).map_err(InjectError::io(pid, "read the status"))?;
    status.check(pid)?;
    match Tracee::seize(pid) {
        Ok(Seized { tracee, suspended }) => {
            // A filter may have been installed since.
            let status = Status::read(pid).map_err(InjectError::io(pid, "read the status"))?;
            if status.seccomp && !suspended {
                return Err(InjectError::Seccomp(pid));
            }
            Ok(tracee)
        }
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let status = Status::read(pid).map_err(InjectError::io(pid, "read the status"))?;
            status.check(pid)?;
            Err(InjectError::io(pid, "trace")(error))
        }
        Err(error) => Err(InjectError::io(pid, "trace")(error)),
    }
}

/// Between attaching and detaching.
fn within(
    tracee: &Tracee,
    pid: i32,
    instruction: u64,
    leaked: &[i32],
) -> Result<OwnedFd, InjectError> {
    let process = Pid::from_raw(pid).ok_or(InjectError::Gone(pid))?;
    let pidfd = pidfd_open(process, PidfdFlags::empty())
        .map_err(|e| InjectError::io(pid, "open")(e.into()))?;

    tracee.stop(STOP)?;
    let registers = tracee.registers().map_err(InjectError::io(pid, "read the registers"))?;
    if !arch::supported(&registers) {
        return Err(InjectError::Architecture(pid));
    }
    if rseq::inside(pid, arch::position(&registers)) {
        return Err(InjectError::Sequence(pid));
    }
    tracee.save(registers).map_err(InjectError::io(pid, "save the state"))?;
    let call = |number, argument| {
        tracee.call(&arch::call(&registers, instruction, number, argument), number, STOP)
    };
    for fd in leaked {
        call(libc::SYS_close, fd.unsigned_abs().into())?;
    }
    let flags = USER_MODE_ONLY | (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let made = call(libc::SYS_userfaultfd, flags)?;
    let number = i32::try_from(made).ok().filter(|n| *n >= 0).ok_or_else(|| {
        let errno = i32::try_from(-made).unwrap_or(libc::EINVAL);
        InjectError::Refused { pid, source: io::Error::from_raw_os_error(errno) }
    })?;
    let ours = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty());
    let closed = call(libc::SYS_close, number.unsigned_abs().into())?;
    let ours = ours.map_err(|e| InjectError::io(pid, "copy the userfaultfd")(e.into()))?;
    let is_ours = fs::read_link(format!("/proc/self/fd/{}", ours.as_fd().as_raw_fd()))
        .is_ok_and(|link| link.as_os_str() == LINK);
    if !is_ours || closed < 0 {
        let source = io::Error::other("another thread replaced the descriptor");
        return Err(InjectError::Io { pid, step: "copy the userfaultfd", source });
    }
    Ok(ours)
}

/// What `/proc/PID/status` and its neighbours say against a stop.
#[derive(Debug, Default)]
struct Status {
    state: char,
    tracer: i32,
    seccomp: bool,
    frozen: bool,
    memory: bool,
}

impl Status {
    fn read(pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).map_err(gone)?;
        let mut status = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match key {
                "State" => status.state = value.chars().next().unwrap_or_default(),
                "TracerPid" => status.tracer = value.parse().unwrap_or_default(),
                "VmSize" => status.memory = true,
                "Seccomp" => status.seccomp = value != "0",
                _ => {}
            }
        }
        // Of a process that is frozen by one cgroup of several: the kernel's functions in which it waits.
        let wait = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        status.frozen = matches!(wait.as_str(), "__refrigerator" | "do_freezer_trap")
            || (wait == "get_signal" && status.state == 'S')
            || Freezer::of(pid.unsigned_abs()).and_then(|f| f.is_frozen()).unwrap_or(false);
        Ok(status)
    }

    /// Whether it has ended, or has given up its memory on the way there.
    fn ending(&self) -> bool {
        matches!(self.state, 'Z' | 'X') || !self.memory
    }

    fn check(&self, pid: i32) -> Result<(), InjectError> {
        match self {
            Self { tracer, .. } if *tracer != 0 => Err(InjectError::Traced { pid, by: *tracer }),
            Self { frozen: true, .. } => Err(InjectError::Frozen(pid)),
            Self { state: 'T', .. } => Err(InjectError::Stopped(pid)),
            Self { state: 't', .. } => Err(InjectError::Traced { pid, by: 0 }),
            status if status.ending() => Err(InjectError::Gone(pid)),
            _ => Ok(()),
        }
    }
}

/// A process that is gone has no files in `/proc`.
fn gone(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => io::Error::from_raw_os_error(libc::ESRCH),
        _ => error,
    }
}
