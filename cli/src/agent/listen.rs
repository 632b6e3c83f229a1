//! `ferry agent --listen unix:///path`: an agent for every driver that connects.
//!
//! Each is a process of its own, the same that ssh would start: its input is its lease, and it ends
//! with its connection, whatever becomes of the others or of this one.

use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::transport::unix::{Address, Listener};

/// Before it is tried again when nobody could be let in.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves drivers until it is told to end. Those that are served then are served to their end.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) async fn listen(address: &Address, verbose: bool) -> Result<()> {
    let mut interrupted = signal(SignalKind::interrupt()).context("await signals")?;
    let mut terminated = signal(SignalKind::terminate()).context("await signals")?;
    let listener = Listener::bind(address)?;
    loop {
        let driver = tokio::select! {
            driver = listener.accept() => driver,
            _ = interrupted.recv() => return Ok(()),
            _ = terminated.recv() => return Ok(()),
        };
        let started = driver.context("let a driver in").and_then(|d| start(d, verbose));
        match started {
            Ok(agent) => {
                tokio::spawn(wait(agent));
            }
            Err(error) => {
                log::error!("{error:#}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Starts an agent with `driver` as its input and output.
fn start(driver: UnixStream, verbose: bool) -> Result<Child> {
    let driver = driver.into_std().context("hand a connection over")?;
    driver.set_nonblocking(false).context("hand a connection over")?;
    let input = OwnedFd::from(driver);
    let output = input.try_clone().context("hand a connection over")?;
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.args(["agent", "--stdio"]).args(verbose.then_some("--verbose"));
    command.stdin(Stdio::from(input)).stdout(Stdio::from(output));
    // An interrupt at the terminal ends the listener and no migration.
    command.process_group(0);
    command.spawn().context("start an agent")
}

async fn wait(mut agent: Child) {
    match agent.wait().await {
        Ok(status) if status.success() => {}
        Ok(status) => log::warn!("an agent ended with {status}"),
        Err(error) => log::warn!("wait for an agent: {error}"),
    }
}
