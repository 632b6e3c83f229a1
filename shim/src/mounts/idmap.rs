//! Owners of files, shifted for a user namespace.

// A process that makes a user namespace, and a system call that no library has.
#![allow(unsafe_code)]

use crate::error::{Context as _, Error, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// A user namespace with these ids: lists of `inside:outside:count`, with commas between them.
pub(super) fn user_namespace(uids: &str, gids: &str) -> Result<OwnedFd> {
    let (uids, gids) = (id_map(uids)?, id_map(gids)?);
    let (mut ready, child_ready) = std::io::pipe().context("make a pipe")?;
    let (child_held, held) = std::io::pipe().context("make a pipe")?;
    // SAFETY: the child calls nothing but unshare, write, read and _exit, which need no lock that
    // another thread may hold.
    let child = match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => child,
        // SAFETY: as above; the addresses are those of a byte that lives until the end.
        ForkResult::Child => unsafe {
            let mut byte = 0u8;
            if libc::unshare(libc::CLONE_NEWUSER) == 0 {
                libc::close(held.as_raw_fd());
                libc::write(child_ready.as_raw_fd(), (&raw const byte).cast(), 1);
                libc::read(child_held.as_raw_fd(), (&raw mut byte).cast(), 1);
            }
            libc::_exit(0)
        },
    };
    drop((child_ready, child_held));
    let namespace = ready
        .read_exact(&mut [0])
        .context("make a user namespace")
        .and_then(|()| map(child, &uids, &gids));
    // The reaper waits for it.
    if let Err(err) = kill(child, Signal::SIGKILL) {
        log::debug!("end {child}: {err}");
    }
    drop(held);
    namespace
}

fn map(child: Pid, uids: &str, gids: &str) -> Result<OwnedFd> {
    let file = |name: &str| format!("/proc/{child}/{name}");
    std::fs::write(file("uid_map"), uids).context("write the map of users")?;
    std::fs::write(file("gid_map"), gids).context("write the map of groups")?;
    Ok(File::open(file("ns/user")).context("open a user namespace")?.into())
}

/// What `/proc/PID/uid_map` takes.
fn id_map(list: &str) -> Result<String> {
    let line = |range: &str| {
        let ids: Vec<u32> = range.split(':').map(|id| id.parse().ok()).collect::<Option<_>>()?;
        let [inside, outside, count] = ids[..] else { return None };
        Some(format!("{inside} {outside} {count}\n"))
    };
    let map: Option<String> = list.split(',').map(line).collect();
    map.ok_or_else(|| {
        Error::invalid_argument(format!("{list:?} is no list of inside:outside:count"))
    })
}

/// Mounts what is at `source` at `target`, with owners as the user namespace `users` says.
pub(super) fn shift(source: &Path, target: &Path, users: &OwnedFd, read_only: bool) -> Result<()> {
    let what = || format!("shift the owners in {}", source.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, source, flags).context(what())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 },
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: users.as_raw_fd().cast_unsigned().into(),
    };
    // SAFETY: mount_setattr(2) reads the empty path and a structure of the size it is told.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(done).context(what())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(&tree, "", CWD, target, flags).context(what())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_ranges() {
        assert_eq!(id_map("0:100000:65536,65536:5:1").unwrap(), "0 100000 65536\n65536 5 1\n");
        for wrong in ["", "0:1", "a:b:c", "0:1:2:3", "0:-1:2"] {
            assert!(id_map(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_namespace_has_the_ids() {
        if !nix::unistd::Uid::effective().is_root() {
            return;
        }
        let namespace = user_namespace("0:100000:10", "0:200000:10").unwrap();
        let path = std::fs::read_link(format!("/proc/self/fd/{}", namespace.as_raw_fd())).unwrap();
        assert!(path.to_string_lossy().starts_with("user:"), "{path:?}");
        assert!(user_namespace("0:1:0", "0:1:1").is_err());
    }
}
