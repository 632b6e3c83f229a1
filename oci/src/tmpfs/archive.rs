//! Packing and unpacking a tree, as the fast tar does. What that would leave to the real one is left to
//! CRIU.

use std::io;
use std::path::Path;
use std::thread;

use ferry_tar::Stop;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use twox_hash::XxHash3_128;

/// Makes an archive of the tree `folder`.
pub(super) fn pack(folder: &Path) -> io::Result<Vec<u8>> {
    ferry_tar::pack(folder.as_os_str()).map_err(failed)
}

/// Makes the tree of `archive` in `folder`, which is empty.
pub(super) fn unpack(archive: &[u8], folder: &Path) -> io::Result<()> {
    // Who makes files at the same time keeps his umask.
    let alone = || {
        unshare(CloneFlags::CLONE_FS)?;
        umask(Mode::empty());
        ferry_tar::unpack(archive, folder.as_os_str()).map_err(failed)
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("unpack".into()).spawn_scoped(scope, alone)?;
        thread.join().map_err(|_| io::Error::other("the thread that unpacks panicked"))?
    })
}

fn failed(stop: Stop) -> io::Error {
    match stop {
        Stop::Real => io::Error::other("something unusual is in it"),
        Stop::Failed(what, err) => io::Error::new(err.kind(), format!("{what}: {err}")),
    }
}

/// As it stands in [`super::Tmpfs`].
pub(super) fn checksum(archive: &[u8]) -> String {
    format!("{:032x}", XxHash3_128::oneshot(archive))
}
