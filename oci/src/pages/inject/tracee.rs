//! One process under ptrace(2), from attaching to detaching.
#![allow(unsafe_code)] // ptrace(2): the crates that we use lack half of the requests.

use std::cell::RefCell;
use std::io;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use super::{InjectError, Status, arch};

/// `PTRACE_O_TRACESYSGOOD`: stops at system calls can be told from others.
const TRACE_SYSGOOD: usize = 1;
/// `PTRACE_O_SUSPEND_SECCOMP`.
const SUSPEND_SECCOMP: usize = 1 << 21;
/// `PTRACE_EVENT_STOP`, as it stands in the code of a stop's reason.
const EVENT_STOP: i32 = 128;

/// Stops are looked for without a pause for so long. Most come within it.
const SPIN: Duration = Duration::from_micros(300);
const POLL: Duration = Duration::from_micros(50);

/// Size of the kernel's signal mask, bytes.
const MASK: usize = 8;

/// Why the process is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// At the entry of a system call.
    Call,
    /// On the way to handling a signal, as was asked for: here registers may be set.
    Trap,
    /// The same, because it was stopped by a signal such as SIGSTOP.
    Group,
    /// A signal is about to be delivered.
    Signal(i32),
}

/// What to do with it next.
#[derive(Debug, Clone, Copy)]
enum Resume {
    /// Let it run.
    Run = libc::PTRACE_CONT as isize,
    /// Let it run to the next system call.
    ToCall = libc::PTRACE_SYSCALL as isize,
}

/// A process that this thread traces.
#[derive(Debug)]
pub(super) struct Tracee {
    pid: i32,
    /// Registers and signal mask to be put back; none when they were not touched.
    saved: RefCell<Option<(arch::Registers, [u8; MASK])>>,
}

/// A process just seized.
pub(super) struct Seized {
    pub(super) tracee: Tracee,
    /// Seccomp filters do nothing while it is traced.
    pub(super) suspended: bool,
}

impl Tracee {
    /// Attaches to the process, which runs on. It is let go when this thread ends, if not before.
    pub(super) fn seize(pid: i32) -> io::Result<Seized> {
        let tracee = Self { pid, saved: RefCell::default() };
        match tracee.ptrace(libc::PTRACE_SEIZE, 0, TRACE_SYSGOOD | SUSPEND_SECCOMP) {
            Ok(()) => return Ok(Seized { tracee, suspended: true }),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Err(error),
            Err(_) => {}
        }
        tracee.ptrace(libc::PTRACE_SEIZE, 0, TRACE_SYSGOOD)?;
        Ok(Seized { tracee, suspended: false })
    }

    /// Attaches to one thread and has it stop, wherever that is. It is let go when this thread ends, if
    /// not before by [`let_go`](Self::let_go).
    pub(super) fn hold(thread: i32) -> io::Result<Self> {
        let tracee = Self { pid: thread, saved: RefCell::default() };
        tracee.ptrace(libc::PTRACE_SEIZE, 0, 0)?;
        match tracee.ptrace(libc::PTRACE_INTERRUPT, 0, 0) {
            // It has ended just now.
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
            _ => Ok(tracee),
        }
    }

    /// Whether it is stopped.
    pub(super) fn stands(&self) -> bool {
        self.look().is_some()
    }

    /// Detaches, where it is stopped, from one whose registers were not touched. A signal that has
    /// stopped it is passed on.
    pub(super) fn let_go(&self) {
        let signal = match self.look() {
            None => return,
            Some(Stop::Signal(signal)) => signal.unsigned_abs() as usize,
            Some(_) => 0,
        };
        // Failing, it has been killed, or is detached by the end of this thread.
        let _ = self.ptrace(libc::PTRACE_DETACH, 0, signal);
    }

    /// Stops the process where registers may be set.
    pub(super) fn stop(&self, limit: Duration) -> Result<(), InjectError> {
        self.interrupt()?;
        loop {
            match self.wait(limit)? {
                Stop::Trap => return Ok(()),
                Stop::Group => return Err(InjectError::Stopped(self.pid)),
                // It came first. The stop that was asked for comes after it.
                Stop::Signal(signal) => self.resume(Resume::Run, signal)?,
                Stop::Call => self.resume(Resume::Run, 0)?,
            }
        }
    }

    pub(super) fn registers(&self) -> io::Result<arch::Registers> {
        let mut registers = arch::Registers::default();
        self.ptrace(arch::GET_REGISTERS, 0, &raw mut registers as usize)?;
        Ok(registers)
    }

    /// From now on `registers` and the signal mask are put back at the end. All signals are blocked.
    pub(super) fn save(&self, registers: arch::Registers) -> io::Result<()> {
        let (mut mask, all) = ([0u8; MASK], [0xffu8; MASK]);
        self.ptrace(libc::PTRACE_GETSIGMASK, MASK, &raw mut mask as usize)?;
        *self.saved.borrow_mut() = Some((registers, mask));
        self.ptrace(libc::PTRACE_SETSIGMASK, MASK, &raw const all as usize)
    }

