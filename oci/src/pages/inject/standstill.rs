//! All threads that use one memory, standing still together for a moment.
//!
//! ```text
//!   list the threads ─▶ seize and interrupt each ─▶ wait for each ─▶ list again, until none is new
//!                                      work, with nobody to change the memory's layout
//!   let go each
//! ```
//! By ptrace(2), and not by the freezer: should this process be killed meanwhile, the kernel lets
//! them go, whereas a cgroup stays frozen; and the other processes of the container run on.
//! `measure_standing_still`, medians on two busy CPUs, ms:
//!
//! | threads | ptrace | freezer |
//! |---|---|---|
//! | 1, asleep | 0.13 | 0.5 |
//! | 3, two of them computing | 0.19 | 6.8 |
//! | 65, asleep | 1.2 | 1.0 |
//! | 257, asleep | 4.0 | 3.0 |
//!
//! Nothing is run in these threads and no register is touched: to them it is like any stop. A stop
//! ends epoll_wait(2) and the like with EINTR.
//!
//! Some threads cannot be stopped and need not be, since they will be before they come back to their
//! program: those that wait for a file, and those that wait for the exec of their child in vfork(2),
//! which uses the same memory and is made to stand still with them.

#![allow(unsafe_code)] // The calls about the priority of a thread have no safe wrapper.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::panic;
use std::thread;
use std::time::{Duration, Instant};

use super::tracee::Tracee;
use super::{InjectError, Status, arch, gone};
use crate::freezer::waits_in_vfork;

/// How long threads are given to stand still, try by try: those that stand already wait as long for one
/// that has to wait for a CPU.
const LIMITS: [Duration; 4] = [
    Duration::from_millis(10),
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
];

/// Threads that have not stopped by then are asked what they wait for.
const ASK: Duration = Duration::from_micros(500);
const POLL: Duration = Duration::from_micros(30);
/// One that runs on another CPU stops within so long.
const SPIN: Duration = Duration::from_micros(15);

/// Does `work` while no thread of process `pid`, and of the processes `relatives` that share its
/// memory, can run. Children that share its memory since a moment ago are found here. `stopped` is
/// called after each try with the time from the first stop to the last release.
///
/// # Errors
/// When they do not all stand still in time, or are traced by others: nothing was done then.
pub fn while_standing<T: Send>(
    pid: i32,
    relatives: &[i32],
    mut stopped: impl FnMut(Duration),
    work: impl FnOnce() -> T + Send,
) -> Result<T, InjectError> {
    let mut work = Some(work);
    let mut tries = LIMITS.iter();
    loop {
        let Some(limit) = tries.next() else { return Err(InjectError::Unstoppable(pid)) };
        // ptrace(2) binds them to one thread, and lets them go when that ends.
        let (outcome, took) = thread::scope(|scope| {
            let body = || {
                hurry();
                let mut crowd = Crowd::new(pid, relatives, *limit);
                let gathered = crowd.gather();
                let outcome = gathered.map(|()| work.take().map(|work| work()));
                crowd.let_go();
                (outcome, crowd.begin.elapsed())
            };
            let thread = thread::Builder::new().name("standstill".into());
            let thread = thread
                .spawn_scoped(scope, body)
                .map_err(InjectError::io(pid, "start a thread for the tracing"))?;
            Ok(thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
        })?;
        stopped(took);
        match outcome {
            Ok(Some(done)) => return Ok(done),
            // As long as they stood still for nothing.
            Ok(None) | Err(InjectError::Unstoppable(_)) => thread::sleep(*limit),
            Err(error) => return Err(error),
        }
    }
}

/// Has this thread run before others. The first that is let go would else take its CPU from it on a busy
/// machine, while the others are held.
fn hurry() {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameter is a local; both calls are about this thread, which ends soon.
    unsafe {
        let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
        // Not every cgroup may have that.
        if libc::sched_setscheduler(0, policy, &raw const priority) < 0 {
            libc::setpriority(libc::PRIO_PROCESS, 0, -20);
        }
    }
}

/// The threads that are held, by their number.
struct Crowd {
    pids: Vec<i32>,
    held: BTreeMap<i32, Tracee>,
    begin: Instant,
    limit: Duration,
}

/// What a look at the lists of threads has brought.
struct Found {
    /// Those that were told to stop: process and thread.
    new: Vec<(i32, i32)>,
    /// There were no others. The kernel ends its list at one that ends while it is read, however many
    /// come after it, and may leave that one out as well.
    whole: bool,
}

impl Crowd {
    fn new(pid: i32, relatives: &[i32], limit: Duration) -> Self {
        let mut pids = vec![pid];
        pids.extend_from_slice(relatives);
        Self { pids, held: BTreeMap::new(), begin: Instant::now(), limit }
    }

    /// Returns when all stand still.
    fn gather(&mut self) -> Result<(), InjectError> {
        loop {
            let Found { new, whole } = self.seize_new()?;
            if new.is_empty() && whole {
                return Ok(());
            }
            for (pid, thread) in new {
                self.wait(pid, thread)?;
            }
            // Should they be made faster than they are held.
            if self.begin.elapsed() > self.limit {
                return Err(InjectError::Unstoppable(self.pids[0]));
            }
        }
    }

    /// Has the threads stop that are not held yet.
    fn seize_new(&mut self) -> Result<Found, InjectError> {
        let (mut new, mut whole) = (Vec::new(), true);
        for (n, &pid) in self.pids.iter().enumerate() {
            let threads = match threads(pid) {
                Err(error) if n == 0 => {
                    return Err(InjectError::io(pid, "list the threads")(error));
                }
                // One that shares the memory has ended.
                threads => threads.unwrap_or_default(),
            };
            let listed = threads.len();
            for thread in threads {
                if self.held.contains_key(&thread) {
                    continue;
                }
                match Tracee::hold(thread) {
                    Ok(tracee) => drop(self.held.insert(thread, tracee)),
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                        whole = false;
                        continue;
                    }
                    Err(error) => match Thread::read(pid, thread) {
                        Ok(Thread { state: 'Z' | 'X', .. }) | Err(_) => {
                            // The first one stays in the list until all have ended.
                            whole &= thread == pid;
                            continue;
                        }
                        Ok(_) => {
                            let by = Status::read(thread).map_or(0, |status| status.tracer);
                            return Err(match by {
                                0 => InjectError::io(pid, "trace")(error),
                                by => InjectError::Traced { pid, by },
                            });
                        }
                    },
                }
                new.push((pid, thread));
            }
            // Those that are held are in the list until this thread ends, whatever becomes of them.
            whole &= listed == 0 || count(pid).is_ok_and(|count| count == listed);
        }
        Ok(Found { new, whole })
    }

    /// Waits until a thread stands still, has ended, or cannot but stop before it runs again.
    fn wait(&mut self, pid: i32, thread: i32) -> Result<(), InjectError> {
        let tracee = &self.held[&thread];
        let begin = Instant::now();
        while !tracee.stands() {
            if begin.elapsed() < SPIN {
                continue;
            }
            if self.begin.elapsed() < ASK {
                thread::sleep(POLL);
                continue;
            }
            let Ok(now) = Thread::read(pid, thread) else { return Ok(()) };
            match now.waits() {
                Waits::Harmless => return Ok(()),
                Waits::ForChild => {
                    self.pids.extend(children(pid, thread)?);
                    return Ok(());
                }
                // It waits for the others to end, which they do not while they are held.
                Waits::ForThreads => return Err(InjectError::Unstoppable(pid)),
                Waits::No => {}
            }
            let waited = self.begin.elapsed();
            if waited > self.limit {
                return Err(InjectError::Unstoppable(pid));
            }
            thread::sleep(POLL.max(waited / 16));
        }
        Ok(())
    }

    /// Those that are not stopped yet are let go by the end of this thread.
    fn let_go(&mut self) {
        self.held.values().for_each(Tracee::let_go);
    }
}

