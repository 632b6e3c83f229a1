//! The connection lock of a container in a network namespace that was given by path.
//!
//! Ours and not CRIU's, whether or not runc runs inside the namespace:
//! - CRIU would lock each connection by a call of libnftables, 10 ms and more within the pause, or
//!   from outside the whole namespace at about the same price. Ours is prepared before the freeze and
//!   takes effect within a millisecond.
//! - CRIU's stays behind in the namespace, which outlives the container, and would silence the next
//!   one there, or the same one when it comes back.
//!
//! A lock there must be, even where all connections are between the container's own frozen processes:
//! the kernel's timers run on. What they sent after the receiver was dumped and had acknowledged
//! before the sender was dumped would be in neither image.

use std::net::IpAddr;

use ferry_oci::quarantine::Prepared;

use crate::container::Container;
use crate::error::{Context as _, Error, Result};

/// Prepares the lock for all packets of the namespace; `None` when the container's is not given by
/// path. The namespace is the container's alone: preflight refuses a move when processes outside the
/// container are in it.
pub(super) fn lock(
    container: &Container,
    migration: &str,
    addresses: &[IpAddr],
) -> Result<Option<Prepared>> {
    let Some(netns) = container.given_netns()? else { return Ok(None) };
    if let Some(ip) = addresses.first() {
        let text = format!("{ip} is the host's, and the container is not on the host's network");
        return Err(Error::failed_precondition(text));
    }
    let lock = netns.run(|| Prepared::for_all(migration)).context("enter the network namespace")?;
    lock.context("lock its connections").map(Some)
}