    /// Has the stopped process call the kernel with `registers`, and stops it again behind the call.
    /// Gives what the call gave: an error number below zero when it failed.
    pub(super) fn call(
        &self,
        registers: &arch::Registers,
        number: libc::c_long,
        limit: Duration,
    ) -> Result<i64, InjectError> {
        self.set_registers(registers).map_err(InjectError::io(self.pid, "set the registers"))?;
        self.resume(Resume::ToCall, 0)?;
        self.until(limit, Resume::ToCall, |stop| stop == Stop::Call)?;
        let entered = self.read_registers()?;
        if arch::number(&entered) != number {
            let source = io::Error::other("it made another system call");
            return Err(InjectError::Io { pid: self.pid, step: "system call", source });
        }
        // On its way out of the call it finds that it is to stop.
        self.interrupt()?;
        self.resume(Resume::Run, 0)?;
        self.until(limit, Resume::Run, |stop| matches!(stop, Stop::Trap | Stop::Group))?;
        Ok(arch::result(&self.read_registers()?))
    }

    /// Puts back what was saved and lets the process go. False when it did not stop for that in time:
    /// it must be tried again. True when the process is gone.
    pub(super) fn release(&self, limit: Duration) -> bool {
        // Where nothing was changed the end of this thread detaches as well.
        if self.saved.borrow().is_none() && self.look().is_none() {
            return true;
        }
        match self.try_release(limit) {
            Ok(()) => true,
            // A process that runs is as unknown to a request as one that is gone.
            Err(_) => self.gone() || self.saved.borrow().is_none(),
        }
    }

    fn try_release(&self, limit: Duration) -> Result<(), InjectError> {
        let io = InjectError::io;
        if !matches!(self.look(), Some(Stop::Trap | Stop::Group)) {
            self.interrupt()?;
            if self.look().is_some() {
                self.resume(Resume::Run, 0)?;
            }
            self.until(limit, Resume::Run, |stop| matches!(stop, Stop::Trap | Stop::Group))?;
        }
        let saved = *self.saved.borrow();
        if let Some((registers, mask)) = saved {
            self.set_registers(&registers).map_err(io(self.pid, "restore the registers"))?;
            self.ptrace(libc::PTRACE_SETSIGMASK, MASK, &raw const mask as usize)
                .map_err(io(self.pid, "restore the signal mask"))?;
        }
        self.ptrace(libc::PTRACE_DETACH, 0, 0).map_err(io(self.pid, "detach"))?;
        *self.saved.borrow_mut() = None;
        Ok(())
    }

    /// Waits for a stop that is `wanted`. Whatever else stops the process is passed on to it.
    fn until(
        &self,
        limit: Duration,
        resume: Resume,
        wanted: impl Fn(Stop) -> bool,
    ) -> Result<(), InjectError> {
        loop {
            match self.wait(limit)? {
                stop if wanted(stop) => return Ok(()),
                Stop::Signal(signal) => self.resume(resume, signal)?,
                _ => self.resume(resume, 0)?,
            }
        }
    }

    fn wait(&self, limit: Duration) -> Result<Stop, InjectError> {
        let begin = Instant::now();
        loop {
            if let Some(stop) = self.look() {
                return Ok(stop);
            }
            let waited = begin.elapsed();
            if waited < SPIN {
                thread::yield_now();
                continue;
            }
            if self.gone() {
                return Err(InjectError::Gone(self.pid));
            }
            if waited >= limit {
                return Err(InjectError::Unstoppable(self.pid));
            }
            thread::sleep(POLL);
        }
    }

    fn gone(&self) -> bool {
        Status::read(self.pid).map_or(true, |s| s.ending())
    }

    /// Why the process is stopped, if it is.
    fn look(&self) -> Option<Stop> {
        // SAFETY: an array of numbers, for which zeros are a value.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        self.ptrace(libc::PTRACE_GETSIGINFO, 0, &raw mut info as usize).ok()?;
        Some(match (info.si_code >> 8, info.si_code & 0xff) {
            (EVENT_STOP, libc::SIGTRAP) => Stop::Trap,
            (EVENT_STOP, _) => Stop::Group,
            (0, code) if code == libc::SIGTRAP | 0x80 => Stop::Call,
            _ => Stop::Signal(info.si_signo),
        })
    }

    fn interrupt(&self) -> Result<(), InjectError> {
        self.ptrace(libc::PTRACE_INTERRUPT, 0, 0).map_err(InjectError::io(self.pid, "interrupt"))
    }

    fn resume(&self, how: Resume, signal: i32) -> Result<(), InjectError> {
        self.ptrace(how as _, 0, signal.unsigned_abs() as usize)
            .map_err(InjectError::io(self.pid, "resume"))
    }

    fn read_registers(&self) -> Result<arch::Registers, InjectError> {
        self.registers().map_err(InjectError::io(self.pid, "read the registers"))
    }

    fn set_registers(&self, registers: &arch::Registers) -> io::Result<()> {
        self.ptrace(arch::SET_REGISTERS, 0, registers as *const _ as usize)
    }

    /// A request whose `data`, where it is an address, is that of a value of the right size.
    fn ptrace(&self, request: arch::Request, address: usize, data: usize) -> io::Result<()> {
        // SAFETY: the callers in this module pass the address of a local of the size that the request
        // reads or writes, or a number.
        let result = unsafe {
            libc::ptrace(
                request,
                self.pid,
                ptr::without_provenance_mut::<libc::c_void>(address),
                ptr::with_exposed_provenance_mut::<libc::c_void>(data),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
