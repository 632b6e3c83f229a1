//! Restoring a container: at once, or held at CRIU's post-restore until somebody has decided.

use super::attempt::Attempt;
use super::checkpoint::utf8;
use super::network::Network;
use super::relay::{Line, Relay};
use super::{Container, read_pid};
use crate::error::{Context as _, Error, Result};
use crate::io::ProcessIo;
use crate::reaper::Child;
use crate::state::{Op, Status, admit};
use crate::strays;
use ferry_oci::criu::{CONFIG_ENV, Config, DumpRecord, Hold};
use ferry_oci::paths;
use ferry_oci::runc::Restore;
use log::warn;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

/// How long a restore asked for through the Task API may take.
const DEADLINE: Duration = Duration::from_secs(600);

/// What is added to runc's environment.
pub(super) type Env = Vec<(&'static str, PathBuf)>;

/// A restore.
pub(crate) struct RestoreParams {
    /// Folder with the images, runc's descriptors.json among them.
    pub(crate) images: PathBuf,
    /// Folder for CRIU's log and statistics, made if missing.
    pub(crate) work: PathBuf,
    /// Further lines for CRIU's configuration file.
    pub(crate) extra: Vec<String>,
    /// Leave memory to the page daemon that listens in `work`.
    pub(crate) lazy_pages: bool,
    /// After it, runc and CRIU are killed.
    pub(crate) deadline: Duration,
}

/// What a held restore does besides waiting.
#[derive(Default)]
pub(crate) struct HoldParams {
    /// Shell command run once the namespaces are there, with the pid of init in
    /// `$CRTOOLS_INIT_PID`; the restore fails if it fails.
    pub(crate) namespaces: Option<String>,
    /// File that the release makes before anything runs; see [`Hold::prepare`].
    pub(crate) decided: Option<PathBuf>,
}

/// What holds a restore.
pub(super) enum Holder {
    /// An action script, which makes the file of the decision itself.
    Script(Hold),
    /// The line between runc and CRIU, and the file of the decision.
    Line(Line, Option<PathBuf>),
}

/// A container that is restored and has not run. Decide by [`Held::release`] or [`Held::abort`];
/// dropping it aborts.
pub(crate) struct Held {
    container: Arc<Container>,
    pid: u32,
    undecided: Option<Undecided>,
}

struct Undecided {
    hold: Holder,
    attempt: Attempt,
    init: Child,
}

impl Container {
    /// Start of a task created from a checkpoint. A task whose restore fails is stopped, and can
    /// be deleted.
    pub(super) async fn restore_checkpoint(self: &Arc<Self>) -> Result<u32> {
        let images = self.checkpoint_path();
        let images = images.ok_or_else(|| Error::failed_precondition("no checkpoint"))?;
        let params = RestoreParams {
            images,
            work: self.work_dir(),
            extra: Vec::new(),
            lazy_pages: false,
            deadline: DEADLINE,
        };
        self.restore(params).await
    }

    /// Restores and lets run. Returns the pid of init.
    pub(crate) async fn restore(self: &Arc<Self>, params: RestoreParams) -> Result<u32> {
        let _op = self.op.write().await;
        admit(self.snapshot().status, Op::Restore)?;
        let deadline = params.deadline;
        let silent = self.stay_silent(&params.images).await?;
        let (_line, env) = self.watch(&params)?;
        let mut attempt = self.begin(&params, None, &env)?;
        let result = match attempt.runc.wait(deadline).await {
            Ok(()) => self.connect_terminal().await.and_then(|()| read_pid(&self.init_pid_file())),
            Err(err) => Err(attempt.failed(err)),
        };
        match result {
            Ok(pid) => {
                let pid = self.runs(attempt.window.adopt(pid));
                self.open_later(&params.images);
                if let Some(silent) = silent {
                    silent.speak().await;
                }
                Ok(pid)
            }
            // Its connections stay silent for another attempt.
            Err(err) => {
                self.never_ran(&mut attempt, None).await;
                Err(err)
            }
        }
    }

    /// A line to CRIU that gives the container its own cgroups, and brings up the loopback device of the
    /// network namespace that CRIU makes; and what runc's environment needs for it.
    fn watch(&self, params: &RestoreParams) -> Result<(Line, Env)> {
        let private = Network::of(&self.bundle)? == Network::Private;
        std::fs::create_dir_all(&params.work).context("make the work folder")?;
        let relay = Relay::listen(&params.images, &params.work)?;
        let env = relay.env(None);
        let line = relay.start(private, None);
        line.go();
        Ok((line, env))
    }

    /// Restores up to CRIU's post-restore and holds it there: memory, files and sockets are back,
    /// connections are locked, nothing has run.
    pub(crate) async fn restore_held(
        self: &Arc<Self>,
        params: RestoreParams,
        hold: HoldParams,
    ) -> Result<Held> {
        let _op = self.op.write().await;
        admit(self.snapshot().status, Op::Restore)?;
        self.refuse_terminal()?;
        std::fs::create_dir_all(&params.work).context("make the work folder")?;
        let mut hold =
            Hold::prepare(&params.work, hold.namespaces.as_deref(), hold.decided.as_deref())
                .context("prepare to hold the restore")?;
        let mut attempt = self.begin(&params, Some(hold.script()), &[])?;
        match until_held(&mut hold, &mut attempt, params.deadline).await {
            Ok(pid) => {
                let hold = Holder::Script(hold);
                Ok(self.held(pid, hold, attempt))
            }
            Err(err) => {
                // Its end lets a script that waits go.
                drop(hold);
                self.never_ran(&mut attempt, None).await;
                Err(err)
            }
        }
    }

    /// Nothing has run. Holds `op`.
    pub(super) fn held(self: &Arc<Self>, pid: i32, hold: Holder, attempt: Attempt) -> Held {
        let init = attempt.window.adopt(pid);
        {
            let mut inner = self.inner();
            inner.status = Status::Held;
            inner.pid = pid as u32;
        }
        let undecided = Some(Undecided { hold, attempt, init });
        Held { container: self.clone(), pid: pid as u32, undecided }
    }

    /// Starts runc, with `env` added to its environment. Nothing has changed if it fails.
    pub(super) fn begin(
        &self,
        params: &RestoreParams,
        script: Option<&Path>,
        env: &[(&'static str, PathBuf)],
    ) -> Result<Attempt> {
        if !params.images.join("descriptors.json").exists() {
            let text = format!("{} holds no descriptors.json", params.images.display());
            return Err(Error::failed_precondition(text));
        }
        std::fs::create_dir_all(&params.work).context("make the work folder")?;
        let record = DumpRecord::read(&params.images).context("read the images")?;
        let options = record.map(|record| record.options).unwrap_or_default();
        let config = Config {
            tcp_established: options.tcp_established,
            action_script: script.map(Path::to_owned),
            extra: params.extra.clone(),
            // CRIU takes the lock's kind from the images.
            ..Default::default()
        };
        let config = config.write(&params.work).context("write CRIU's configuration")?;
        let pid_file = self.init_pid_file();
        let console_socket = self.inner().io.as_ref().and_then(ProcessIo::console_socket);
        let verb = Restore {
            id: &self.id,
            bundle: utf8(&self.bundle)?,
            pid_file: utf8(&pid_file)?,
            console_socket: console_socket.as_deref(),
            image_path: utf8(&params.images)?,
            work_path: utf8(&params.work)?,
            no_pivot: self.options.no_pivot_root,
            lazy_pages: params.lazy_pages,
            tcp_established: options.tcp_established,
            ext_unix_sk: options.ext_unix_sk,
            shell_job: options.shell_job,
            file_locks: options.file_locks,
            empty_ns: &options.empty_ns,
            manage_cgroups: options.manage_cgroups.as_deref(),
        };
        let netns = self.netns_for_criu(options.in_netns)?;
        let stdio = self.inner().child_io.take();
        let stdio = stdio.ok_or_else(|| Error::failed_precondition("restored once already"))?;
        strays::claim_cgroups(&self.bundle)?;
        let window = self.runtime.reaper.window();
        let mut all = vec![(CONFIG_ENV, config)];
        all.extend_from_slice(env);
        let runc = self.runtime.start(&verb, stdio, &all, netns.as_ref())?;
        let log = params.work.join("restore.log");
        let logs = paths::logs(&self.namespace, &self.id);
        Ok(Attempt { runc, window, log, logs })
    }

    /// A terminal arrives with runc's return, and a held restore goes on before that.
    pub(super) fn refuse_terminal(&self) -> Result<()> {
        match self.stdio.terminal {
            true => Err(Error::unimplemented("a task with a terminal cannot be restored held")),
            false => Ok(()),
        }
    }

    /// Takes over the terminal of the restored init, if it has one.
    async fn connect_terminal(&self) -> Result<()> {
        let console = self.inner().io.as_mut().and_then(ProcessIo::take_console);
        let Some(console) = console else { return Ok(()) };
        let master = console.receive().await?;
        self.inner().io.as_mut().map_or(Ok(()), |io| io.connect(console, master))
    }

    /// The restored task runs: it is watched, and its start is published. Holds `op`.
    fn runs(self: &Arc<Self>, init: Child) -> u32 {
        strays::give_up_claim(&self.bundle);
        self.inner().pid = init.pid() as u32;
        let pid = self.started();
        let path = self.cgroups_path().unwrap_or_default();
        self.found_init(pid, path.as_deref());
        self.supervise(init);
        pid
    }

    /// Where the bundle's spec wants its cgroups.
    fn cgroups_path(&self) -> Result<Option<PathBuf>> {
        Ok(self.spec()?.linux().as_ref().and_then(|linux| linux.cgroups_path().clone()))
    }
}

/// Waits until the restore is held; fails when runc ends before, or after `deadline`.
async fn until_held(hold: &mut Hold, attempt: &mut Attempt, deadline: Duration) -> Result<i32> {
    let fifo = hold.held_fd().try_clone_to_owned().context("watch the hold")?;
    let mut fifo = pipe::Receiver::from_owned_fd(fifo).context("watch the hold")?;
    let held = async {
        let mut chunk = [0; 64];
        loop {
            let count = fifo.read(&mut chunk).await.context("watch the hold")?;
            if let Some(pid) = hold.heard(&chunk[..count]).context("restore")? {
                return Ok(pid);
            }
        }
    };
    let ended = attempt.runc.child.wait();
    let outcome = timeout(deadline, async {
        tokio::select! {
            biased;
            pid = held => Ok(pid),
            exit = ended => Err(exit),
        }
    });
    match outcome.await {
        Ok(Ok(pid)) => pid,
        Ok(Err(exit)) => Err(attempt.failed(attempt.runc.failure(exit.status))),
        Err(_) => {
            attempt.runc.child.kill_group();
            let err = Error::deadline_exceeded(format!("not held after {deadline:?}"));
            Err(attempt.failed(err))
        }
    }
}

impl Held {
    /// Pid of the restored init.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets the tasks run, waits for runc, and publishes the start. After `deadline` it answers
    /// DEADLINE_EXCEEDED; by then the tasks may run, so the release goes on behind and the task's
    /// state tells how it ended.
    pub(crate) async fn release(mut self, deadline: Duration) -> Result<u32> {
        let Some(undecided) = self.undecided.take() else {
            return Ok(self.pid);
        };
        let container = self.container.clone();
        let release = tokio::spawn(async move { release(container, undecided).await });
        match timeout(deadline, release).await {
            Ok(result) => result.context("release the restore")?,
            Err(_) => Err(Error::deadline_exceeded(format!(
                "released, but runc has not returned in {deadline:?}"
            ))),
        }
    }

    /// Ends the restore. Afterwards the task is stopped, its exit is published, and it can be
    /// deleted.
    pub(crate) async fn abort(mut self) {
        if let Some(undecided) = self.undecided.take() {
            let container = self.container.clone();
            // Not cancelled with the caller.
            let _ = tokio::spawn(async move { abort(container, undecided).await }).await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(undecided) = self.undecided.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            warn!("the held restore of {} was dropped: aborting it", self.container.id);
            runtime.spawn(abort(self.container.clone(), undecided));
        }
    }
}

async fn release(container: Arc<Container>, undecided: Undecided) -> Result<u32> {
    let Undecided { hold, mut attempt, init } = undecided;
    let _op = container.op.write().await;
    admit(container.snapshot().status, Op::Release)?;
    let result = match hold {
        Holder::Script(mut hold) => match hold.go().context("release the restore") {
            Ok(()) => returned(&mut attempt).await,
            Err(err) => Err(err),
        },
        Holder::Line(line, decided) => match decide(decided.as_deref()) {
            Ok(()) => {
                line.go();
                if line.resumed().await {
                    // They run: runc's return is nothing to wait for.
                    let pid = container.runs(init);
                    let id = container.id.clone();
                    tokio::spawn(async move {
                        if let Err(err) = returned(&mut attempt).await {
                            warn!("runc after the restore of {id}: {err}");
                        }
                        drop(line);
                    });
                    return Ok(pid);
                }
                // CRIU ends them itself, unless it was killed: runc would wait 10 s for that.
                let _ = container.runtime.reaper.signal(init.pid(), 9);
                let failed = Error::internal("CRIU has not let the tasks run");
                Err(returned(&mut attempt).await.err().unwrap_or(failed))
            }
            Err(err) => {
                line.refuse();
                Err(err)
            }
        },
    };
    match result {
        Ok(()) => Ok(container.runs(init)),
        Err(err) => {
            container.never_ran(&mut attempt, Some(&init)).await;
            Err(err)
        }
    }
}

/// Makes the file of the decision, and must be the one to make it.
fn decide(decided: Option<&Path>) -> Result<()> {
    let Some(path) = decided else { return Ok(()) };
    let made = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    made.map(drop).context("decide that the restore may run")
}

/// Waits for runc's return.
async fn returned(attempt: &mut Attempt) -> Result<()> {
    let exit = attempt.runc.child.wait().await;
    match exit.status {
        0 => Ok(()),
        status => Err(attempt.failed(attempt.runc.failure(status))),
    }
}

async fn abort(container: Arc<Container>, undecided: Undecided) {
    let Undecided { hold, mut attempt, init } = undecided;
    let _op = container.op.write().await;
    if let Err(err) = admit(container.snapshot().status, Op::Abort) {
        return warn!("abort the restore of {}: {err}", container.id);
    }
    match hold {
        Holder::Script(mut hold) => {
            if let Err(err) = hold.refuse() {
                warn!("refuse the restore: {err}");
            }
        }
        // Breaks the line too, once runc has ended.
        Holder::Line(line, _) => {
            line.refuse();
            container.never_ran(&mut attempt, Some(&init)).await;
            return;
        }
    }
    container.never_ran(&mut attempt, Some(&init)).await;
}
