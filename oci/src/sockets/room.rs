//! Room for many descriptors.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// One at a time: a second one would take the raised limit for the one to go back to.
static ONE: Mutex<()> = Mutex::new(());

/// As long as this is held, this process may have as many descriptors as its hard limit lets it. Those that
/// it has stay when it is dropped. Not for longer than needed: programs that are started inherit the limit.
#[derive(Debug)]
pub(super) struct Room {
    before: Rlimit,
    _one: MutexGuard<'static, ()>,
}

impl Room {
    /// # Errors
    /// When the limit cannot be set.
    pub(super) fn make() -> io::Result<Self> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: before.maximum, ..before })?;
        Ok(Self { before, _one: one })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // To lower it is always allowed.
        let _ = setrlimit(Resource::Nofile, self.before);
    }
}
