//! A container that leaves: frozen, dumped, and either given back or ended.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_oci::api::ferry::{
    DumpResponse, FreezeRequest, FreezeResponse, Phase, PrepareDumpRequest, PrepareDumpResponse,
};
use ferry_oci::criu::{DumpOptions, FastTar, NetworkLock, RECORD_FILE, find_library};
use ferry_oci::fast::{self, Fast};
use ferry_oci::freezer::Freezer;
use ferry_oci::quarantine::{self, Prepared};
use ferry_oci::record::Record;
use ferry_oci::{announce, paths, sockets};
use log::warn;

use super::lease::Lease;
use super::moves::{Move, Side};
use super::netns;
use crate::container::{CheckpointParams, Container, Extras, PreparedDump, Reservation};
use crate::containers::Containers;
use crate::error::{Context as _, Error, Result};
use crate::state::Status;

/// How long the freezer may take. It took 0.1 to 4 ms wherever it was measured.
const FREEZER: Duration = Duration::from_secs(5);
/// How long nft may take.
const NFT: Duration = Duration::from_secs(10);
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
    locked: bool,
    /// The lock, where it was prepared.
    lock: Option<Prepared>,
    /// It is in a network namespace that was given by path, where `lock` is.
    given_netns: bool,
    /// What is announced again on a rollback, and where: the clients have been led away.
    announce: Option<(Ipv4Addr, String)>,
    /// A dump that waits, or is held at its end.
    dump: Option<PreparedDump>,
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

    fn work(&self) -> PathBuf {
        self.container.bundle().join("ferry-dump")
    }

    /// Lets a dump end that was prepared, with the tasks as they were.
    async fn end_dump(&mut self) {
        if let Some(dump) = self.dump.take() {
            dump.finish().await;
        }
        let _ = std::fs::remove_dir_all(self.work());
        let _ = std::fs::remove_dir_all(paths::hide(&self.migration));
    }
}

