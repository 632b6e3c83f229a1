//! A container that leaves: frozen, dumped, and either given back or ended.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_shim::protos::shim::oci::CheckpointOptions;
use ferry_oci::api::ferry::{
    CheckpointResponse, DumpResponse, FreezeRequest, FreezeResponse, Keep, Phase,
    PrepareDumpRequest, PrepareDumpResponse,
};
use ferry_oci::criu::rpc::QUIET;
use ferry_oci::criu::{DumpOptions, FastTar, Hiding, NetworkLock, RECORD_FILE, find_library};
use ferry_oci::fast::{self, Fast};
use ferry_oci::freezer::Freezer;
use ferry_oci::quarantine::Prepared;
use ferry_oci::record::Record;
use ferry_oci::tmpfs::{self, Leaving, Tmpfs};
use ferry_oci::{announce, paths};
use log::warn;

use super::lease::Lease;
use super::moves::{Move, Side};
use super::netns;
use super::ready::Ready;
use crate::container::{CheckpointParams, Container, Extras, PreparedDump, Reservation, Silent};
use crate::error::{Context as _, Error, Result};
use crate::state::Status;

/// How long the freezer may take. It took 0.1 to 4 ms wherever it was measured.
const FREEZER: Duration = Duration::from_secs(5);
/// How long killed tasks may take to end.
const EXIT: Duration = Duration::from_secs(30);
/// How long CRIU may take to stop the tasks, seconds. They stand still already; its own default of
/// 10 s is only paid when it fails, and the clients pay it.
const SEIZE_S: u32 = 3;
/// What a restore reads before it opens its first image.
const EARLY_FILES: [&str; 2] = ["descriptors.json", RECORD_FILE];
/// The longest freeze that a driver may ask for.
const MAX_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What is held of a container on its source.
pub(super) struct AtSource {
    pub(super) lease: Lease,
    migration: String,
    container: Arc<Container>,
    freezer: Freezer,
    frozen: bool,
    /// What keeps the addresses silent.
    lock: Option<Prepared>,
    /// It is in a network namespace that was given by path, where `lock` is.
    given_netns: bool,
    /// What is announced again on a rollback, and where: the clients have been led away.
    announce: Option<(IpAddr, String)>,
    fast: Vec<Fast>,
    ready: Ready,
    /// A dump that waits, or is held at its end.
    dump: Option<PreparedDump>,
    /// It is one to keep; whether the container ends with it.
    keeps: Option<bool>,
    /// What that dump leaves out.
    tmpfs: Option<Leaving>,
    /// Connections of a checkpoint that is to end the container.
    silent: Option<Silent>,
    /// Written down: the destination shall run it.
    committed: bool,
    /// Keeps the Task API out; gone when the tasks have ended.
    reservation: Option<Reservation>,
    deadline: Instant,
}

impl AtSource {
    /// Whether a lost driver, or the limit, still rolls back.
    pub(super) fn undecided(&self) -> bool {
        !self.committed
    }

    fn images(&self) -> PathBuf {
        paths::images(&self.migration)
    }

    fn takes(&self, path: Fast) -> bool {
        self.fast.contains(&path)
    }

    /// Ours keeps the whole address silent, or the whole namespace where one was given. A private
    /// network has only loopback, which CRIU locks in there.
    fn network_lock(&self) -> NetworkLock {
        match self.announce {
            _ if self.given_netns => NetworkLock::Skip,
            Some(_) if self.takes(Fast::Lock) => NetworkLock::Skip,
            _ => NetworkLock::Nftables,
        }
    }

    fn carried(&self) -> Vec<Tmpfs> {
        self.tmpfs.iter().flat_map(Leaving::carried).collect()
    }

    fn work(&self) -> PathBuf {
        self.container.bundle().join("ferry-dump")
    }

    /// Removes the lock. Not in the pause: it takes 10 ms and more.
    async fn remove_lock(&mut self) -> Result<()> {
        let Some(lock) = self.lock.take() else { return Ok(()) };
        let removed = tokio::task::spawn_blocking(move || lock.remove());
        removed.await.context("unlock")?.context("unlock")
    }

