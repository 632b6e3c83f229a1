//! Gives a throttled container its CPU time back whatever ends the driver.
//!
//! ```text
//!   driver ───── pipe ────▶ guard (session and cgroups of its own)
//!     │ writes the quota      │ end of file: undoes what is written down, and ends
//! ```
//! The kernel closes the pipe when the driver ends, also by SIGKILL.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_oci::{cgroups, cpu_quota};
use nix::sys::signal::{SigSet, Signal};

/// What a guard says when it can be relied on.
const READY: &str = "ready";
/// How long a driver waits for its guard to end.
const END: Duration = Duration::from_secs(1);
/// How often, and how long apart, a guard tries to undo a quota.
const TRIES: u32 = 20;
const BETWEEN: Duration = Duration::from_millis(50);

/// A guard over one container's quota. Dropped, it looks once whether there is anything to undo.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts a guard that undoes what is written down in `folder`, and waits until it can be
    /// relied on. It lives in the cgroups of the process that is the parent of `init`: the end of
    /// the driver's session must not reach it, and the limit neither.
    ///
    /// # Errors
    /// When it cannot be started. Nothing may be limited then.
    pub(super) async fn start(folder: &Path, init: u32) -> Result<Self> {
        // A program that has been replaced since is still there by its process.
        let program = std::env::current_exe().ok().filter(|path| path.exists());
        let mut command = Command::new(program.unwrap_or_else(|| "/proc/self/exe".into()));
        command.arg("quota-guard").arg("--folder").arg(folder);
        command.arg("--init").arg(init.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        tokio::task::spawn_blocking(move || Self::begin(command)).await?
    }

    fn begin(mut command: Command) -> Result<Self> {
        let mut child = command.spawn().context("start the guard of the cpu quota")?;
        let pipe = child.stdin.take();
        let output = child.stdout.take().context("the guard has no output")?;
        let guard = Self { child, pipe };
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).context("hear the guard of the cpu quota")?;
        ensure!(line.trim_end() == READY, "the guard of the cpu quota has ended");
        Ok(guard)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < END {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A guard's whole life. To be called by a process of its own and of one thread.
///
/// # Errors
/// When its standard streams fail at the start, or the quota cannot be put back.
pub(crate) fn guard_main(folder: &Path, init: u32) -> Result<()> {
    // Neither a terminal nor who ends the driver with everything named like it ends this.
    let _ = nix::unistd::setsid();
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGPIPE] {
        signals.add(signal);
    }
    signals.thread_block().context("block signals")?;
    let _ = std::env::set_current_dir("/");
    if let Some(shim) = cgroups::parent(init)
        && let Err(error) = cgroups::join(std::process::id(), shim)
    {
        log::debug!("the guard of the cpu quota stays in its cgroup: {error}");
    }
    {
        let mut output = std::io::stdout().lock();
        writeln!(output, "{READY}").and_then(|()| output.flush()).context("say ready")?;
    }
    // Nothing is ever written to it.
    let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
    let mut undone = cpu_quota::undo(folder);
    for _ in 1..TRIES {
        if undone.is_ok() {
            break;
        }
        std::thread::sleep(BETWEEN);
        undone = cpu_quota::undo(folder);
    }
    undone.context("give the container its CPU time back")?;
    // Empty now; another driver's it is not.
    let _ = std::fs::remove_dir(folder);
    Ok(())
}
