//! Runs runc for one container.

use crate::error::{Context as _, Error, Result};
use crate::io::ChildStdio;
use crate::mounts;
use crate::reaper::{Child, Reaper};
use ferry_oci::netns::Netns;
use ferry_oci::runc::{Delete, Ps, Runc, Verb, last_error, tail};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::OnceCell;

/// How long an ordinary runc command may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// runc, bound to a bundle and the reaper.
#[derive(Clone)]
pub(crate) struct Runtime {
    pub(crate) runc: Runc,
    pub(crate) reaper: Arc<Reaper>,
    bundle: PathBuf,
    calls: Arc<AtomicU64>,
    version: Arc<OnceCell<String>>,
}

/// A runc command that is running.
pub(crate) struct Running {
    pub(crate) child: Child,
    name: &'static str,
    log: Log,
}

/// The log of one runc command; the file goes with it. One for each command, so that commands
/// that run at the same time do not read each other's errors.
struct Log(PathBuf);

impl Drop for Log {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Runtime {
    pub(crate) fn new(runc: Runc, reaper: Arc<Reaper>, bundle: &Path) -> Self {
        let calls = Arc::default();
        Self { runc, reaper, bundle: bundle.to_owned(), calls, version: Arc::default() }
    }

    fn command(&self, verb: &dyn Verb) -> (Command, Log) {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let log = Log(self.bundle.join(format!("log-{}-{call}.json", verb.name())));
        (self.runc.command(verb, &log.0), log)
    }

    /// A command that runs CRIU: with `env` added to its environment, and inside `netns` if given.
    fn criu_command(
        &self,
        verb: &dyn Verb,
        env: &[(&str, impl AsRef<Path>)],
        netns: Option<&Netns>,
    ) -> Result<(Command, Log)> {
        let (mut command, log) = self.command(verb);
        command.envs(env.iter().map(|(name, value)| (name, value.as_ref())));
        if let Some(netns) = netns {
            netns.enter(&mut command).context("run runc in the network namespace")?;
        }
        Ok((command, log))
    }

    /// Runs a command that prints something, or nothing.
    pub(crate) async fn call(&self, verb: &dyn Verb) -> Result<Vec<u8>> {
        let (command, log) = self.command(verb);
        let output = self.reaper.run(command, DEADLINE).await?;
        match output.status {
            0 => Ok(output.stdout),
            status => Err(failure(verb.name(), &log, status, &output.stderr)),
        }
    }

    /// Runs a command that reads `input`.
    pub(crate) async fn call_fed(&self, verb: &dyn Verb, input: &[u8]) -> Result<()> {
        let (command, log) = self.command(verb);
        let output = self.reaper.run_fed(command, in_memory(input)?.into(), DEADLINE).await?;
        match output.status {
            0 => Ok(()),
            status => Err(failure(verb.name(), &log, status, &output.stderr)),
        }
    }

    /// Starts a command that hands `stdio` to a container's process. `env` is added to runc's
    /// environment; it runs inside `netns` if given.
    pub(crate) fn start(
        &self,
        verb: &dyn Verb,
        stdio: ChildStdio,
        env: &[(&str, impl AsRef<Path>)],
        netns: Option<&Netns>,
    ) -> Result<Running> {
        let (mut command, log) = self.criu_command(verb, env, netns)?;
        stdio.attach(&mut command);
        let child = self.reaper.spawn(command)?;
        Ok(Running { child, name: verb.name(), log })
    }

    /// Starts a command that runs beside the container. `env` is added to runc's environment; it
    /// runs inside `netns` if given.
    pub(crate) fn begin(
        &self,
        verb: &dyn Verb,
        env: &[(&str, impl AsRef<Path>)],
        netns: Option<&Netns>,
    ) -> Result<Running> {
        let (mut command, log) = self.criu_command(verb, env, netns)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = self.reaper.spawn(command)?;
        Ok(Running { child, name: verb.name(), log })
    }

