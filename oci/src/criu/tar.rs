//! The fast tar.
//!
//! CRIU runs `tar` for every tmpfs of a container, at both ends of a move and inside the pause:
//! 3 to 4 ms each. `ferry-tar` does exactly CRIU's two calls and hands everything unusual to the
//! real tar. It comes first in the `PATH` of runc under the name `tar`.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The program's file name.
const PROGRAM: &str = "ferry-tar";
/// Environment variable that names the file in which each call leaves a line.
const COUNT_ENV: &str = "FERRY_TAR_COUNT";

/// How often `tar` was called.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TarCounts {
    /// Calls that the fast tar did itself.
    pub fast: u64,
    /// Calls that it handed to the real tar.
    pub real: u64,
}

/// A folder that holds the fast tar, for one run of runc.
#[derive(Debug)]
pub struct FastTar {
    folder: PathBuf,
}

impl FastTar {
    /// Finds the program where it is installed.
    pub fn find() -> Option<PathBuf> {
        super::places::find(PROGRAM)
    }

    /// Makes `folder` with a link `tar` to `program` in it. An earlier link and its counts go.
    ///
    /// # Errors
    /// When the folder or the link cannot be made.
    pub fn prepare(folder: &Path, program: &Path) -> io::Result<Self> {
        let fast = Self { folder: std::path::absolute(folder)? };
        std::fs::create_dir_all(&fast.folder)?;
        for old in [fast.link(), fast.counts_file()] {
            match std::fs::remove_file(old) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                _ => {}
            }
        }
        symlink(std::path::absolute(program)?, fast.link())?;
        Ok(fast)
    }

    /// What to set in runc's environment; CRIU gets it from there.
    ///
    /// # Errors
    /// When the folder cannot stand in a `PATH`.
    pub fn env(&self) -> io::Result<[(&'static str, OsString); 2]> {
        let path =
            std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        let folders = std::iter::once(self.folder.clone()).chain(std::env::split_paths(&path));
        let path = std::env::join_paths(folders).map_err(io::Error::other)?;
        Ok([("PATH", path), (COUNT_ENV, self.counts_file().into())])
    }

    /// How often it was called so far.
    ///
    /// # Errors
    /// When the file with the counts is there but cannot be read.
    pub fn counts(&self) -> io::Result<TarCounts> {
        let text = match std::fs::read_to_string(self.counts_file()) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let count = |word: &str| text.lines().filter(|line| *line == word).count() as u64;
        Ok(TarCounts { fast: count("fast"), real: count("real") })
    }

    fn link(&self) -> PathBuf {
        self.folder.join("tar")
    }

    fn counts_file(&self) -> PathBuf {
        self.folder.join("tar-calls")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_comes_first_in_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let fast = FastTar::prepare(&dir.path().join("bin"), Path::new("/opt/ferry-tar")).unwrap();
        let [path, _] = fast.env().unwrap();
        let first = std::env::split_paths(&path.1).next().unwrap();
        assert_eq!(first, dir.path().join("bin"));
        assert_eq!(std::fs::read_link(first.join("tar")).unwrap(), Path::new("/opt/ferry-tar"));
    }

    #[test]
    fn calls_are_counted_from_zero() {
        let dir = tempfile::tempdir().unwrap();
        let prepare = || FastTar::prepare(dir.path(), Path::new("/opt/ferry-tar")).unwrap();
        assert_eq!(prepare().counts().unwrap(), TarCounts::default());
        std::fs::write(dir.path().join("tar-calls"), "fast\nreal\nfast\nfas").unwrap();
        let fast = FastTar { folder: dir.path().to_owned() };
        assert_eq!(fast.counts().unwrap(), TarCounts { fast: 2, real: 1 });
        assert_eq!(prepare().counts().unwrap(), TarCounts::default());
    }

    #[test]
    fn a_folder_that_no_path_can_hold_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("a:b");
        assert!(FastTar::prepare(&place, Path::new("/opt/x")).unwrap().env().is_err());
    }
}
