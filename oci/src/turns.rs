//! How long a process keeps a processor while others want it.
#![allow(unsafe_code)] // sched_setattr(2) has no wrapper

use std::io;

/// The longest that the kernel takes, nanoseconds.
const LONG: u64 = 100_000_000;

/// `struct sched_attr` of sched_setattr(2), as of its first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Gives the calling thread, and those that it starts, long turns. In all it gets the same time; but a
/// task with turns of the usual length that wakes up, such as one of a container that is to be frozen,
/// runs at once and does not wait some milliseconds for the end of a turn.
///
/// # Errors
/// Before Linux 6.12, which takes no length for a turn; nothing has changed then.
pub fn long() -> io::Result<()> {
    // SAFETY: it takes numbers and returns one.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        nice,
        runtime: LONG,
        ..SchedAttr::default()
    };
    // SAFETY: the kernel reads as many bytes as the structure says that it has.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_it_for_this_thread_alone() {
        let runtime = || {
            let mut attr = SchedAttr::default();
            let size = size_of::<SchedAttr>();
            // SAFETY: the kernel writes as many bytes as it is told.
            let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
            assert_eq!(got, 0);
            attr.runtime
        };
        let before = runtime();
        let (own, started) = std::thread::spawn(move || {
            long().unwrap();
            (runtime(), std::thread::spawn(runtime).join().unwrap())
        })
        .join()
        .unwrap();
        // An older kernel says nothing of turns.
        if before > 0 {
            assert_eq!((own, started), (LONG, LONG));
        }
        assert_eq!(runtime(), before);
    }
}
