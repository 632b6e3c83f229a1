//! The destination's side.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Tmpfs, archive, early_archive, is_known, late_archive};
use crate::paths;

/// The most that a record may list.
const MOST: usize = 64;

/// File systems that wait for a container. Dropping it takes their mounts here away: whoever has
/// mounted them elsewhere keeps them.
#[derive(Debug)]
pub struct Arriving {
    migration: String,
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    carried: Tmpfs,
    path: PathBuf,
    /// Checksum of the archive that was unpacked in it.
    holds: String,
}

impl Arriving {
    /// Makes what the record of `migration` lists, and unpacks what is there of it in `images`.
    ///
    /// # Errors
    /// When one cannot be made; nothing is left then.
    pub fn prepare(migration: &str, carried: &[Tmpfs], images: &Path) -> io::Result<Self> {
        let mut arriving = Self { migration: migration.to_owned(), places: Vec::new() };
        if carried.len() > MOST {
            return Err(io::Error::other("too many file systems"));
        }
        for (number, carried) in carried.iter().enumerate() {
            let path = paths::tmpfs(migration).join(number.to_string());
            let mut place = Place { carried: carried.clone(), path, holds: String::new() };
            // From here on it is taken away again.
            // Others on the host must not see what a container keeps there.
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&place.path)?;
            place.mount()?;
            place.fill(number, images)?;
            arriving.places.push(place);
        }
        Ok(arriving)
    }

    /// What CRIU is told of them: lines of its configuration.
    pub fn lines(&self) -> Vec<String> {
        let line = |place: &Place| {
            format!("external mnt[{}]:{}", place.carried.key(), place.path.display())
        };
        self.places.iter().map(line).collect()
    }

    /// Has each hold what it held when it was dumped, of which `carried` is the record. A dump that was
    /// tried again may have left out fewer.
    ///
    /// # Errors
    /// When one was left out that was not prepared, or the content of one is missing.
    pub fn complete(&mut self, carried: &[Tmpfs], images: &Path) -> io::Result<()> {
        for (number, carried) in carried.iter().enumerate() {
            let at = &carried.at;
            let is_it = |place: &&mut Place| {
                (&place.carried.at, &place.carried.options) == (at, &carried.options)
            };
            let place = self.places.iter_mut().find(is_it);
            let place = place.ok_or_else(|| io::Error::other(format!("{at} was not prepared")))?;
            place.carried.checksum.clone_from(&carried.checksum);
            if !place.fill(number, images)? {
                return Err(io::Error::other(format!("the content of {at} is missing")));
            }
        }
        Ok(())
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if let Err(err) = clear(&self.migration) {
            log::warn!("take away the mounts of {}: {err}", self.migration);
        }
    }
}

impl Place {
    fn mount(&self) -> io::Result<()> {
        let options = &self.carried.options;
        if !options.split(',').all(is_known) {
            return Err(io::Error::other(format!("unknown options of a tmpfs: {options:?}")));
        }
        // How it is used is said by the mount in the container.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let source = self.carried.source.as_str();
        mount(Some(source), &self.path, Some("tmpfs"), flags, Some(&*self.options()))?;
        Ok(())
    }

    /// Those that are no flags of mount(2).
    fn options(&self) -> String {
        let options = self.carried.options.split(',');
        options.filter(|option| !matches!(*option, "rw" | "ro")).collect::<Vec<_>>().join(",")
    }

    /// Unpacks the archive with this number, if it is there and not in it yet. False if it is missing.
    fn fill(&mut self, number: usize, images: &Path) -> io::Result<bool> {
        if self.holds == self.carried.checksum {
            return Ok(true);
        }
        for name in [late_archive(number), early_archive(number)] {
            let bytes = match fs::read(images.join(name)) {
                Ok(bytes) if archive::checksum(&bytes) == self.carried.checksum => bytes,
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                _ => continue,
            };
            if !self.holds.is_empty() {
                // Nobody has it yet: a new one is the surest way to have nothing of before in it.
                unmount(&self.path)?;
                self.mount()?;
            }
            archive::unpack(&bytes, &self.path)?;
            self.protect()?;
            self.holds.clone_from(&self.carried.checksum);
            return Ok(true);
        }
        Ok(false)
    }

    /// Takes back that it can be written to, if it could not before.
    fn protect(&self) -> io::Result<()> {
        if self.carried.options.split(',').any(|option| option == "ro") {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, &self.path, None::<&str>, flags, Some(&*self.options()))?;
        }
        Ok(())
    }
}

fn unmount(path: &Path) -> io::Result<()> {
    Ok(umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?)
}

/// Takes away the mounts made for `migration` here, whoever made them. What is in them is never
/// removed: a container may have them.
///
/// # Errors
/// When one cannot be taken away.
pub fn clear(migration: &str) -> io::Result<()> {
    let folder = paths::tmpfs(migration);
    let entries = match fs::read_dir(&folder) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        match unmount(&path) {
            // Nothing is mounted there, or somebody else is just doing this.
            Err(err) if matches!(err.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {}
            done => done?,
        }
        // Fails if something is in it.
        remove(&path)?;
    }
    remove(&folder)
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
