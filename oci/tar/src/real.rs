//! Handing a call to the real tar.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Environment variable that names the file in which each call leaves a line.
const COUNT_ENV: &str = "FERRY_TAR_COUNT";
/// Set for the real tar. A second ferry-tar that sees it must not hand on again, in a circle.
const HANDED_ENV: &str = "FERRY_TAR_HANDED_ON";
const NAME: &str = "tar";
const DEFAULT_PATH: &str = "/usr/bin:/bin";

/// Adds a line to the file with the counts, if there is one. That it fails is no reason to fail.
pub(crate) fn count(word: &str) {
    if let Some(path) = std::env::var_os(COUNT_ENV)
        && let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = file.write_all(format!("{word}\n").as_bytes());
    }
}

/// Becomes the real tar, with the same arguments, input and output. Returns only if that fails.
pub(crate) fn exec(arguments: &[OsString]) -> io::Error {
    if std::env::var_os(HANDED_ENV).is_some() {
        return io::Error::other("it is this program again");
    }
    match find() {
        Some(tar) => Command::new(tar).arg0(NAME).args(arguments).env(HANDED_ENV, "1").exec(),
        None => io::ErrorKind::NotFound.into(),
    }
}

/// The next `tar` in `PATH` that is not this program.
fn find() -> Option<PathBuf> {
    // As this program was called, not by /proc, which may be that of another pid namespace.
    let called = OsStr::from_bytes(rustix::param::linux_execfn().to_bytes());
    let own = fs::metadata(called).ok();
    let is_own = |meta: &Metadata| {
        own.as_ref().is_some_and(|own| (own.dev(), own.ino()) == (meta.dev(), meta.ino()))
    };
    let runs = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|meta| {
            meta.is_file() && meta.permissions().mode() & 0o111 != 0 && !is_own(&meta)
        })
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain(std::env::split_paths(OsStr::new(DEFAULT_PATH)));
    folders.map(|folder| folder.join(NAME)).find(runs)
}