    /// [`Runtime::start`], and waits for runc to return. The container's process lives on.
    pub(crate) async fn spawn(&self, verb: &dyn Verb, stdio: ChildStdio) -> Result<()> {
        self.start(verb, stdio, &[] as &[(&str, &Path)], None)?.finish(DEADLINE).await
    }

    /// Runs a command with an environment, for at most `deadline`; inside `netns` if given.
    pub(crate) async fn call_with(
        &self,
        verb: &dyn Verb,
        env: &[(&str, &Path)],
        netns: Option<&Netns>,
        deadline: Duration,
    ) -> Result<()> {
        let (command, log) = self.criu_command(verb, env, netns)?;
        let output = self.reaper.run(command, deadline).await?;
        match output.status {
            0 => Ok(()),
            status => Err(failure(verb.name(), &log, status, &output.stderr)),
        }
    }

    /// Pids of all processes of the container, in the shim's pid namespace.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let list = self.call(&Ps { id }).await?;
        // runc prints null for a container without processes.
        let pids: Option<Vec<u32>> = serde_json::from_slice(&list).context("read runc's ps")?;
        Ok(pids.unwrap_or_default())
    }

    /// Removes runc's state of the container. It is no error if there is none: a dump without
    /// leave-running, and a failed restore, remove it themselves.
    pub(crate) async fn delete(&self, id: &str, force: bool) -> Result<()> {
        let state = self.runc.state_dir(id);
        if !state.exists() {
            return Ok(());
        }
        mounts::detach_criu_root(&state)?;
        match self.call(&Delete { id, force }).await {
            Err(_) if !state.exists() => Ok(()),
            result => result.map(drop),
        }
    }

    /// runc's version, as it prints it; empty if it cannot be asked.
    pub(crate) async fn version(&self) -> &str {
        self.version
            .get_or_init(|| async {
                let mut command = Command::new(&self.runc.binary);
                command.arg("--version");
                let output = self.reaper.run(command, DEADLINE).await;
                let text = output.map(|output| output.stdout).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let line = text.lines().next().unwrap_or_default();
                line.trim_start_matches("runc version").trim().to_string()
            })
            .await
    }
}

impl Running {
    /// Waits for runc, at most for `deadline`; then its process group is killed.
    pub(crate) async fn finish(mut self, deadline: Duration) -> Result<()> {
        self.wait(deadline).await
    }

    /// [`Running::finish`] without giving up ownership.
    pub(crate) async fn wait(&mut self, deadline: Duration) -> Result<()> {
        match tokio::time::timeout(deadline, self.child.wait()).await {
            Ok(exit) if exit.status == 0 => Ok(()),
            Ok(exit) => Err(self.failure(exit.status)),
            Err(_) => {
                self.child.kill_group();
                let text = format!("runc {} took longer than {deadline:?}", self.name);
                Err(Error::deadline_exceeded(text))
            }
        }
    }

    /// The error for runc having ended with `status`.
    pub(crate) fn failure(&self, status: u32) -> Error {
        failure(self.name, &self.log, status, b"")
    }
}

/// What the runtime said last: in its log, or else in what it printed. Clients look for these words,
/// which are those of containerd's own shim.
fn failure(verb: &str, log: &Log, status: u32, stderr: &[u8]) -> Error {
    let printed = || tail(&String::from_utf8_lossy(stderr));
    let said = last_error(&log.0).ok().flatten().or_else(printed);
    let text = said.unwrap_or_else(|| format!("exit status {status}"));
    Error::internal(format!("OCI runtime {verb} failed: {text}"))
}

/// A file that holds `bytes`, to be read from its beginning.
fn in_memory(bytes: &[u8]) -> Result<File> {
    let file = memfd_create("input", MemfdFlags::CLOEXEC).context("make a file in memory")?;
    let mut file = File::from(file);
    file.write_all(bytes).and_then(|()| file.rewind()).context("write a file in memory")?;
    Ok(file)
}
