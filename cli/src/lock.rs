//! One process at a time for one purpose on this host.
//!
//! A driver that was killed leaves an agent behind that may still read a commit from its input.
//! Whoever asks what became of the migration must wait until that agent has ended. The lock is an
//! abstract socket: the kernel gives it up with the process that holds it, however that ends, and
//! no file stays behind.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a lock is tried that somebody else holds.
const POLL: Duration = Duration::from_millis(20);

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _socket: UnixListener,
}

/// Takes the lock called `name`, waiting at most `limit`.
///
/// # Errors
/// When somebody holds it longer than that.
pub(crate) async fn take(name: &str, limit: Duration) -> Result<Lock> {
    let name = format!("ferry/{name}");
    let address = SocketAddr::from_abstract_name(&name)
        .with_context(|| format!("{name} is too long for a lock"))?;
    let start = Instant::now();
    loop {
        match UnixListener::bind_addr(&address) {
            Ok(socket) => return Ok(Lock { _socket: socket }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).with_context(|| format!("take the lock {name}")),
        }
        if start.elapsed() >= limit {
            bail!("another ferry holds {name} (waited {} s)", limit.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Takes the lock of who changes `container`: moves it, checkpoints it or brings it back.
///
/// # Errors
/// When somebody else does.
pub(crate) async fn driver(namespace: &str, container: &str) -> Result<Lock> {
    take(&format!("driver-{namespace}-{container}"), Duration::ZERO)
        .await
        .with_context(|| format!("{container} is being moved, checkpointed or restored"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_is_held_by_one_and_free_when_it_is_dropped() {
        let name = format!("test-{}", std::process::id());
        let held = take(&name, Duration::ZERO).await.unwrap();
        let error = take(&name, Duration::from_millis(30)).await.unwrap_err().to_string();
        assert!(error.contains("another ferry holds"), "{error}");
        let waiting = tokio::spawn(async move { take(&name, Duration::from_secs(5)).await });
        drop(held);
        waiting.await.unwrap().unwrap();
    }
}
