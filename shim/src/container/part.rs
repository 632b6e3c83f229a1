//! Processes of the shim's own program under another name: what waits for tracees must not be the process
//! that collects the container's exits.

use crate::error::{Context as _, Error, Result};
use crate::reaper::{Child, Reaper};
use ferry_oci::pages::tracker::Probe;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use tokio::net::unix::pipe;

/// One of them. It ends with its input.
pub(super) struct Part {
    pub(super) child: Child,
    pub(super) input: pipe::Sender,
    pub(super) output: pipe::Receiver,
}

impl Part {
    pub(super) fn start(reaper: &Arc<Reaper>, name: &str, args: &[String]) -> Result<Self> {
        let (stdin, input) = pipe_ends()?;
        let (output, stdout) = pipe_ends()?;
        // By the process, which is there even when the file has been replaced.
        let mut command = Command::new(format!("/proc/{}/exe", std::process::id()));
        command.arg0(name).args(args).stdin(stdin).stdout(stdout).stderr(Stdio::null());
        let child = reaper.spawn(command)?;
        let input = pipe::Sender::from_owned_fd(input).context("make a pipe")?;
        let output = pipe::Receiver::from_owned_fd(output).context("make a pipe")?;
        Ok(Self { child, input, output })
    }
}

fn pipe_ends() -> Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make a pipe")
}

/// Whether ferry can track writes on this kernel; else why not.
pub(super) fn tracks_writes(probe: &Probe) -> Result<()> {
    match probe.write_protect {
        true => Ok(()),
        false => Err(Error::failed_precondition(format!(
            "this kernel cannot tell which memory was written: use one with CONFIG_MEM_SOFT_DIRTY ({}), or \
             Linux 6.7 and newer ({})",
            probe.soft_dirty_why, probe.write_protect_why
        ))),
    }
}
