//! Talking to the keeper of a store.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::meta::CONTROL;
use super::protocol::{self, Reply, Request, Status};
use crate::pages::store::{Store, StoreError};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);

/// Why a request was not answered as wished.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The keeper refused; it says why.
    #[error("page daemon refused: {0}")]
    Refused(String),
    /// The keeper answered something else, or has gone.
    #[error("page daemon gave no answer")]
    NoAnswer,
    /// The store it handed out cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system refused.
    #[error("page daemon: {0}")]
    Io(#[from] io::Error),
}

type Result<T> = std::result::Result<T, DaemonError>;

/// A connection to a keeper. Its calls block for as long as the keeper needs, 10 s at most.
#[derive(Debug)]
pub struct Client(OwnedFd);

impl Client {
    /// Connects to the keeper of the store in `dir`.
    ///
    /// # Errors
    /// When there is none.
    pub fn connect(dir: &Path) -> Result<Self> {
        let fd = protocol::connect(&dir.join(CONTROL))?;
        let limit = nix::sys::time::TimeVal::new(ANSWER.as_secs().cast_signed(), 0);
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &limit)
            .map_err(io::Error::from)?;
        Ok(Self(fd))
    }

    /// Connects to a keeper that has just been started, within `limit`.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn connect_within(dir: &Path, limit: Duration) -> Result<Self> {
        let start = Instant::now();
        loop {
            match Self::connect(dir) {
                Err(_) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(1)),
                result => return result,
            }
        }
    }

    /// Opens the store for writing, for a migration of a container. What an earlier attempt wrote is
    /// still there: see [`Store::verify`] and [`Store::hashes`]. The store keeps this connection.
    ///
    /// # Errors
    /// When there is a writer already, or the memory is complete.
    pub fn open_store(self, container: &str, migration: &str) -> Result<Store> {
        let (container, migration) = (container.to_owned(), migration.to_owned());
        match self.ask(&Request::Open { container, migration })? {
            (Reply::Store, fds) => Ok(Store::attach(fds, self.0)?),
            _ => Err(DaemonError::NoAnswer),
        }
    }

    /// Waits for a lazy restore at `path` (`lazy-pages.socket` in its work folder), one only, and starts
    /// the worker.
    ///
    /// # Errors
    /// When a restore is under way, or nothing can be made at `path`.
    pub fn listen(&self, path: &Path) -> Result<()> {
        self.order(&Request::Listen { path: path.to_owned() })
    }

    /// Says that the memory is complete: it takes no more pages, and is served from now on.
    ///
    /// # Errors
    /// When another connection is writing.
    pub fn complete(&self) -> Result<()> {
        self.order(&Request::Final)
    }

    /// Lets pages be filled in the background. Without this it begins two seconds after the restore.
    ///
    /// # Errors
    /// When the keeper has gone.
    pub fn fill(&self) -> Result<()> {
        self.order(&Request::Fill)
    }

    /// Stops filling until [`Client::fill`], or until 30 s after the restore.
    ///
    /// # Errors
    /// When the keeper has gone.
    pub fn hold_fill(&self) -> Result<()> {
        self.order(&Request::HoldFill)
    }

    /// What the store is doing. When all is in, it says so once to those who are connected, within two
    /// seconds, and is gone.
    ///
    /// # Errors
    /// When the keeper has gone.
    pub fn status(&self) -> Result<Status> {
        match self.ask(&Request::Status)? {
            (Reply::Status(status), _) => Ok(*status),
            _ => Err(DaemonError::NoAnswer),
        }
    }

    /// Forgets a restore that is not over. The store takes pages again and can be restored from again.
    ///
    /// # Errors
    /// When the restore is over: its tasks would find zeros.
    pub fn abort_restore(&self) -> Result<()> {
        self.order(&Request::AbortRestore)
    }

    /// Ends the store.
    ///
    /// # Errors
    /// When tasks are being served.
    pub fn drop_store(&self) -> Result<()> {
        self.order(&Request::Drop)
    }

    /// Has the worker killed at `point`, after `after` passes, `times` times.
    #[cfg(any(test, feature = "fault-points"))]
    #[doc(hidden)]
    pub fn fault_point(&self, point: super::Point, after: u64, times: u64) -> Result<()> {
        self.order(&Request::FaultPoint { point, after, times })
    }

    /// A request whose answer says nothing more than that it was done.
    fn order(&self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(DaemonError::NoAnswer),
        }
    }

    fn ask(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>)> {
        ask(&self.0, request)
    }
}

fn ask(fd: &OwnedFd, request: &Request) -> Result<(Reply, Vec<OwnedFd>)> {
    protocol::send(fd.as_fd(), request, &[])?;
    match protocol::receive(fd.as_fd())? {
        Some((Reply::Refused(why), _)) => Err(DaemonError::Refused(why)),
        Some(answer) => Ok(answer),
        None => Err(DaemonError::NoAnswer),
    }
}

impl Store {
    /// Says that the memory is complete: see [`Client::complete`]. A store that belongs to no keeper
    /// has nobody to say it to.
    ///
    /// # Errors
    /// When the keeper has gone.
    pub fn complete(&mut self) -> Result<()> {
        match self.lease() {
            Some(lease) => ask(lease, &Request::Final).map(|_| ()),
            None => Err(DaemonError::NoAnswer),
        }
    }
}
