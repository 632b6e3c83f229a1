//! Pipes for a process's streams.

use crate::error::{Context as _, Result};
use nix::fcntl::OFlag;
use std::os::fd::{AsFd, OwnedFd};

/// A pipe's reading and writing end. `owner` may reopen them through /proc.
pub(super) fn make((uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context("make a pipe")?;
    if (uid, gid) != (0, 0) {
        for end in [read.as_fd(), write.as_fd()] {
            std::os::unix::fs::fchown(end, Some(uid), Some(gid)).context("chown a pipe")?;
        }
    }
    Ok((read, write))
}
