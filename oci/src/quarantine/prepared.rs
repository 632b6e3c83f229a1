//! The source's connection lock, made before it is needed.

use std::net::IpAddr;
use std::time::Duration;

use super::hold::wait_for_others;
use super::netlink::Socket;
use super::rules::{Script, Verdict};
use super::{Error, run, table};

/// How long removing the tables waits for packets that other migrations hold on this host.
const OTHERS: Duration = Duration::from_millis(100);

/// Rules that take effect within a millisecond when they are wanted.
///
/// Tables and chains are hooked in when this is made, without rules: everything passes.
/// [`Prepared::lock`] adds the rules in one transaction. It uses no process, and belongs to the
/// network namespace of the thread that made it; any thread may use it. Dropping it lets
/// everything pass and removes the tables, which takes some 30 ms, unless [`Prepared::leave`] gives
/// them up.
#[derive(Debug)]
pub struct Prepared {
    socket: Socket,
    migration: String,
    lock: Vec<u8>,
    unlock: Vec<u8>,
    leave: bool,
}

impl Prepared {
    /// Makes the tables of `migration` anew, without rules.
    ///
    /// # Errors
    /// When the kernel refuses; nothing is there then.
    pub fn new(migration: &str, addresses: &[IpAddr]) -> Result<Self, Error> {
        Self::make(migration, addresses, |script| script.silence(addresses, Verdict::Drop))
    }

    /// The same for every packet of the calling thread's network namespace, whatever its addresses;
    /// ARP passes. For a namespace that belongs to the container.
    ///
    /// # Errors
    /// As [`Prepared::new`].
    pub fn for_all(migration: &str) -> Result<Self, Error> {
        Self::make(migration, &[], |script| script.silence_all())
    }

    fn make(
        migration: &str,
        addresses: &[IpAddr],
        silence: impl for<'a> FnOnce(Script<'a>) -> Script<'a>,
    ) -> Result<Self, Error> {
        let what = "prepare the connection lock";
        let socket = Socket::open().map_err(|source| Error { what, source })?;
        let table = table(migration);
        run(&socket, Script::new(&table).delete().create(addresses), what)?;
        let unlocked = || Script::new(&table).pass(addresses);
        Ok(Self {
            lock: silence(unlocked()).seal(),
            unlock: unlocked().seal(),
            migration: migration.to_owned(),
            socket,
            leave: false,
        })
    }

    /// From now on nothing passes of what this was made for. Can be repeated.
    ///
    /// # Errors
    /// When the kernel refuses; everything passes still.
    pub fn lock(&self) -> Result<(), Error> {
        self.transact(&self.lock, "lock the connections")
    }

    /// Everything passes again; can be locked again. Can be repeated.
    ///
    /// # Errors
    /// When the kernel refuses: the tables are gone, for example. Nothing passes still.
    pub fn unlock(&self) -> Result<(), Error> {
        self.transact(&self.unlock, "unlock the connections")
    }

    /// What dropping does, and says when it fails.
    ///
    /// # Errors
    /// When the kernel refuses; [`super::clear`] may be tried.
    pub fn remove(mut self) -> Result<(), Error> {
        self.leave = true;
        self.remove_now()
    }

    /// Leaves the tables as they are: whoever knows the migration's id removes them.
    pub fn leave(mut self) {
        self.leave = true;
    }

    fn remove_now(&self) -> Result<(), Error> {
        // At once, as opposed to what follows. If the tables are gone there is nothing to unlock.
        if self.unlock().is_ok() {
            wait_for_others(OTHERS);
        }
        let table = table(&self.migration);
        run(&self.socket, Script::new(&table).delete(), "remove the connection lock")
    }

    fn transact(&self, sealed: &[u8], what: &'static str) -> Result<(), Error> {
        self.socket.transact(sealed).map_err(|source| Error { what, source })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if !self.leave
            && let Err(error) = self.remove_now()
        {
            log::warn!("migration {}: {error}: {}", self.migration, error.source);
        }
    }
}
