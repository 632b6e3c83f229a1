//! The thread that reads a queue.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::nfqueue::{Queue, Verdict};

/// Bytes that are read at once: hundreds of packets.
const BUFFER: usize = 1 << 17;

/// A decision counts for packets of which the thread has not read yet, too: more than can wait. The
/// kernel compares numbers within a window of 2^31.
const UNREAD: u32 = 1 << 24;

/// What the thread and its owner share.
#[derive(Debug)]
struct Shared {
    queue: Queue,
    state: Mutex<State>,
    stop: EventFd,
}

#[derive(Debug, Default)]
struct State {
    /// What becomes of packets: none yet means that they wait.
    verdict: Option<Verdict>,
    /// Packets that have come.
    count: u64,
    /// Number of the last one.
    last: u32,
}

/// A thread that reads a queue until this is dropped.
#[derive(Debug)]
pub(super) struct Reader {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(super) fn start(queue: Queue) -> Result<Self> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).context("make an eventfd")?;
        let shared = Arc::new(Shared { queue, state: Mutex::default(), stop });
        let thread = std::thread::Builder::new().name("queue".to_owned()).spawn({
            let shared = shared.clone();
            move || {
                if let Err(error) = shared.read() {
                    log::warn!("read queue {}: {error}", shared.queue.number());
                }
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Packets that have come.
    #[cfg(test)]
    pub(super) fn count(&self) -> u64 {
        self.shared.state().count
    }

    /// Decides on all packets that wait, in their order, and on those to come. Returns how many
    /// have come. Those that are accepted have gone on by then.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn decide(&self, verdict: Verdict) -> io::Result<u64> {
        // The thread is kept out meanwhile, so that nothing overtakes what waits.
        let mut state = self.shared.state();
        state.verdict = Some(verdict);
        self.shared.queue.decide(verdict, state.last.wrapping_add(UNREAD))?;
        Ok(state.count)
    }
}

impl Drop for Reader {
    /// Ends the thread and closes the queue: the kernel drops what waits.
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            while let Some(packets) = self.queue.read(&mut buffer)? {
                // The lock is taken after reading: a packet that came after the decision is seen
                // here with the decision made, one that came before it was part of it.
                let mut state = self.state();
                state.count += packets.count;
                state.last = packets.last.unwrap_or(state.last);
                if let (Some(verdict), Some(last)) = (state.verdict, packets.last) {
                    self.queue.decide(verdict, last)?;
                }
            }
            let mut waited = [
                PollFd::new(self.queue.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut waited, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
                Ok(_) if waited[1].any().unwrap_or(true) => return Ok(()),
                Ok(_) => {}
            }
        }
    }
}
