//! The keeper: owns the store's memory and the tasks' descriptors, and does nothing that could fail.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::SockType;
use nix::sys::time::TimeSpec;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::lazy::{self, Lazy};
use super::meta::{self, CONTROL, Meta};
use super::protocol;
use super::shared::{CONTEXTS, FREE, Field, Shared, Word};
use super::worker::{self, Surroundings};
use super::{answer, descriptor};
use crate::pages::store::{self, Arena, Limits, Set, bits};

/// Connections at once.
const CLIENTS: usize = 32;
/// How often the description is brought up to date.
const TICK: Duration = Duration::from_secs(5);
/// How long those who are connected may still ask when all is in.
const LINGER: Duration = Duration::from_secs(2);
/// A worker that lives shorter than this did not help.
const SHORT: Duration = Duration::from_secs(1);

/// A connection.
pub(super) struct Connection {
    pub(super) fd: OwnedFd,
    pub(super) writer: bool,
    /// It knows that all is in.
    pub(super) told: bool,
}

/// The process that answers faults.
pub(super) struct Running {
    pub(super) pid: i32,
    pidfd: OwnedFd,
    since: Instant,
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    GoOn,
    End,
}

pub(super) struct Keeper {
    pub(super) arena: Arena,
    pub(super) shared: Shared,
    dir: PathBuf,
    expiry: Duration,
    control: OwnedFd,
    pub(super) connections: Vec<Connection>,
    /// Where a restore may connect.
    pub(super) listener: Option<OwnedFd>,
    pub(super) worker: Option<Running>,
    /// When to start the next worker, and how many were short-lived.
    again: Option<Instant>,
    short: u32,
    bell: OwnedFd,
    /// Ourselves, for the worker to watch.
    myself: OwnedFd,
    pub(super) meta: Meta,
    used: Instant,
    told: Instant,
    /// All is in; until then those who are connected may ask how it went.
    over: Option<Instant>,
}

