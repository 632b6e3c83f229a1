//! Holding a restore at CRIU's post-restore.
//!
//! ```text
//!   shim                         action script, called by CRIU
//!    │ <──── held ──── pid of init     at post-restore: memory, files and sockets are back,
//!    │                                 connections are still locked, nothing has run
//!    │ ───  decision ──> "go"          exit 0: the tasks run
//!    │                   else, EOF     exit 1: CRIU undoes the restore
//! ```
//! Both are FIFOs in the work directory. The holder keeps `decision` open for writing from the
//! start: when it dies, the script reads EOF and the restore fails instead of waiting forever.
//! CRIU 4.1.1 calls its scripts twice; the second call finds `released` and passes.

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a hold cannot be prepared or used.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// A file of the hold.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The script did not write a pid.
    #[error("the restore reported {0:?} instead of a pid")]
    Pid(String),
    /// The path cannot stand in a shell script or in CRIU's configuration.
    #[error("the work directory {0:?} has characters that are not allowed")]
    Path(PathBuf),
}

impl HoldError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// A prepared hold: the script and both ends of its FIFOs that belong to the holder.
#[derive(Debug)]
pub struct Hold {
    script: PathBuf,
    held: File,
    decision: File,
    buffer: Vec<u8>,
}

impl Hold {
    /// Writes script and FIFOs into `work`. `namespaces` is a shell command that the script runs
    /// at post-setup-namespaces, with the pid of init in `$CRTOOLS_INIT_PID`; it fails the restore
    /// if it fails.
    ///
    /// `decided` is a file that the script makes, and must be the one to make, before it lets the
    /// tasks run. Whoever else makes it first has decided that they never will.
    pub fn prepare(
        work: &Path,
        namespaces: Option<&str>,
        decided: Option<&Path>,
    ) -> Result<Self, HoldError> {
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+:@".contains(b);
        for path in [Some(work), decided].into_iter().flatten() {
            if !path.as_os_str().as_encoded_bytes().iter().all(plain) {
                return Err(HoldError::Path(path.to_owned()));
            }
        }
        for name in ["held", "decision"] {
            let path = work.join(name);
            remove(&path)?;
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
                .map_err(|err| HoldError::io("make a fifo of the hold")(err.into()))?;
        }
        remove(&work.join("released"))?;
        let script = work.join("hold.sh");
        std::fs::write(&script, text(work, std::process::id(), namespaces, decided))
            .map_err(HoldError::io("write the hold's script"))?;
        std::fs::set_permissions(&script, Permissions::from_mode(0o700))
            .map_err(HoldError::io("make the hold's script executable"))?;
        Ok(Self {
            script,
            held: open(&work.join("held"))?,
            decision: open(&work.join("decision"))?,
            buffer: Vec::new(),
        })
    }

    /// The script, for CRIU's `action-script`.
    pub fn script(&self) -> &Path {
        &self.script
    }

    /// The FIFO that the script writes to, for a caller that waits for it by other means than
    /// [`Hold::poll`] and passes on what it reads to [`Hold::heard`].
    pub fn held_fd(&self) -> BorrowedFd<'_> {
        self.held.as_fd()
    }

    /// The pid of init once the restore is held, `None` before. Never blocks.
    pub fn poll(&mut self) -> Result<Option<i32>, HoldError> {
        let mut chunk = [0; 64];
        match self.held.read(&mut chunk) {
            Ok(count) => self.heard(&chunk[..count]),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.heard(&[]),
            Err(err) => Err(HoldError::io("read the hold's fifo")(err)),
        }
    }

    /// Takes bytes read from [`Hold::held_fd`]; the pid once the line is complete.
    pub fn heard(&mut self, bytes: &[u8]) -> Result<Option<i32>, HoldError> {
        self.buffer.extend_from_slice(bytes);
        let Some(end) = self.buffer.iter().position(|b| *b == b'\n') else {
            return Ok(None);
        };
        let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        match line.trim().parse() {
            Ok(pid) if pid > 0 => Ok(Some(pid)),
            _ => Err(HoldError::Pid(line)),
        }
    }

    /// Lets the restored tasks run.
    pub fn go(&mut self) -> Result<(), HoldError> {
        self.decision.write_all(b"go\n").map_err(HoldError::io("release the hold"))
    }

    /// Fails the restore: the script reads something else than `go`. Dropping the hold does the
    /// same by EOF.
    pub fn refuse(&mut self) -> Result<(), HoldError> {
        self.decision.write_all(b"no\n").map_err(HoldError::io("refuse the hold"))
    }
}

