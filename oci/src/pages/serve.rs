//! The stream of a container's memory at a socket, for whoever moves containers in a way of their own.
//!
//! ```text
//!   connect ─▶ 'r' ─▶ a round while it runs: everything ─▶ 'r' ─▶ what was written since ─▶ … ─▶ 'f' ─▶ the
//!   round in its freeze
//! ```
//! Each letter is answered by one round of the [stream](super::stream), which says itself where it ends.
//! A connection that breaks off within a round has failed. It is one connection: with its end all
//! tracking ends, and the process too, which is one of the shim's own program under the name [`NAME`].

use std::io::{self, BufWriter, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::copier::Copier;
use super::stream::Options;
use super::tracker::{Kind, Tracker};
use crate::cgroups;

/// Name under which the program is run; its arguments are the pid of init and the socket's path.
pub const NAME: &str = "ferry-pages";
/// Asks for a round while the container runs.
pub const ROUND: u8 = b'r';
/// Asks for the round in its freeze.
pub const FROZEN: u8 = b'f';

/// How long nobody may connect, milliseconds.
const PATIENCE: u16 = 60_000;

/// Serves one connection. Says so by a line on standard output once there can be one; ends when standard
/// input does.
///
/// # Errors
/// When the container's writes cannot be tracked, or the connection breaks.
pub fn serve() -> io::Result<()> {
    let mut args = std::env::args().skip(1);
    let init = args.next().and_then(|pid| pid.parse().ok());
    let (Some(init), Some(path)) = (init, args.next()) else {
        return Err(io::Error::other("the pid of init or the path of the socket is missing"));
    };
    let tracker = Tracker::attach(Kind::WriteProtect, move || cgroups::processes(init));
    let tracker = tracker.map_err(io::Error::other)?;
    let listener = UnixListener::bind(&path)?;
    println!("ready");
    let accepted = until_ready(&listener, PATIENCE.into()).and_then(|()| listener.accept());
    // For one only.
    let _ = std::fs::remove_file(&path);
    drop(listener);
    rounds(tracker, &accepted?.0)
}

fn rounds(tracker: Tracker, mut stream: &UnixStream) -> io::Result<()> {
    let mut copier = Copier::new(tracker, Options::default());
    let mut asked = [0];
    loop {
        until_ready(stream, PollTimeout::NONE)?;
        if stream.read(&mut asked)? == 0 {
            return Ok(());
        }
        let frozen = match asked[0] {
            ROUND => false,
            FROZEN => true,
            _ => return Err(io::Error::other("there are rounds of two kinds, r and f")),
        };
        copier.round(frozen, &mut BufWriter::new(stream)).map_err(io::Error::other)?;
    }
}

/// Waits until there is something at `fd`; fails when nothing comes, or standard input has ended.
fn until_ready(fd: &impl AsFd, patience: PollTimeout) -> io::Result<()> {
    let stdin = io::stdin();
    let mut fds =
        [PollFd::new(fd.as_fd(), PollFlags::POLLIN), PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let count = poll(&mut fds, patience)?;
    let ended = fds[1].any().unwrap_or_default();
    match count {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ if ended => Err(io::Error::other("the shim has ended")),
        _ => Ok(()),
    }
}