    /// Lets a dump end that was prepared, with the tasks as they were, or about to `end`.
    async fn end_dump(&mut self, end: bool) {
        if let Some(dump) = self.dump.take() {
            dump.finish(end).await;
        }
        self.tmpfs = None;
        let _ = std::fs::remove_dir_all(self.work());
        let _ = std::fs::remove_dir_all(paths::hide(&self.migration));
    }
}

impl Move {
    /// Starts a dump that waits; the container runs on.
    pub(super) async fn prepare_dump(
        self: &Arc<Self>,
        side: &mut Side,
        container: Arc<Container>,
        request: &PrepareDumpRequest,
        lease: Lease,
    ) -> Result<PrepareDumpResponse> {
        let fast = fast::parse(&request.fast);
        let away = Away { addresses: &request.lock_addresses, device: &request.device };
        let mut source =
            self.begin(container, &request.migration, lease, request.limit_s, fast, &away).await?;
        source.keeps = request.keep.as_ref().map(|keep| keep.exit);
        let params = match request.keep.as_ref() {
            Some(keep) => keep_params(&source, keep),
            None => {
                source.tmpfs = pack_tmpfs(&source).await;
                Ok(dump_params(&source))
            }
        };
        let images = source.images();
        let prepared = match params.and_then(|params| Ok((params, extras(request, &source.fast)?)))
        {
            Ok((params, extras)) => source.container.prepare_dump(params, &extras).await,
            Err(error) => Err(error),
        };
        match prepared {
            Ok(dump) => source.dump = Some(dump),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&images);
                source.end_dump(false).await;
                if let Err(error) = source.remove_lock().await {
                    warn!("{error}");
                }
                remove_note(&source.container);
                return Err(error);
            }
        }
        let archives = source.carried().len();
        let names = EARLY_FILES.into_iter().map(str::to_owned);
        let names = names.chain((0..archives).map(tmpfs::early_archive));
        let early_files = names.filter(|name| images.join(name).is_file()).collect();
        let (alive, limit) = (source.lease.is_alive(), limit_of(request.limit_s));
        *side = Side::Source(Box::new(source));
        self.enter(Phase::PHASE_PREPARED, &request.migration);
        self.limit(limit);
        if !alive {
            self.thaw(side).await?;
            return Err(Error::failed_precondition("the caller was lost"));
        }
        Ok(PrepareDumpResponse {
            images_path: images.display().to_string(),
            early_files,
            ..Default::default()
        })
    }

    /// Everything that is wanted of this side before the freeze, but for the dump.
    async fn begin(
        &self,
        container: Arc<Container>,
        migration: &str,
        lease: Lease,
        limit_s: u32,
        fast: Vec<Fast>,
        away: &Away<'_>,
    ) -> Result<AtSource> {
        must_run(&container)?;
        container.must_be_filled().await?;
        // Asked once and kept: not between freeze and resume.
        container.runtime().version().await;
        let addresses = addresses(away.addresses)?;
        let announce = addresses.first().map(|ip| (*ip, away.device.to_owned()));
        let freezer = Freezer::of(container.snapshot().pid).context("find the freezer")?;
        leave_note(&container, migration)?;
        let lock = netns::lock(&container, migration, &addresses);
        let mut lock = lock.inspect_err(|_| remove_note(&container))?;
        let given_netns = lock.is_some();
        if lock.is_none() && fast.contains(&Fast::Lock) {
            let prepared = prepare_lock(migration, &addresses).await;
            lock = prepared.inspect_err(|_| remove_note(&container))?;
        }
        Ok(AtSource {
            lease,
            migration: migration.to_owned(),
            container,
            freezer,
            frozen: false,
            given_netns,
            lock,
            announce,
            ready: Ready::prepare(&fast).await,
            fast,
            dump: None,
            keeps: None,
            tmpfs: None,
            silent: None,
            committed: false,
            reservation: None,
            deadline: Instant::now() + limit_of(limit_s),
        })
    }

    /// Freezes, then locks the connections. If it fails, nothing is left of the migration here.
    pub(super) async fn freeze(
        self: &Arc<Self>,
        side: &mut Side,
        container: Arc<Container>,
        request: &FreezeRequest,
        lease: Lease,
    ) -> Result<FreezeResponse> {
        if !matches!(side, Side::Source(_)) {
            let fast = fast::parse(&request.fast);
            if fast.contains(&Fast::HeldDump) {
                let text = "the dump that was prepared has ended: its limit is over";
                return Err(Error::failed_precondition(text));
            }
            let away = Away { addresses: &request.lock_addresses, device: &request.device };
            let source = self
                .begin(container, &request.migration, lease, request.limit_s, fast, &away)
                .await?;
            *side = Side::Source(Box::new(source));
        }
        let addresses = addresses(&request.lock_addresses)?;
        let frozen = freeze_and_lock(at_source(side)?, &addresses).await;
        let limit = limit_of(request.limit_s);
        match frozen {
            Ok(response) => {
                let source = at_source(side)?;
                source.deadline = Instant::now() + limit;
                let alive = source.lease.is_alive();
                self.enter(Phase::PHASE_FROZEN, &request.migration);
                self.limit(limit);
                if !alive {
                    self.thaw(side).await?;
                    return Err(Error::failed_precondition("the caller was lost"));
                }
                Ok(response)
            }
            Err(error) => {
                if let Err(error) = self.thaw(side).await {
                    warn!("after a failed freeze: {error}");
                }
                Err(error)
            }
        }
    }

    /// Thaws by itself when the limit passes without a commit.
    fn limit(self: &Arc<Self>, limit: Duration) {
        let a_move = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(limit).await;
            let mut side = a_move.side.lock().await;
            if let Side::Source(source) = &*side
                && source.undecided()
                && source.deadline <= Instant::now()
            {
                warn!("frozen for {limit:?} without a commit: thawing");
                if let Err(error) = a_move.thaw(&mut side).await {
                    warn!("thaw: {error}");
                }
            }
        });
    }

    /// Dumps; the container stays frozen, whatever the outcome.
    pub(super) async fn dump(&self, side: &mut Side) -> Result<DumpResponse> {
        let source = at_source(side)?;
        if source.keeps.is_some() {
            return Err(Error::failed_precondition(
                "a dump to keep was prepared: ask for Checkpoint",
            ));
        }
        let start = Instant::now();
        let images = source.images();
        let tmpfs = source.carried().len() as u64;
        let mut tmpfs_again = 0;
        match &mut source.dump {
            Some(dump) => {
                let (dumped, packed) = tokio::join!(dump.dump(), pack_changed(&mut source.tmpfs));
                dumped?;
                tmpfs_again = packed?;
                if tmpfs_again > 0 {
                    let carried = source.tmpfs.iter().flat_map(Leaving::carried).collect();
                    dump.amend(carried).await?;
                }
                // CRIU thaws once it holds every task by ptrace, and freezes again at its end, which
                // comes later here: the tasks must stand still even if it is killed.
                freeze(source).await.context("freeze again")?;
            }
            None => {
                let params = dump_params(source);
                let done = source.container.checkpoint(params).await;
                let _ = std::fs::remove_dir_all(source.work());
                done?;
                still_frozen(source)?;
            }
        }
        self.enter(Phase::PHASE_DUMPED, &source.migration);
        let tar = source.dump.as_ref().map(PreparedDump::tar_counts).unwrap_or_default();
        Ok(DumpResponse {
            fast_tar_calls: tar.fast,
            real_tar_calls: tar.real,
            dump_us: micros(start),
            tmpfs,
            tmpfs_again,
            criu_lock: source.network_lock() != NetworkLock::Skip,
            images_path: images.display().to_string(),
            ..Default::default()
        })
    }

    /// Dumps for a checkpoint to keep; the container stays frozen, whatever the outcome.
    pub(super) async fn checkpoint(&self, side: &mut Side) -> Result<CheckpointResponse> {
        let source = at_source(side)?;
        let start = Instant::now();
        let (Some(dump), Some(exit)) = (&mut source.dump, source.keeps) else {
            return Err(Error::failed_precondition("no dump to keep was prepared"));
        };
        let (silent, incomplete) = dump.dump_to_keep(exit).await?;
        source.silent = silent;
        freeze(source).await.context("freeze again")?;
        if exit {
            // No pause has to be short, and with CRIU's end its statistics are there. It leaves the cgroup
            // frozen.
            source.end_dump(false).await;
        }
        still_frozen(source)?;
        if exit {
            self.enter(Phase::PHASE_CHECKPOINTED, &source.migration);
        }
        Ok(CheckpointResponse { dump_us: micros(start), incomplete, ..Default::default() })
    }

    /// Gives the container back: thawed, unlocked, nothing left of the migration.
    pub(super) async fn thaw(&self, side: &mut Side) -> Result<()> {
        let source = at_source(side)?;
        // CRIU must have let go of the tasks before they run.
        source.end_dump(false).await;
        // Unlocked first, or the program would see its packets refused.
        if let Some(silent) = source.silent.take() {
            silent.speak().await;
        }
        if let Some(Err(error)) = source.lock.as_ref().map(Prepared::unlock) {
            // If they are gone there is nothing to unlock; else removing them tells why.
            warn!("{error}");
        }
        if source.frozen {
            let freezer = source.freezer.clone();
            tokio::task::spawn_blocking(move || freezer.thaw(FREEZER))
                .await
                .context("thaw")?
                .context("thaw")?;
            source.frozen = false;
        }
        // The clients may have been led away before the freeze already.
        if let Some((ip, device)) = &source.announce
            && let Err(error) = announce::to_neighbours(*ip, device)
        {
            warn!("announce {ip} on {device} again: {error}");
        }
        source.ready.rest();
        // Its clients are served again: taking the tables away takes 10 ms and more.
        let unlocked = source.remove_lock().await;
        let images = source.images();
        if let Err(error) = std::fs::remove_dir_all(&images)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            warn!("remove {}: {error}", images.display());
        }
        remove_note(&source.container);
        if unlocked.is_ok() {
            self.enter(Phase::PHASE_NONE, "");
            *side = Side::None;
        }
        unlocked
    }

    /// Writes down that the destination shall run the container.
    pub(super) fn commit(&self, side: &mut Side, record: &Record) -> Result<()> {
        let source = at_source(side)?;
        if !source.lease.is_alive() || source.deadline <= Instant::now() {
            return Err(Error::failed_precondition("the migration is being rolled back"));
        }
        record.write().context("write the record of the commit")?;
        source.committed = true;
        source.ready.rest();
        self.enter(Phase::PHASE_COMMITTED, &source.migration);
        Ok(())
    }

    /// Undoes the commit, on the destination's word.
    pub(super) async fn revert(&self, side: &mut Side) -> Result<()> {
        let migration = at_source(side)?.migration.clone();
        self.thaw(side).await?;
        Record::remove(&migration).context("remove the record of the commit")
    }

    /// Ends the frozen tasks, see [`end_tasks`].
    pub(super) async fn retire(&self, side: &mut Side) -> Result<()> {
        let source = at_source(side)?;
        if source.reservation.is_none() {
            return Ok(());
        }
        source.end_dump(true).await;
        end_tasks(source).await?;
        source.reservation = None;
        source.ready = Ready::default();
        match source.lock.take() {
            // Nothing leaves this namespace, and its next container needs it.
            Some(lock) if source.given_netns => {
                let _ = tokio::task::spawn_blocking(move || drop(lock)).await;
            }
            // The rules stay until the address has left: the driver removes them.
            Some(lock) => lock.leave(),
            None => {}
        }
        self.enter(Phase::PHASE_RETIRED, &source.migration);
        Ok(())
    }

    /// Ends the frozen tasks of a checkpoint, whose connections stay locked.
    pub(super) async fn end(&self, side: &mut Side) -> Result<()> {
        let source = at_source(side)?;
        source.end_dump(true).await;
        end_tasks(source).await?;
        source.reservation = None;
        source.ready = Ready::default();
        source.silent.take().into_iter().for_each(Silent::keep);
        if let Err(error) = source.remove_lock().await {
            warn!("{error}");
        }
        remove_note(&source.container);
        self.enter(Phase::PHASE_NONE, "");
        *side = Side::None;
        Ok(())
    }
}