/// Keeps a store in `dir` until all its pages are in, nobody has used it for [`Limits::expiry`], or it
/// is told to end; then removes `dir`. To be called by a process of its own and of one thread, which
/// becomes a daemon: its own session, no standard streams, no signals of a terminal.
///
/// # Errors
/// When memory, the folder or its socket cannot be had. Nothing is left then.
pub fn keeper_main(dir: &Path, limits: Limits) -> io::Result<()> {
    let _ = nix::unistd::setsid();
    descriptor::ignore_signals();
    descriptor::allow_many();
    descriptor::close_stdio()?;
    // Taking it away would stop the container. Without the right to ask for this, we go on.
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        log::debug!("oom_score_adj: {e}");
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let result = Keeper::new(dir, &limits).and_then(|mut keeper| keeper.run());
    meta::remove(dir);
    result
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

impl Keeper {
    fn new(dir: &Path, limits: &Limits) -> io::Result<Self> {
        let shared = Shared::new()?;
        shared.lock();
        let now = Instant::now();
        let meta = Meta {
            version: 1,
            container: String::new(),
            migration: String::new(),
            created: meta::unix_now(),
            expires: Some(meta::unix_now() + limits.expiry.as_secs()),
            bytes: 0,
            keeper: std::process::id(),
        };
        // Whoever can connect finds it described.
        meta.write(dir)?;
        Ok(Self {
            arena: Arena::create(limits)?,
            shared,
            dir: dir.to_owned(),
            expiry: limits.expiry,
            control: protocol::listen(&dir.join(CONTROL), SockType::SeqPacket)?,
            connections: Vec::new(),
            listener: None,
            worker: None,
            again: None,
            short: 0,
            bell: descriptor::eventfd()?,
            myself: pidfd(Pid::this().as_raw())?,
            meta,
            used: now,
            told: now,
            over: None,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            if self.in_use() {
                self.used = Instant::now();
            } else if self.used.elapsed() >= self.expiry {
                log::info!("page store {} was not used and ends", self.dir.display());
                self.end_worker();
                return Ok(());
            }
            if let Some(until) = self.over
                && (self.connections.iter().all(|connection| connection.told)
                    || until <= Instant::now())
            {
                return Ok(());
            }
            if self.again.is_some_and(|at| at <= Instant::now()) {
                self.again = None;
                self.start_worker()?;
            }
            if self.told.elapsed() >= TICK {
                self.tell();
            }
            let ready = self.wait()?;
            if ready.contains(&self.control.as_raw_fd()) {
                self.accept();
            }
            if ready.iter().any(|fd| Some(*fd) == self.listener.as_ref().map(AsRawFd::as_raw_fd)) {
                self.restore_connects();
            }
            if ready.contains(&(self.shared.get(Word::LazyFd) as RawFd - 1)) {
                self.hear_restore()?;
            }
            let over = self.worker.as_ref().is_some_and(|w| ready.contains(&w.pidfd.as_raw_fd()));
            if over {
                self.worker_ended()?;
            }
            for at in (0..self.connections.len()).rev() {
                if ready.contains(&self.connections[at].fd.as_raw_fd())
                    && self.serve(at)? == Fate::End
                {
                    self.end_worker();
                    return Ok(());
                }
            }
        }
    }

    /// Whether somebody writes or is served.
    fn in_use(&self) -> bool {
        self.connections.iter().any(|connection| connection.writer)
            || self.shared.get(Word::LazyFd) != 0
            || self.has_tasks()
    }

    /// Whether there are tasks to be served.
    pub(super) fn has_tasks(&self) -> bool {
        (0..CONTEXTS).any(|slot| self.shared.read(slot, Field::State) != FREE)
    }

    /// Descriptors that are ready.
    fn wait(&self) -> io::Result<Vec<RawFd>> {
        let lazy = self.shared.get(Word::LazyFd) as RawFd;
        let fds = [
            Some(self.control.as_fd()),
            self.listener.as_ref().map(AsFd::as_fd),
            (lazy > 0).then(|| descriptor::borrow(lazy - 1)),
            self.worker.as_ref().map(|worker| worker.pidfd.as_fd()),
        ];
        let clients = self.connections.iter().map(|connection| connection.fd.as_fd());
        let mut polls: Vec<PollFd<'_>> = fds
            .into_iter()
            .flatten()
            .chain(clients)
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        let now = Instant::now();
        let again = self.again.map(|at| at.saturating_duration_since(now));
        let expiry = self.expiry.saturating_sub(self.used.elapsed()).max(Duration::from_millis(1));
        let over = self.over.map(|at| at.saturating_duration_since(now));
        let wait = TICK
            .min(over.unwrap_or(TICK))
            .min(again.unwrap_or(TICK))
            .min(if self.in_use() { TICK } else { expiry });
        match nix::poll::ppoll(&mut polls, Some(TimeSpec::from_duration(wait)), None) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => return Ok(Vec::new()),
            Err(e) => return Err(e.into()),
        }
        let ready = polls.iter().filter(|poll| poll.any().unwrap_or(false));
        Ok(ready.map(|poll| poll.as_fd().as_raw_fd()).collect())
    }

    /// Brings the description up to date.
    pub(super) fn tell(&mut self) {
        let expires = (!self.in_use())
            .then(|| meta::unix_now() + self.expiry.saturating_sub(self.used.elapsed()).as_secs());
        let bytes = self.arena.get(store::Word::Pages) * crate::pages::PAGE;
        let now = Meta { expires, bytes, ..self.meta.clone() };
        if now != self.meta {
            self.meta = now;
            if let Err(e) = self.meta.write(&self.dir) {
                log::warn!("description of a page store: {e}");
            }
        }
        self.told = Instant::now();
    }

    fn accept(&mut self) {
        match protocol::accept(&self.control) {
            Ok(Some(_)) if self.connections.len() >= CLIENTS => log::warn!("too many connections"),
            Ok(Some(fd)) => self.connections.push(Connection { fd, writer: false, told: false }),
            Ok(None) => {}
            Err(e) => log::warn!("control socket: {e}"),
        }
    }

    /// Answers a request. A connection that does not speak our language is closed.
    fn serve(&mut self, at: usize) -> io::Result<Fate> {
        let request = match protocol::receive(self.connections[at].fd.as_fd()) {
            Ok(Some((request, _))) => request,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Fate::GoOn),
            Ok(None) => return Ok(self.hang_up(at)),
            Err(e) => {
                log::warn!("control socket: {e}");
                let refused = protocol::Reply::Refused(format!(
                    "not a request of version {}",
                    protocol::VERSION
                ));
                let _ = protocol::send(self.connections[at].fd.as_fd(), &refused, &[]);
                return Ok(self.hang_up(at));
            }
        };
        let (reply, fate) = answer::answer(self, at, request)?;
        let fds = match reply {
            protocol::Reply::Store => self.arena.descriptors(),
            _ => Vec::new(),
        };
        if protocol::send(self.connections[at].fd.as_fd(), &reply, &fds).is_err() {
            self.hang_up(at);
        }
        Ok(fate)
    }

    fn hang_up(&mut self, at: usize) -> Fate {
        if self.connections.swap_remove(at).writer {
            self.used = Instant::now();
            self.tell();
        }
        Fate::GoOn
    }

    /// Tells the worker that shared memory has changed.
    pub(super) fn ring(&self) {
        descriptor::ring(&self.bell);
    }

    fn restore_connects(&mut self) {
        let Some(listener) = &self.listener else { return };
        match protocol::accept(listener) {
            Ok(Some(fd)) => {
                self.shared.put(Word::LazyFd, descriptor::give(fd) as u64 + 1);
                // One restore only.
                self.listener = None;
            }
            Ok(None) => {}
            Err(e) => log::warn!("socket of the restore: {e}"),
        }
    }

    fn hear_restore(&mut self) -> io::Result<()> {
        let state = lazy::pump(&self.shared);
        self.ring();
        match state {
            Ok(Lazy::Open) => Ok(()),
            _ if self.shared.get(Word::Marker) != 0 => {
                lazy::hang_up(&self.shared);
                Ok(())
            }
            state => {
                log::warn!("the restore ended before its time: {state:?}");
                self.abort_restore()
            }
        }
    }

    /// Starts a worker, if there is none.
    pub(super) fn start_worker(&mut self) -> io::Result<()> {
        if self.worker.is_some() {
            return Ok(());
        }
        let around = Surroundings {
            shared: &self.shared,
            arena: &self.arena,
            bell: self.bell.as_raw_fd(),
            keeper: self.myself.as_raw_fd(),
            dir: &self.dir,
        };
        let pid = descriptor::fork_sharing(|| match worker::run(&around) {
            Ok(()) => 0,
            Err(e) => {
                log::error!("page daemon: {e}");
                1
            }
        })?;
        self.worker = Some(Running { pid, pidfd: pidfd(pid)?, since: Instant::now() });
        Ok(())
    }

    /// A worker has ended: the next one comes, unless all is in.
    fn worker_ended(&mut self) -> io::Result<()> {
        let Some(worker) = self.worker.take() else { return Ok(()) };
        let status = waitpid(Pid::from_raw(worker.pid), None)?;
        if self.shared.get(Word::Done) != 0 {
            self.over = Some(Instant::now() + LINGER);
            return Ok(());
        }
        log::error!("the page daemon's worker ended: {status:?}");
        self.shared.add(Word::Restarts, 1);
        self.short = if worker.since.elapsed() < SHORT { self.short + 1 } else { 0 };
        // Never given up: tasks that wait are better than tasks that see zeros.
        let wait = Duration::from_millis(10 * u64::from(self.short.saturating_sub(16)));
        self.again = Some(Instant::now() + wait.min(SHORT));
        Ok(())
    }

    fn end_worker(&mut self) {
        self.again = None;
        if let Some(worker) = self.worker.take() {
            let pid = Pid::from_raw(worker.pid);
            let _ = kill(pid, Signal::SIGKILL);
            while matches!(
                waitpid(pid, None),
                Ok(WaitStatus::Stopped(..)) | Err(nix::errno::Errno::EINTR)
            ) {}
        }
    }

    /// Forgets the restore. Its tasks have never run, and do not any more. Nothing of the store was given
    /// back: it is as it was, and takes pages again.
    pub(super) fn abort_restore(&mut self) -> io::Result<()> {
        self.end_worker();
        self.listener = None;
        lazy::hang_up(&self.shared);
        descriptor::close_uffds()?;
        self.shared.reset()?;
        for chunk in 0..self.arena.chunks() {
            bits::clear(self.arena.set(chunk, Set::Done), 0..bits::CHUNK_PAGES);
        }
        self.arena.word(store::Word::Sealed).store(0, std::sync::atomic::Ordering::Release);
        self.used = Instant::now();
        self.tell();
        Ok(())
    }
}