fn remove(path: &Path) -> Result<(), HoldError> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            Err(HoldError::io("remove an old file of the hold")(err))
        }
        _ => Ok(()),
    }
}

/// Read and write, so that opening never waits and the other side always finds a partner.
fn open(path: &Path) -> Result<File, HoldError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(HoldError::io("open a fifo of the hold"))
}

fn text(work: &Path, holder: u32, namespaces: Option<&str>, decided: Option<&Path>) -> String {
    let work = work.display();
    // With noclobber, a redirection fails where the file exists.
    let decide = match decided {
        Some(path) => format!("(set -C; : >{}) || exit 1", path.display()),
        None => ":".to_owned(),
    };
    let namespaces = namespaces.unwrap_or(":");
    format!(
        r#"#!/bin/sh
# Written by ferry: holds a restore until its holder ({holder}) has decided.
cd {work} || exit 1
case "$CRTOOLS_SCRIPT_ACTION" in
post-setup-namespaces)
    {namespaces}
    ;;
post-restore)
    [ -e released ] && exit 0
    [ -d /proc/{holder} ] || exit 1
    echo "$CRTOOLS_INIT_PID" 1<>held
    read -r decision <decision || exit 1
    [ "$decision" = go ] || exit 1
    {decide}
    : >released
    ;;
esac
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    fn call(hold: &Hold, action: &str) -> Child {
        Command::new(hold.script())
            .env("CRTOOLS_SCRIPT_ACTION", action)
            .env("CRTOOLS_INIT_PID", "4711")
            .spawn()
            .unwrap()
    }

    fn wait_held(hold: &mut Hold) -> i32 {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(pid) = hold.poll().unwrap() {
                return pid;
            }
            assert!(Instant::now() < end, "the script did not report");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn go_lets_the_restore_pass_also_when_called_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut hold = Hold::prepare(dir.path(), None, None).unwrap();
        let mut script = call(&hold, "post-restore");
        assert_eq!(wait_held(&mut hold), 4711);
        assert!(script.try_wait().unwrap().is_none(), "the script must wait");
        hold.go().unwrap();
        assert!(script.wait().unwrap().success());
        assert!(call(&hold, "post-restore").wait().unwrap().success());
    }

    #[test]
    fn refusing_fails_the_restore() {
        let dir = tempfile::tempdir().unwrap();
        let mut hold = Hold::prepare(dir.path(), None, None).unwrap();
        let mut script = call(&hold, "post-restore");
        wait_held(&mut hold);
        hold.refuse().unwrap();
        assert!(!script.wait().unwrap().success());
    }

    #[test]
    fn a_holder_that_goes_away_fails_the_restore() {
        let dir = tempfile::tempdir().unwrap();
        let mut hold = Hold::prepare(dir.path(), None, None).unwrap();
        let mut script = call(&hold, "post-restore");
        wait_held(&mut hold);
        std::thread::sleep(Duration::from_millis(50));
        drop(hold);
        assert!(!script.wait().unwrap().success());
    }

    #[test]
    fn other_actions_pass_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let hold = Hold::prepare(dir.path(), None, None).unwrap();
        for action in ["pre-restore", "setup-namespaces", "post-setup-namespaces", "pre-resume"] {
            assert!(call(&hold, action).wait().unwrap().success(), "{action}");
        }
    }

    #[test]
    fn the_namespace_command_runs_and_can_fail_the_restore() {
        let dir = tempfile::tempdir().unwrap();
        let hold =
            Hold::prepare(dir.path(), Some("echo $CRTOOLS_INIT_PID >pid; exit 3"), None).unwrap();
        let status = call(&hold, "post-setup-namespaces").wait().unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(std::fs::read_to_string(dir.path().join("pid")).unwrap(), "4711\n");
    }

    #[test]
    fn paths_that_a_shell_would_read_differently_are_refused() {
        let err = Hold::prepare(Path::new("/tmp/a b"), None, None).unwrap_err();
        assert!(matches!(err, HoldError::Path(_)), "{err}");
    }
}
