//! A dump or a restore that has started and waits: runc and CRIU are up while the container still
//! runs on its source.
//!
//! ```text
//!   prepare_dump ────── waits at its gate ── dump ───── held at post-dump ───── finish
//!   prepare_restore ─── waits at its gate ── restore ── held at post-restore ── release or abort
//!                           │                               │
//!                        dropped: fails, nothing has changed; or ends, tasks as they were
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_oci::criu::{
    CONFIG_ENV, Config, DUMP_GATE, FastTar, Gate, HIDE_ENV, RESTORE_GATE, TarCounts, Waiting,
};
use ferry_oci::runc::Checkpoint;
use ferry_oci::tmpfs::Tmpfs;
use log::warn;
use tokio::time::{sleep, timeout};

use super::attempt::Attempt;
use super::checkpoint::{self, CheckpointParams};
use super::relay::{Line, Relay};
use super::restore::{Env, Held, Holder, RestoreParams};
use super::{Container, Silent, silent};
use crate::error::{Context as _, Error, Result};
use crate::rules::Note;
use crate::runtime::Running;
use crate::state::{Op, admit};

/// How long runc and CRIU may take to come to a gate.
pub(super) const STARTUP: Duration = Duration::from_secs(20);
/// How often a gate is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// How long CRIU may take to end after a dump.
const END: Duration = Duration::from_secs(20);

/// A dump that waits, or is held at its end. Dropping it ends it, with the tasks as they were.
pub(crate) struct PreparedDump {
    container: Arc<Container>,
    params: CheckpointParams,
    runc: Running,
    line: Line,
    waiting: Option<Waiting>,
    tar: Option<FastTar>,
    _gate: Gate,
    held: bool,
    _note: Note,
}

/// What runc and CRIU are given besides.
#[derive(Debug, Default)]
pub(crate) struct Extras {
    /// Library that hides memory from the dump.
    pub(crate) preload: Option<PathBuf>,
    /// Its orders.
    pub(crate) hide: Option<PathBuf>,
    /// Program that takes the place of `tar`.
    pub(crate) tar: Option<PathBuf>,
    /// How much CRIU logs, if not all.
    pub(crate) log_level: Option<u8>,
    /// CRIU's code is read ahead.
    pub(crate) warm: bool,
}

impl Extras {
    /// Puts the fast tar into the folder that is first in runc's `PATH`.
    fn fast_tar(&self, relay: &Relay) -> Result<Option<(FastTar, Env)>> {
        let Some(program) = &self.tar else { return Ok(None) };
        let tar = FastTar::prepare(relay.folder(), program).context("prepare the fast tar")?;
        // The path has the folder in front already.
        let env = tar.env().context("prepare the fast tar")?;
        let env = env.into_iter().filter(|(name, _)| *name != "PATH");
        let env = env.map(|(name, value)| (name, value.into())).collect();
        Ok(Some((tar, env)))
    }
}

impl Container {
    /// Starts a dump up to its gate. The container runs on, and none of its memory [is missing].
    ///
    /// [is missing]: Self::must_be_filled
    pub(crate) async fn prepare_dump(
        self: &Arc<Self>,
        params: CheckpointParams,
        extras: &Extras,
    ) -> Result<PreparedDump> {
        admit(self.snapshot().status, Op::Checkpoint)?;
        for folder in [&params.images, &params.work] {
            std::fs::create_dir_all(folder)
                .context(format!("make the folder {}", folder.display()))?;
        }
        let note = Note::of_work(&self.bundle, &params.work)?;
        let relay = Relay::listen(&params.images, &params.work)?;
        let gate = Gate::make(&params.work.join(DUMP_GATE)).context("make the dump's gate")?;
        let on_top = self.prepare_on_top(&params).await?;
        let config = Config {
            tcp_established: params.options.tcp_established,
            network_lock: params.options.network_lock,
            action_script: None,
            extra: [params.extra.clone(), left_out(&params.options.tmpfs)].concat(),
        };
        let config = config.write(&params.work).context("write CRIU's configuration")?;
        let (preload, hide) = on_top.hiding.unzip();
        let (preload, hide) = (preload.or(extras.preload.clone()), hide.or(extras.hide.clone()));
        let mut all = relay.env(preload.as_deref());
        all.push((CONFIG_ENV, config));
        all.extend(hide.map(|folder| (HIDE_ENV, folder)));
        let tar = extras.fast_tar(&relay)?;
        all.extend(tar.iter().flat_map(|tar| tar.1.clone()));
        let line = relay.start(false, extras.log_level);
        let netns = self.netns_for_criu(params.options.in_netns)?;
        let verb = checkpoint::verb(&self.id, &params)?;
        let verb = Checkpoint { parent_path: on_top.parent.as_deref(), ..verb };
        let mut runc = self.runtime.begin(&verb, &all, netns.as_ref())?;
        let waiting = match until_waiting(&gate, &mut runc).await {
            Ok(waiting) => waiting,
            Err(err) => {
                drop((line, gate));
                let _ = runc.wait(END).await;
                self.remove_hiding();
                return Err(self.dump_failed(err, &params.work).await);
            }
        };
        if extras.warm {
            line.read_ahead();
        }
        self.write_record(&params, line.version().unwrap_or_default()).await?;
        let (container, waiting) = (self.clone(), Some(waiting));
        let tar = tar.map(|tar| tar.0);
        Ok(PreparedDump {
            container,
            params,
            runc,
            line,
            waiting,
            tar,
            _gate: gate,
            held: false,
            _note: note,
        })
    }
}