fn threads(pid: i32) -> io::Result<Vec<i32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).map_err(gone)?;
    Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

/// How many threads a process has, with those that have ended and are still in its list.
fn count(pid: i32) -> io::Result<usize> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The 20th field; the second is a name in brackets.
    let count = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(17));
    count.and_then(|count| count.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Children of one thread.
fn children(pid: i32, thread: i32) -> Result<Vec<i32>, InjectError> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/children"))
        .map_err(InjectError::io(pid, "list the children"))?;
    Ok(text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// What the kernel says a thread does.
#[derive(Debug)]
struct Thread {
    state: char,
    /// System call that it waits in: -1 for none, as in a page fault, and `None` where it runs.
    call: Option<i64>,
    /// Function of the kernel that it waits in.
    at: String,
}

/// Why a thread does not stop.
#[derive(Debug, PartialEq, Eq)]
enum Waits {
    /// For no reason that is known.
    No,
    /// It has ended, or waits where it cannot change the layout of its memory.
    Harmless,
    /// It waits in vfork(2).
    ForChild,
    /// It waits for all other threads to end.
    ForThreads,
}

impl Thread {
    fn read(pid: i32, thread: i32) -> io::Result<Self> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/task/{thread}/{name}"));
        let stat = read("stat")?;
        let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
        let call = read("syscall").unwrap_or_default();
        let call = call.split_whitespace().next().and_then(|number| number.parse().ok());
        let at = read("wchan").unwrap_or_default();
        Ok(Self { state: state.unwrap_or_default(), call, at })
    }

    fn waits(&self) -> Waits {
        match (self.state, self.call) {
            ('Z' | 'X', _) => Waits::Harmless,
            ('D', _) if waits_in_vfork(&self.at) => Waits::ForChild,
            ('D', Some(libc::SYS_execve | libc::SYS_execveat)) => Waits::ForThreads,
            // A page fault adds pages, and at most makes a stack grow.
            ('D', Some(-1)) => Waits::Harmless,
            ('D', Some(call)) if arch::FILE_CALLS.contains(&call) => Waits::Harmless,
            _ => Waits::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(state: char, call: Option<i64>, at: &str) -> Waits {
        Thread { state, call, at: at.into() }.waits()
    }

    #[test]
    fn only_who_cannot_change_the_layout_is_not_waited_for() {
        assert_eq!(waits('D', Some(libc::SYS_fsync), "folio_wait_bit_common"), Waits::Harmless);
        assert_eq!(waits('D', Some(-1), "folio_wait_bit_common"), Waits::Harmless);
        assert_eq!(waits('Z', None, "0"), Waits::Harmless);
        for call in [libc::SYS_mremap, libc::SYS_munmap, libc::SYS_ioctl, libc::SYS_clone] {
            assert_eq!(waits('D', Some(call), "rwsem_down_write_slowpath"), Waits::No);
        }
        // It can be stopped, and will be.
        assert_eq!(waits('S', Some(libc::SYS_read), "pipe_read"), Waits::No);
        assert_eq!(waits('R', None, "0"), Waits::No);
        assert_eq!(waits('D', Some(libc::SYS_clone), "kernel_clone"), Waits::ForChild);
        assert_eq!(waits('D', Some(libc::SYS_execve), "begin_new_exec"), Waits::ForThreads);
    }
}
