//! Layers of an overlay with other owners.

use super::idmap;
use crate::error::{Context as _, Error, Result};
use ferry_oci::overlay::{LOWER, below, common};
use nix::mount::{MntFlags, umount2};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where layers are seen with other owners. An overlay that has been mounted keeps them.
#[derive(Debug)]
pub(super) struct Shifted(PathBuf);

impl Drop for Shifted {
    fn drop(&mut self) {
        let undone = umount2(&self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        if let Err(err) = undone.map_err(Into::into).and_then(|()| std::fs::remove_dir(&self.0)) {
            log::warn!("remove {}: {err}", self.0.display());
        }
    }
}

/// Has the layers in `options` seen through `at`, with owners shifted as in the user namespace
/// `users`.
pub(super) fn shift(options: &mut [String], users: &OwnedFd, at: &Path) -> Result<Shifted> {
    let list = options.iter_mut().find(|option| option.starts_with(LOWER));
    let list = list.ok_or_else(|| Error::invalid_argument("an overlay without layers"))?;
    let folder = common(list).ok_or_else(|| {
        Error::invalid_argument(format!("layers without a folder in common: {list:?}"))
    })?;
    std::fs::create_dir_all(at).context("make the folder of shifted layers")?;
    idmap::shift(&folder, at, users, true)?;
    let shifted = Shifted(at.to_owned());
    *list = below(list, &folder, &format!("{}/", at.display()));
    Ok(shifted)
}