/// Ends frozen tasks, if they have not ended yet.
async fn end_tasks(source: &AtSource) -> Result<()> {
    if source.container.snapshot().status == Status::Stopped {
        return Ok(());
    }
    source.container.end_frozen().await?;
    source.container.wait_exited(EXIT).await.map(drop)
}

/// CRIU gives the freezer back as it found it; of a container that ran on since the dump nothing may be
/// taken for what was dumped.
fn still_frozen(source: &AtSource) -> Result<()> {
    match source.freezer.is_frozen().context("look at the freezer")? {
        true => Ok(()),
        false => Err(Error::internal("the dump has thawed the container")),
    }
}

/// Where the clients are led away from.
struct Away<'a> {
    addresses: &'a [String],
    device: &'a str,
}

/// Freezes and locks, in this order: the program would see its packets refused otherwise. What the
/// kernel acknowledges until the lock is there is in the dump.
async fn freeze_and_lock(source: &mut AtSource, addresses: &[IpAddr]) -> Result<FreezeResponse> {
    source.reservation = Some(source.container.reserve("is being migrated")?);
    must_run(&source.container)?;
    source.ready.wake(&source.fast);
    let took = freeze(source).await?;
    let start = Instant::now();
    if source.lock.is_none() {
        source.lock = prepare_lock(&source.migration, addresses).await?;
    }
    if let Some(lock) = &source.lock {
        lock.lock().context("lock the connections")?;
    }
    let freeze_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    Ok(FreezeResponse { lock_us: micros(start), freeze_us, ..Default::default() })
}

