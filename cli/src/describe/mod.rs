//! What two hosts and a container are, and what of it stands in the way of a move.
//!
//! ```text
//!   host.rs       facts of a host (both ends)            ─┐
//!   container.rs  facts of the container (source)        ─┼─▶ checks.rs: pure, gives named blockers
//!   memory.rs     and of its memory                       │
//!                                                         │   fast.rs: pure, which fast paths to take
//!   room.rs       facts of the place it goes to (dest.)  ─┘
//! ```
//! Facts are gathered without changing anything; only `checks` and `fast` judge them.

pub(crate) mod checks;
pub(crate) mod container;
pub(crate) mod fast;
pub(crate) mod host;
pub(crate) mod memory;
pub(crate) mod room;
#[cfg(test)]
pub(crate) mod samples;
