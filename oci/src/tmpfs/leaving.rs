//! The source's side.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::{Tmpfs, archive, early_archive, find, late_archive, tree};

/// The file systems of a container that is to leave, packed.
#[derive(Debug)]
pub struct Leaving {
    images: PathBuf,
    taken: Vec<Taken>,
}

#[derive(Debug)]
struct Taken {
    carried: Tmpfs,
    /// A mount of it without those below, in no file tree.
    mount: OwnedFd,
    /// Of what was packed; none where it changed meanwhile.
    digest: Option<u128>,
}

impl Leaving {
    /// Packs what [`find`] finds into the folder `images`, while the container runs. What is too large
    /// is left out.
    ///
    /// # Errors
    /// When the container cannot be looked at, or the folder not be written.
    pub fn prepare(init: i32, all: &[i32], images: &Path) -> io::Result<Self> {
        let found = find(init, all)?;
        let mounts = clone(init, found.iter().map(|carried| carried.at.as_str()))?;
        let mut taken = Vec::new();
        for (mut carried, mount) in found.into_iter().zip(mounts) {
            let Some(mount) = mount else { continue };
            let packed = pack(&mount).inspect_err(|err| log::debug!("{}: {err}", carried.at));
            let Ok(Some((digest, bytes))) = packed else { continue };
            carried.checksum = archive::checksum(&bytes);
            fs::write(images.join(early_archive(taken.len())), bytes)?;
            taken.push(Taken { carried, mount, digest });
        }
        Ok(Self { images: images.to_owned(), taken })
    }

    /// What is carried.
    pub fn carried(&self) -> Vec<Tmpfs> {
        self.taken.iter().map(|taken| taken.carried.clone()).collect()
    }

    /// Packs again what has changed, when nothing can change any more. How many that were.
    ///
    /// # Errors
    /// When one has become too large, or cannot be packed: the dump must not be used.
    pub fn pack_changed(&mut self) -> io::Result<usize> {
        let mut changed = 0;
        for (number, taken) in self.taken.iter_mut().enumerate() {
            let at = &taken.carried.at;
            let now = tree::digest(&path(&taken.mount))?;
            let now =
                now.ok_or_else(|| io::Error::other(format!("{at} has grown in the last moment")))?;
            if taken.digest == Some(now) {
                continue;
            }
            let bytes = archive::pack(&path(&taken.mount))?;
            taken.carried.checksum = archive::checksum(&bytes);
            fs::write(self.images.join(late_archive(number)), bytes)?;
            changed += 1;
        }
        Ok(changed)
    }
}

/// A tree's archive, and its digest if both are of the same moment; `None` when it is too large.
fn pack(mount: &OwnedFd) -> io::Result<Option<(Option<u128>, Vec<u8>)>> {
    let root = path(mount);
    let Some(before) = tree::digest(&root)? else { return Ok(None) };
    let bytes = archive::pack(&root)?;
    let after = tree::digest(&root)?;
    Ok(Some((after.filter(|after| *after == before), bytes)))
}

fn path(mount: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}/", mount.as_raw_fd()).into()
}

/// Mounts of their own of what process `pid` has at the paths; `None` for one that cannot be had.
fn clone<'a>(
    pid: i32,
    paths: impl Iterator<Item = &'a str> + Send,
) -> io::Result<Vec<Option<OwnedFd>>> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    // On a thread of its own: one that has entered cannot be had back.
    let inside = || {
        unshare(CloneFlags::CLONE_FS)?;
        setns(&namespace, CloneFlags::CLONE_NEWNS)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        Ok(paths.map(|path| open_tree(rustix::fs::CWD, path, flags).ok()).collect())
    };
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("mounts".into()).spawn_scoped(scope, inside)?;
        thread.join().map_err(|_| io::Error::other("the thread in the mount namespace panicked"))?
    })
}