impl Move {
    /// Starts a dump that waits; the container runs on.
    pub(super) async fn prepare_dump(
        self: &Arc<Self>,
        side: &mut Side,
        containers: &Arc<Containers>,
        container: Arc<Container>,
        request: &PrepareDumpRequest,
        lease: Lease,
    ) -> Result<PrepareDumpResponse> {
        let start = Instant::now();
        must_run(&container)?;
        // Asked once and kept: not between freeze and resume.
        container.runtime().version().await;
        let locked = addresses(&request.lock_addresses)?;
        let mut source =
            self.begin(container, &request.migration, lease, request.limit_s, &locked)?;
        let fast = fast::parse(&request.fast);
        if let Some(ip) = locked.first() {
            source.announce = Some((*ip, request.device.clone()));
            let ips: Vec<_> = locked.iter().copied().map(IpAddr::from).collect();
            // Without it the freeze makes its own, slowly.
            match Prepared::new(&request.migration, &ips) {
                Ok(lock) => source.lock = Some(lock),
                Err(error) => warn!("prepare the connection lock: {error}"),
            }
        }
        // A private network has only loopback, which CRIU locks in there.
        let lock = match locked.is_empty() && !source.given_netns {
            true => NetworkLock::Nftables,
            false => NetworkLock::Skip,
        };
        let params = dump_params(&source, &fast, lock);
        let images = params.images.clone();
        let extras = extras(request, &fast)?;
        match source.container.prepare_dump(params, &extras).await {
            Ok(dump) => source.dump = Some(dump),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&images);
                source.end_dump().await;
                remove_note(&source.container);
                return Err(error);
            }
        }
        let early_files = EARLY_FILES.into_iter().filter(|name| images.join(name).is_file());
        let early_files = early_files.map(str::to_owned).collect();
        let (alive, limit) = (source.lease.is_alive(), limit_of(request.limit_s));
        *side = Side::Source(Box::new(source));
        self.enter(Phase::PHASE_PREPARED, &request.migration);
        self.limit(containers.clone(), limit);
        if !alive {
            self.thaw(side, containers).await?;
            return Err(Error::failed_precondition("the caller was lost"));
        }
        Ok(PrepareDumpResponse {
            images_path: images.display().to_string(),
            early_files,
            prepare_us: micros(start),
            ..Default::default()
        })
    }

    fn begin(
        &self,
        container: Arc<Container>,
        migration: &str,
        lease: Lease,
        limit_s: u32,
        locked: &[Ipv4Addr],
    ) -> Result<AtSource> {
        let freezer = Freezer::of(container.snapshot().pid).context("find the freezer")?;
        leave_note(&container, migration)?;
        let lock = netns::lock(&container, migration, locked);
        let lock = lock.inspect_err(|_| remove_note(&container))?;
        Ok(AtSource {
            lease,
            migration: migration.to_owned(),
            container,
            freezer,
            frozen: false,
            locked: false,
            given_netns: lock.is_some(),
            lock,
            announce: None,
            dump: None,
            committed: false,
            reservation: None,
            deadline: Instant::now() + limit_of(limit_s),
        })
    }

    /// Freezes, then locks the connections. If it fails, nothing is left of the migration here.
    pub(super) async fn freeze(
        self: &Arc<Self>,
        side: &mut Side,
        containers: &Arc<Containers>,
        container: Arc<Container>,
        request: &FreezeRequest,
        lease: Lease,
    ) -> Result<FreezeResponse> {
        let addresses = addresses(&request.lock_addresses)?;
        if !matches!(side, Side::Source(_)) {
            must_run(&container)?;
            container.runtime().version().await;
            let source =
                self.begin(container, &request.migration, lease, request.limit_s, &addresses)?;
            *side = Side::Source(Box::new(source));
        }
        let frozen = freeze_and_lock(at_source(side)?, containers, &addresses).await;
        let limit = limit_of(request.limit_s);
        match frozen {
            Ok(response) => {
                let source = at_source(side)?;
                source.deadline = Instant::now() + limit;
                let alive = source.lease.is_alive();
                self.enter(Phase::PHASE_FROZEN, &request.migration);
                self.limit(containers.clone(), limit);
                if !alive {
                    self.thaw(side, containers).await?;
                    return Err(Error::failed_precondition("the caller was lost"));
                }
                Ok(response)
            }
            Err(error) => {
                if let Err(error) = self.thaw(side, containers).await {
                    warn!("after a failed freeze: {error}");
                }
                Err(error)
            }
        }
    }

    /// Thaws by itself when the limit passes without a commit.
    fn limit(self: &Arc<Self>, containers: Arc<Containers>, limit: Duration) {
        let a_move = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(limit).await;
            let mut side = a_move.side.lock().await;
            if let Side::Source(source) = &*side
                && source.undecided()
                && source.deadline <= Instant::now()
            {
                warn!("frozen for {limit:?} without a commit: thawing");
                if let Err(error) = a_move.thaw(&mut side, &containers).await {
                    warn!("thaw: {error}");
                }
            }
        });
    }

    /// Dumps; the container stays frozen, whatever the outcome.
    pub(super) async fn dump(&self, side: &mut Side) -> Result<DumpResponse> {
        let source = at_source(side)?;
        let start = Instant::now();
        let images = source.images();
        match &mut source.dump {
            Some(dump) => {
                dump.dump().await?;
                // CRIU thaws once it holds every task by ptrace, and freezes again at its end, which
                // comes later here: the tasks must stand still even if it is killed.
                let freezer = source.freezer.clone();
                let frozen = tokio::task::spawn_blocking(move || freezer.freeze(FREEZER));
                frozen.await.context("freeze again")?.context("freeze again")?;
            }
            None => {
                // Ours keeps the whole address silent. A private network has only loopback, which
                // CRIU locks in there.
                let lock = if source.locked { NetworkLock::Skip } else { NetworkLock::Nftables };
                let params = dump_params(source, &[], lock);
                let done = source.container.checkpoint(params).await;
                let _ = std::fs::remove_dir_all(source.work());
                done?;
            }
        }
        // CRIU gives the freezer back as it found it; a container that ran on since the dump must
        // never be committed.
        if !source.freezer.is_frozen().context("look at the freezer")? {
            return Err(Error::internal("the dump has thawed the container"));
        }
        self.enter(Phase::PHASE_DUMPED, &source.migration);
        let tar = source.dump.as_ref().map(PreparedDump::tar_counts).unwrap_or_default();
        Ok(DumpResponse {
            fast_tar_calls: tar.fast,
            real_tar_calls: tar.real,
            dump_us: micros(start),
            images_bytes: size_of(&images),
            images_path: images.display().to_string(),
            ..Default::default()
        })
    }

    /// Gives the container back: thawed, unlocked, nothing left of the migration.
    pub(super) async fn thaw(&self, side: &mut Side, containers: &Containers) -> Result<()> {
        let source = at_source(side)?;
        // CRIU must have let go of the tasks before they run.
        source.end_dump().await;
        // Unlocked first, or the program would see its packets refused.
        let unlocked = match (source.lock.take(), source.locked) {
            // Its end removes it.
            (Some(prepared), _) => prepared.unlock().context("unlock the connections"),
            (None, true) => unlock(containers, &source.migration).await,
            (None, false) => Ok(()),
        };
        if source.frozen {
            let freezer = source.freezer.clone();
            tokio::task::spawn_blocking(move || freezer.thaw(FREEZER))
                .await
                .context("thaw")?
                .context("thaw")?;
            source.frozen = false;
            if let Some((ip, device)) = &source.announce
                && let Err(error) = announce::gratuitous_arp(*ip, device)
            {
                warn!("announce {ip} on {device} again: {error}");
            }
        }
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
        self.enter(Phase::PHASE_COMMITTED, &source.migration);
        Ok(())
    }

    /// Undoes the commit, on the destination's word.
    pub(super) async fn revert(&self, side: &mut Side, containers: &Containers) -> Result<()> {
        let migration = at_source(side)?.migration.clone();
        self.thaw(side, containers).await?;
        Record::remove(&migration).context("remove the record of the commit")
    }

    /// Ends the frozen tasks. Their sockets are taken out of the protocol first, so that no peer
    /// hears of it and no connection lingers that the same container could come back to.
    pub(super) async fn retire(&self, side: &mut Side) -> Result<()> {
        let source = at_source(side)?;
        if source.reservation.is_none() {
            return Ok(());
        }
        source.end_dump().await;
        if source.container.snapshot().status != Status::Stopped {
            let pids = source.container.pids().await?;
            let silenced = tokio::task::spawn_blocking(move || sockets::silence(&pids))
                .await
                .context("silence the connections")?
                .context("silence the connections")?;
            source.container.kill_all().await?;
            let freezer = source.freezer.clone();
            let thawed = tokio::task::spawn_blocking(move || freezer.thaw(FREEZER)).await;
            let ended = source.container.wait_exited(EXIT).await;
            drop(silenced);
            if let Err(error) = &ended {
                warn!("thaw of killed tasks: {thawed:?}; {error}");
            }
            ended?;
        }
        source.reservation = None;
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
}

