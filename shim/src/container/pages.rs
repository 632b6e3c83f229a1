//! The stream of a container's memory, at a socket of its own.

use super::Container;
use crate::error::{Context as _, Error, Result};
use crate::state::{Op, admit};
use ferry_oci::pages::serve;
use ferry_oci::paths;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

/// How long the process that serves it may take to be ready.
const STARTUP: Duration = Duration::from_secs(10);

impl Container {
    /// A socket at which the container's memory can be had, see [`serve`]. Who
    /// serves it ends with its one connection, or with this shim.
    pub(crate) async fn open_pages(&self) -> Result<PathBuf> {
        let _op = self.op.read().await;
        let snapshot = self.snapshot();
        admit(snapshot.status, Op::Checkpoint)?;
        if self.last_pre_dump().is_some() {
            let text = "its memory is tracked for pre-dumps: end them first (ferry predump --end)";
            return Err(Error::failed_precondition(text));
        }
        self.must_be_filled().await?;
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket =
            Path::new(paths::SOCKETS).join(format!("{}-pages-{count}.sock", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let (stdin, alive) = pipe_pair()?;
        let (ready, stdout) = pipe_pair()?;
        // By the process, which is there even when the file has been replaced.
        let mut command = Command::new(format!("/proc/{}/exe", std::process::id()));
        command.arg0(serve::NAME).arg(snapshot.pid.to_string()).arg(&socket);
        command.stdin(stdin).stdout(stdout).stderr(Stdio::null());
        let mut child = self.runtime.reaper.spawn(command)?;
        let mut ready = pipe::Receiver::from_owned_fd(ready).context("make a pipe")?;
        let mut line = [0; 6];
        match timeout(STARTUP, ready.read_exact(&mut line)).await {
            Ok(Ok(_)) => {}
            _ => {
                let text =
                    "the kernel cannot tell which memory was written: it takes Linux 6.7 or newer";
                return Err(Error::failed_precondition(text));
            }
        }
        let left = socket.clone();
        tokio::spawn(async move {
            child.wait().await;
            drop(alive);
            let _ = std::fs::remove_file(left);
        });
        Ok(socket)
    }
}

fn pipe_pair() -> Result<(std::os::fd::OwnedFd, std::os::fd::OwnedFd)> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make a pipe")
}