impl PreparedDump {
    /// Dumps. When it returns, every image is complete and CRIU is held; the tasks are as they
    /// were, and stay under CRIU until [`PreparedDump::finish`].
    pub(crate) async fn dump(&mut self) -> Result<()> {
        let _op = self.container.op.write().await;
        let waiting = self.waiting.take();
        let waiting = waiting.ok_or_else(|| Error::failed_precondition("dumped once already"))?;
        let opened = waiting.open_dump().context("let the dump go on");
        let outcome = match opened {
            Ok(()) => {
                let deadline = self.params.deadline;
                let (line, runc) = (&self.line, &mut self.runc);
                let ended = timeout(deadline, async {
                    tokio::select! {
                        biased;
                        held = line.held() => held.is_some(),
                        _ = runc.child.wait() => false,
                    }
                });
                match ended.await {
                    Ok(true) => {
                        self.held = true;
                        return Ok(());
                    }
                    Ok(false) => Err(match self.runc.wait(END).await {
                        Ok(()) => Error::internal("runc has ended before the dump"),
                        Err(err) => err,
                    }),
                    Err(_) => {
                        self.runc.child.kill_group();
                        Err(Error::deadline_exceeded(format!("no dump after {deadline:?}")))
                    }
                }
            }
            Err(err) => Err(err),
        };
        match outcome {
            Ok(()) => Ok(()),
            Err(err) => Err(self.container.dump_failed(err, &self.params.work).await),
        }
    }

    /// [`Self::dump`] for who keeps it: with connections silent if the container is to end, and on top of the
    /// pre-dumps that it was prepared for. What keeps them silent, and whether the images are still to be
    /// completed.
    pub(crate) async fn dump_to_keep(&mut self, exit: bool) -> Result<(Option<Silent>, bool)> {
        let container = self.container.clone();
        let mut silent = None;
        if exit {
            silent = container.fall_silent(&mut self.params.options).await?;
        }
        let dumped = self.dump_on_pre_dumps().await;
        if dumped.is_err() {
            silent::speak(silent.take()).await;
        }
        Ok((silent, dumped?))
    }

    async fn dump_on_pre_dumps(&mut self) -> Result<bool> {
        let container = self.container.clone();
        let images = self.params.images.clone();
        let chain = container.take_pre_dumps(self.params.parent.as_deref()).await?;
        let mut left = None;
        if let Some(mut chain) = chain
            && container.leave_out(&mut chain, &images).await
        {
            left = Some(chain);
        }
        self.dump().await?;
        if self.params.options.locked.is_some() {
            // What was written down before the freeze did not know of the lock.
            let criu = self.line.version().unwrap_or_default();
            container.write_record(&self.params, criu).await?;
        }
        let incomplete = left.is_some();
        if let Some(chain) = left {
            container.leave_incomplete(chain).await;
        }
        Ok(incomplete)
    }

    /// Writes the record anew, with what is left out as it is now.
    pub(crate) async fn amend(&mut self, carried: Vec<Tmpfs>) -> Result<()> {
        self.params.options.tmpfs = carried;
        let criu = self.line.version().unwrap_or_default();
        self.container.write_record(&self.params, criu).await
    }

    /// How often the dump has called the fast tar, and the real one.
    pub(crate) fn tar_counts(&self) -> TarCounts {
        self.tar.as_ref().and_then(|tar| tar.counts().ok()).unwrap_or_default()
    }

    /// Lets CRIU end, and waits for it and runc. The tasks are as they were before the dump, or
    /// before its gate if there was none; or are to `end` now.
    pub(crate) async fn finish(mut self, end: bool) {
        self.let_go();
        let start = Instant::now();
        if let Err(err) = self.runc.wait(END).await
            && self.held
        {
            warn!("runc after the dump, {:?}: {err}", start.elapsed());
            // CRIU frees the connections at its end, to which it has not come.
            self.container.free_connections(&self.params.work, end).await;
        }
        // CRIU's library has written its report there until now.
        self.container.remove_hiding();
        if self.held {
            self.container.checkpointed(&self.params.images);
        }
    }

    fn let_go(&mut self) {
        // Who waits at a gate that closes, fails; nothing has changed yet.
        self.waiting = None;
        self.line.go();
    }
}