/// How long it took.
async fn freeze(source: &mut AtSource) -> Result<Duration> {
    let (start, freezer) = (Instant::now(), source.freezer.clone());
    // From now on a rollback thaws.
    source.frozen = true;
    if !source.takes(Fast::Freezer) && !freezer.is_frozen().context("look at the freezer")? {
        source.container.freeze_by_runc().await?;
        source.container.refuse_stopped()?;
        return Ok(start.elapsed());
    }
    let frozen = tokio::task::spawn_blocking(move || freezer.freeze_for_dump(FREEZER));
    frozen.await.context("freeze")?.context("freeze")
}

/// Tables that take effect at once when they are wanted. None without addresses.
async fn prepare_lock(migration: &str, addresses: &[IpAddr]) -> Result<Option<Prepared>> {
    if addresses.is_empty() {
        return Ok(None);
    }
    let (migration, addresses) = (migration.to_owned(), addresses.to_vec());
    let made = tokio::task::spawn_blocking(move || Prepared::new(&migration, &addresses)).await;
    Ok(Some(made.context("prepare the lock")?.context("prepare the connection lock")?))
}

/// Packs the file systems in memory that the dump is to leave out. None is no error: the dump has them
/// then.
async fn pack_tmpfs(source: &AtSource) -> Option<Leaving> {
    if !source.takes(Fast::Tmpfs) {
        return None;
    }
    let (images, init) = (source.images(), source.container.snapshot().pid.cast_signed());
    let packed = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&images)?;
        let all = ferry_oci::cgroups::processes(init.cast_unsigned())?;
        Leaving::prepare(init, &all, &images)
    });
    match packed.await {
        Ok(Ok(leaving)) => Some(leaving),
        failed => {
            warn!("pack the file systems in memory: {failed:?}");
            None
        }
    }
}

