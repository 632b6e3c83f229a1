//! The root file system of a bundle.

use crate::error::{Context as _, Error, Result};
use containerd_shim::mount::{mount_rootfs, umount_recursive};
use containerd_shim::protos::api::Mount;
use nix::mount::{MntFlags, umount2};
use std::path::{Component, Path, PathBuf};

/// Mounts `mounts` at `rootfs`, one over the other. Undone if one of them fails.
pub(crate) async fn mount(mounts: Vec<Mount>, rootfs: PathBuf) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    // A thread of its own: for long option lists the crate changes the thread's directory.
    blocking(move || {
        match std::fs::create_dir(&rootfs) {
            Err(err) if err.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(err).context("make the rootfs folder");
            }
            _ => {}
        }
        mounts.iter().try_for_each(|mount| one(mount, &rootfs)).inspect_err(|_| {
            if let Err(err) = umount(&rootfs) {
                log::warn!("undo the root file system: {err}");
            }
        })
    })
    .await
}

fn one(mount: &Mount, rootfs: &Path) -> Result<()> {
    let target = target(rootfs, &mount.target)?;
    let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
    let source = Some(mount.source.as_str()).filter(|source| !source.is_empty());
    mount_rootfs(kind, source, &mount.options, &target).context("mount the root file system")
}

/// `target` below `rootfs`; containerd sets it for file systems made of several mounts.
fn target(rootfs: &Path, target: &str) -> Result<PathBuf> {
    let relative = Path::new(target.trim_start_matches('/'));
    if relative.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(Error::invalid_argument(format!("mount target {target:?} leaves the rootfs")));
    }
    Ok(rootfs.join(relative))
}

/// Unmounts everything at and below `rootfs`. Nothing mounted is no error.
pub(crate) fn umount(rootfs: &Path) -> Result<()> {
    let Some(rootfs) = rootfs.to_str() else {
        return Err(Error::invalid_argument("the bundle's path is not UTF-8"));
    };
    umount_recursive(Some(rootfs), 0).context("unmount the root file system")
}

/// [`umount`] off the runtime's threads.
pub(crate) async fn umount_async(rootfs: PathBuf) -> Result<()> {
    blocking(move || umount(&rootfs)).await
}

/// Detaches the mount that a killed restore leaves in runc's state folder. Removing the folder
/// with the mount in place would delete the container's files.
pub(crate) fn detach_criu_root(state_dir: &Path) -> Result<()> {
    let root = state_dir.join("criu-root");
    loop {
        match umount2(&root, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(err) => return Err(err).context("detach criu-root"),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("mount".into())
        .spawn(move || drop(sender.send(work())))
        .context("start a thread")?;
    receiver.await.context("wait for a thread")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_below_the_rootfs() {
        let rootfs = Path::new("/b/rootfs");
        assert_eq!(target(rootfs, "").unwrap(), Path::new("/b/rootfs/"));
        assert_eq!(target(rootfs, "/data").unwrap(), Path::new("/b/rootfs/data"));
        assert!(target(rootfs, "../x").is_err());
    }
}
