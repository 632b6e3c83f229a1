//! A program named `criu` that puts its caller on the line between runc and CRIU.
//!
//! ```text
//!   runc ──"criu swrk 3"──> this program ──exec──> criu          (same process, so that CRIU's
//!     │                          │                   │             restored tasks stay children
//!     └── socket ──> relay <─────┘ hands over both ──┘             of runc)
//! ```
//! runc finds `criu` in its `PATH`. A folder with a link of that name to the shim's own program,
//! put first, makes runc start this instead. It makes a second socket pair, sends its caller's end
//! and one end of the new pair to the relay, and becomes CRIU with the other end. The relay
//! (the shim) passes messages on, sees each step, and can hold any of them.
#![allow(unsafe_code)] // `dup2` onto the descriptor that CRIU is told by number

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

/// Name under which the program is run.
pub const NAME: &str = "criu";

/// Environment of the wrapper: the relay's socket.
pub const ENV_RELAY: &str = "FERRY_CRIU_RELAY";
/// Environment of the wrapper: the real CRIU.
pub const ENV_CRIU: &str = "FERRY_CRIU";
/// Environment of the wrapper: what is to be preloaded into CRIU, if anything.
pub const ENV_PRELOAD: &str = "FERRY_CRIU_PRELOAD";

/// Environment of the wrapper: folder of the images.
pub const ENV_IMAGES: &str = "FERRY_CRIU_IMAGES";
/// Environment of the wrapper: folder of CRIU's log and statistics.
pub const ENV_WORK: &str = "FERRY_CRIU_WORK";

/// Where CRIU finds the folder of the images; see [`super::rpc::amend`].
pub const IMAGES_FD: u8 = 201;
/// Where CRIU finds its work folder.
pub const WORK_FD: u8 = 200;

/// The descriptor that runc hands to `criu swrk`.
const SWRK: RawFd = 3;

/// Becomes CRIU, after handing its line to the relay. Returns only if that fails.
pub fn run() -> io::Error {
    let Some(criu) = std::env::var_os(ENV_CRIU) else {
        return io::Error::other(format!("{ENV_CRIU} is not set"));
    };
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|verb| verb == "swrk")
        && let Some(relay) = std::env::var_os(ENV_RELAY)
        && let Err(error) = hand_over(Path::new(&relay))
    {
        return error;
    }
    let mut command = Command::new(criu);
    command.arg0(NAME).args(args);
    if let Some(preload) = std::env::var_os(ENV_PRELOAD) {
        command.env("LD_PRELOAD", preload);
    }
    for name in [ENV_RELAY, ENV_CRIU, ENV_PRELOAD, ENV_IMAGES, ENV_WORK] {
        command.env_remove(name);
    }
    command.exec()
}

fn hand_over(relay: &Path) -> io::Result<()> {
    let kind = (AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = socketpair(kind.0, kind.1, None, kind.2)?;
    for (name, fd) in [(ENV_IMAGES, IMAGES_FD), (ENV_WORK, WORK_FD)] {
        if let Some(folder) = std::env::var_os(name) {
            place(File::open(folder)?.into(), fd.into())?;
        }
    }
    let socket = UnixStream::connect(relay)?;
    let both = [SWRK, ours.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&both)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"c")], &rights, MsgFlags::empty(), None)?;
    place(theirs, SWRK)
}

/// Puts `fd` where CRIU looks for it. Unlike the original, it survives the exec.
fn place(fd: OwnedFd, at: RawFd) -> io::Result<()> {
    if fd.as_raw_fd() == at {
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let _ = fd.into_raw_fd();
        return Ok(());
    }
    // SAFETY: both are numbers of this process; what may have been at `at` is runc's socket, which
    // the relay has by now and nothing here owns.
    match unsafe { libc::dup2(fd.as_raw_fd(), at) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The real CRIU: the first in `path` that is not in the folder `own`.
pub fn find(path: &OsStr, own: &Path) -> Option<PathBuf> {
    std::env::split_paths(path).filter(|folder| folder != own).find_map(|folder| {
        let criu = folder.join(NAME);
        criu.is_file().then_some(criu)
    })
}

/// Makes a folder for the front of runc's `PATH`, with `criu` in it: the program `program`.
///
/// # Errors
/// When it cannot be written.
pub fn prepare(folder: &Path, program: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let link = folder.join(NAME);
    match std::fs::remove_file(&link) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    std::os::unix::fs::symlink(program, link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_criu_is_the_one_behind_ours() {
        let dir = tempfile::tempdir().unwrap();
        let (own, real) = (dir.path().join("own"), dir.path().join("real"));
        std::fs::create_dir_all(&real).unwrap();
        prepare(&own, Path::new("/bin/true")).unwrap();
        // Twice: an earlier one may have left it.
        prepare(&own, Path::new("/bin/true")).unwrap();
        let path = std::env::join_paths([&own, &real]).unwrap();
        assert_eq!(find(&path, &own), None);
        std::fs::write(real.join(NAME), "").unwrap();
        assert_eq!(find(&path, &own), Some(real.join(NAME)));
    }
}