/// Has CRIU leave these mounts to others.
fn left_out(carried: &[Tmpfs]) -> Vec<String> {
    let line = |carried: &Tmpfs| format!("external mnt[{}]:{}", carried.at, carried.key());
    carried.iter().map(line).collect()
}

/// A restore that waits. Dropping it fails it.
pub(crate) struct PreparedRestore {
    container: Arc<Container>,
    params: RestoreParams,
    attempt: Attempt,
    line: Line,
    waiting: Waiting,
    gate: Gate,
    decided: Option<PathBuf>,
}

impl Container {
    /// Starts a restore up to its gate. The folder has what runc reads before it starts CRIU:
    /// descriptors.json and the record of the dump. `decided` is the file that the release makes
    /// before anything runs; `private_network` says that CRIU makes a network namespace.
    pub(crate) async fn prepare_restore(
        self: &Arc<Self>,
        params: RestoreParams,
        decided: Option<PathBuf>,
        private_network: bool,
        extras: &Extras,
    ) -> Result<PreparedRestore> {
        let _op = self.op.write().await;
        admit(self.snapshot().status, Op::Restore)?;
        self.refuse_terminal()?;
        std::fs::create_dir_all(&params.work).context("make the work folder")?;
        let relay = Relay::listen(&params.images, &params.work)?;
        let gate = Gate::make(&params.images.join(RESTORE_GATE)).context("make the gate")?;
        let mut all = relay.env(None);
        all.extend(extras.fast_tar(&relay)?.into_iter().flat_map(|tar| tar.1));
        let line = relay.start(private_network, extras.log_level);
        let mut attempt = self.begin(&params, None, &all)?;
        match until_waiting(&gate, &mut attempt.runc).await {
            Ok(waiting) => {
                if extras.warm {
                    line.read_ahead();
                }
                let container = self.clone();
                Ok(PreparedRestore { container, params, attempt, line, waiting, gate, decided })
            }
            Err(err) => {
                drop((line, gate));
                let err = attempt.failed(err);
                self.never_ran(&mut attempt, None).await;
                Err(err)
            }
        }
    }
}

impl PreparedRestore {
    /// Restores with all images in place and `inventory` for the one it waits for, up to
    /// post-restore, and holds it there.
    pub(crate) async fn restore(self, inventory: &[u8]) -> Result<Held> {
        let Self { container, params, mut attempt, line, waiting, gate, decided } = self;
        let _op = container.op.write().await;
        let opened = waiting.open_restore(inventory).context("let the restore go on");
        let deadline = params.deadline;
        let outcome = match opened {
            Err(err) => Err(err),
            Ok(()) => {
                let runc = &mut attempt.runc;
                let held = timeout(deadline, async {
                    tokio::select! {
                        biased;
                        held = line.held() => held,
                        () = line.gone() => None,
                        _ = runc.child.wait() => None,
                    }
                });
                match held.await {
                    Ok(Some(pid)) if pid > 0 => Ok(pid),
                    Ok(_) => {
                        // CRIU has gone, and its tasks with it, unless it was killed.
                        container.kill_tasks();
                        Err(match attempt.runc.wait(END).await {
                            Ok(()) => Error::internal("runc has ended before the restore"),
                            Err(err) => attempt.failed(err),
                        })
                    }
                    Err(_) => {
                        attempt.runc.child.kill_group();
                        let err = Error::deadline_exceeded(format!("not held after {deadline:?}"));
                        Err(attempt.failed(err))
                    }
                }
            }
        };
        drop(gate);
        match outcome {
            Ok(pid) => Ok(container.held(pid, Holder::Line(line, decided), attempt)),
            Err(err) => {
                drop(line);
                container.never_ran(&mut attempt, None).await;
                Err(err)
            }
        }
    }

    /// Ends it: the task is stopped afterwards and can be deleted.
    pub(crate) async fn abandon(self) {
        let Self { container, mut attempt, line, waiting, .. } = self;
        let _op = container.op.write().await;
        drop(waiting);
        container.never_ran(&mut attempt, None).await;
        drop(line);
    }
}

/// Waits until CRIU has come to `gate`; fails when runc ends before.
pub(super) async fn until_waiting(gate: &Gate, runc: &mut Running) -> Result<Waiting> {
    let come = async {
        loop {
            match gate.try_open() {
                Ok(Some(waiting)) => return Ok(waiting),
                Ok(None) => sleep(LOOK).await,
                Err(err) => return Err(err).context("look at CRIU's gate"),
            }
        }
    };
    let outcome = timeout(STARTUP, async {
        tokio::select! {
            waiting = come => Ok(waiting),
            exit = runc.child.wait() => Err(exit),
        }
    });
    match outcome.await {
        Ok(Ok(waiting)) => waiting,
        Ok(Err(exit)) => Err(runc.failure(exit.status)),
        Err(_) => {
            runc.child.kill_group();
            Err(Error::deadline_exceeded(format!("CRIU has not come to its gate in {STARTUP:?}")))
        }
    }
}