/// Looks at them in the freeze, beside the dump. How many had changed.
async fn pack_changed(tmpfs: &mut Option<Leaving>) -> Result<u64> {
    let Some(mut leaving) = tmpfs.take() else { return Ok(0) };
    let looked = tokio::task::spawn_blocking(move || {
        let changed = leaving.pack_changed();
        (leaving, changed)
    });
    let (leaving, changed) = looked.await.context("look at the file systems in memory")?;
    *tmpfs = Some(leaving);
    Ok(changed.context("pack a file system in memory that has changed")? as u64)
}

/// What CRIU is given for its dump.
fn extras(request: &PrepareDumpRequest, fast: &[Fast]) -> Result<Extras> {
    let tar = fast.contains(&Fast::Tar).then(FastTar::find).flatten();
    let log_level = fast.contains(&Fast::Log).then_some(QUIET);
    let warm = fast.contains(&Fast::Warm);
    let extras = Extras { tar, log_level, warm, ..Extras::default() };
    if request.hide_folder.is_empty() {
        return Ok(extras);
    }
    let folder = paths::hide(&request.migration);
    if Path::new(&request.hide_folder) != folder {
        let text = format!("orders are expected in {}", folder.display());
        return Err(Error::invalid_argument(text));
    }
    let library = find_library()
        .ok_or_else(|| Error::failed_precondition("the library that hides memory is missing"))?;
    Hiding::prepare(&folder, &library).context("make the folder of the orders")?;
    Ok(Extras { preload: Some(library), hide: Some(folder), ..extras })
}

