//! Keeps an address silent: no packet for it or from it passes this host, nor ARP or neighbour
//! discovery about it.
//!
//! The same rules serve both ends of a move. On the source they are the container's connection
//! lock: from before the freeze until the address has left, the kernel must neither acknowledge
//! data that the dump no longer sees nor answer with a reset ([`Prepared`]). On the destination they
//! keep the address quiet until the restored sockets are there, and packets for it wait
//! ([`Hold`]): one that is dropped comes again only after its sender's timer, 200 ms or more.
//!
//! ```text
//! prepared.rs  hold.rs       what is wanted
//!      └──┬──────┘
//!      rules.rs              tables, chains and rules of nf_tables
//!      netlink.rs            messages to the kernel; the reader of a queue uses them too
//! ```
//!
//! [connections] silences no address but single connections, for a checkpoint.
//!
//! All rules are in two tables that carry the migration's id, so that removing them can never touch
//! anybody else's.

pub mod connections;
mod hold;
pub mod netlink;
mod prepared;
mod rules;
#[cfg(test)]
mod tests;

use std::io;

pub use hold::{Hold, How};
use netlink::{Answer, Socket};
pub use prepared::Prepared;
use rules::Script;

/// What the names of all our tables begin with.
const PREFIX: &str = "ferry-";

/// Why rules could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Error {
    /// What was wanted.
    what: &'static str,
    /// What the kernel said.
    source: io::Error,
}

/// Name of the tables of `migration`.
pub fn table(migration: &str) -> String {
    format!("{PREFIX}{migration}")
}

/// Removes all rules of `migration` at once, whoever made them and however; no error when there are
/// none. Packets that wait in a queue are dropped. Takes no process; blocks for some milliseconds.
///
/// # Errors
/// When the kernel refuses.
pub fn clear(migration: &str) -> Result<(), Error> {
    remove(&table(migration), "remove the rules of the address")
}

/// Removes the table `name`, which may be anybody's, from this thread's network namespace, with all
/// in it; no error when it is not there. Blocks as [`clear`] does.
///
/// # Errors
/// When the kernel refuses.
pub fn remove_table(name: &str) -> Result<(), Error> {
    remove(name, "remove a table")
}

fn remove(table: &str, what: &'static str) -> Result<(), Error> {
    let socket = Socket::open().map_err(|source| Error { what, source })?;
    run(&socket, Script::new(table).delete(), what)
}

/// The migrations that have rules here, sorted.
///
/// # Errors
/// When the kernel refuses.
pub fn present() -> Result<Vec<String>, Error> {
    let failed = |source| Error { what: "list the rules of addresses", source };
    let mut found = Vec::new();
    let socket = Socket::open().map_err(failed)?;
    let see = |answer: Answer<'_>| {
        let Answer::Message { attributes, .. } = answer else { return };
        let name = rules::table_name(attributes).and_then(|name| name.strip_prefix(PREFIX));
        found.extend(name.map(str::to_owned));
    };
    socket.list(rules::list_tables(), see).map_err(failed)?;
    found.sort();
    found.dedup();
    Ok(found)
}

/// Names of all tables in the calling thread's network namespace, whoever made them; sorted.
///
/// # Errors
/// When the kernel refuses.
pub fn tables() -> Result<Vec<String>, Error> {
    let failed = |source| Error { what: "list the firewall's tables", source };
    let mut found = Vec::new();
    let socket = Socket::open().map_err(failed)?;
    let see = |answer: Answer<'_>| {
        let Answer::Message { attributes, .. } = answer else { return };
        found.extend(rules::table_name(attributes).map(str::to_owned));
    };
    socket.list(rules::list_tables(), see).map_err(failed)?;
    found.sort();
    Ok(found)
}

fn run(socket: &Socket, script: Script<'_>, what: &'static str) -> Result<(), Error> {
    socket.transact(&script.seal()).map_err(|source| Error { what, source })
}