/// Freezes and locks, in this order: the program would see its packets refused otherwise. What the
/// kernel acknowledges until the lock is there is in the dump.
async fn freeze_and_lock(
    source: &mut AtSource,
    containers: &Containers,
    addresses: &[Ipv4Addr],
) -> Result<FreezeResponse> {
    source.reservation = Some(source.container.reserve("is being migrated")?);
    must_run(&source.container)?;
    let freezer = source.freezer.clone();
    let frozen = tokio::task::spawn_blocking(move || freezer.freeze(FREEZER));
    let took = frozen.await.context("freeze")?.context("freeze")?;
    source.frozen = true;
    let start = Instant::now();
    source.locked = !addresses.is_empty() || source.given_netns;
    match &source.lock {
        Some(prepared) if source.locked => prepared.lock().context("lock the connections")?,
        None if source.locked => lock(containers, &source.migration, addresses).await?,
        _ => {}
    }
    let freeze_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    Ok(FreezeResponse { lock_us: micros(start), freeze_us, ..Default::default() })
}

/// What CRIU is given for its dump.
fn extras(request: &PrepareDumpRequest, fast: &[Fast]) -> Result<Extras> {
    let tar = fast.contains(&Fast::Tar).then(FastTar::find).flatten();
    if request.hide_folder.is_empty() {
        return Ok(Extras { tar, ..Extras::default() });
    }
    let folder = paths::hide(&request.migration);
    if Path::new(&request.hide_folder) != folder {
        let text = format!("orders are expected in {}", folder.display());
        return Err(Error::invalid_argument(text));
    }
    let library = find_library()
        .ok_or_else(|| Error::failed_precondition("the library that hides memory is missing"))?;
    Ok(Extras { preload: Some(library), hide: Some(folder), tar })
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

fn dump_params(source: &AtSource, fast: &[Fast], network_lock: NetworkLock) -> CheckpointParams {
    let ignore = fast.contains(&Fast::Cgroups).then(|| "ignore".to_owned());
    CheckpointParams {
        images: source.images(),
        work: source.work(),
        leave_running: true,
        options: DumpOptions {
            tcp_established: true,
            network_lock,
            manage_cgroups: ignore,
            in_netns: source.given_netns && fast.contains(&Fast::Netns),
            ..Default::default()
        },
        extra: vec![format!("timeout {SEIZE_S}")],
        deadline: source.deadline.saturating_duration_since(Instant::now()),
    }
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

fn addresses(texts: &[String]) -> Result<Vec<Ipv4Addr>> {
    let parse = |text: &String| {
        text.parse().map_err(|_| Error::invalid_argument(format!("{text:?} is no IPv4 address")))
    };
    texts.iter().map(parse).collect()
}

async fn lock(containers: &Containers, migration: &str, to: &[Ipv4Addr]) -> Result<()> {
    nft(containers, quarantine::add(migration, to), "lock the connections").await
}

async fn unlock(containers: &Containers, migration: &str) -> Result<()> {
    nft(containers, quarantine::remove(migration), "unlock the connections").await
}

async fn nft(containers: &Containers, command: std::process::Command, what: &str) -> Result<()> {
    let output = containers.reaper.run(command, NFT).await?;
    if output.status == 0 {
        return Ok(());
    }
    let printed = String::from_utf8_lossy(&output.stderr);
    Err(Error::internal(format!("{what}: nft: {}", printed.trim())))
}

fn size_of(dir: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

pub(super) fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}