fn must_run(container: &Container) -> Result<()> {
    match container.snapshot().status {
        Status::Running => Ok(()),
        status => {
            let text = format!("{} is {status:?}, not running", container.id());
            Err(Error::failed_precondition(text))
        }
    }
}

fn limit_of(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into()).min(MAX_LIMIT)
}

fn dump_params(source: &AtSource) -> CheckpointParams {
    let ignore = source.takes(Fast::Cgroups).then(|| "ignore".to_owned());
    CheckpointParams {
        images: source.images(),
        work: source.work(),
        leave_running: true,
        options: DumpOptions {
            tcp_established: true,
            network_lock: source.network_lock(),
            manage_cgroups: ignore,
            in_netns: source.given_netns && source.takes(Fast::Netns),
            tmpfs: source.carried(),
            ..Default::default()
        },
        extra: vec![format!("timeout {SEIZE_S}")],
        deadline: source.deadline.saturating_duration_since(Instant::now()),
        parent: None,
    }
}

/// A dump for a checkpoint to keep.
fn keep_params(source: &AtSource, request: &Keep) -> Result<CheckpointParams> {
    let wanted = CheckpointOptions {
        file_locks: request.file_locks,
        external_unix_sockets: request.external_unix_sockets,
        terminal: source.container.stdio().terminal,
        ..Default::default()
    };
    let mut options = source.container.dump_options(wanted)?;
    if request.exit {
        source.container.lock_of_an_end(&mut options)?;
    }
    Ok(CheckpointParams {
        images: request.images_path.clone().into(),
        work: request.work_path.clone().into(),
        // Until the caller has it safe.
        leave_running: true,
        options,
        extra: Vec::new(),
        deadline: source.deadline.saturating_duration_since(Instant::now()),
        parent: Some(&request.parent_path).filter(|path| !path.is_empty()).map(PathBuf::from),
    })
}

/// Names the migration in the bundle, for the `delete` action after a shim that was killed.
fn leave_note(container: &Container, migration: &str) -> Result<()> {
    let path = container.bundle().join(paths::MIGRATION_FILE);
    std::fs::write(path, migration).context("name the migration in the bundle")
}

fn remove_note(container: &Container) {
    let _ = std::fs::remove_file(container.bundle().join(paths::MIGRATION_FILE));
}

fn at_source(side: &mut Side) -> Result<&mut AtSource> {
    match side {
        Side::Source(source) => Ok(source),
        _ => Err(Error::failed_precondition("the container is not leaving")),
    }
}

fn addresses(texts: &[String]) -> Result<Vec<IpAddr>> {
    let parse = |text: &String| {
        text.parse().map_err(|_| Error::invalid_argument(format!("{text:?} is no IP address")))
    };
    texts.iter().map(parse).collect()
}

pub(super) fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}
