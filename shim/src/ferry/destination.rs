//! A container that arrives: restored, held, and either let run or ended.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_oci::api::ferry::{Phase, ReleaseResponse, RestoreRequest, RestoreResponse};
use ferry_oci::criu::images::MOST_BYTES;
use ferry_oci::criu::rpc::QUIET;
use ferry_oci::criu::{DumpRecord, FastTar};
use ferry_oci::fast::{self, Fast};
use ferry_oci::limited;
use ferry_oci::paths;
use ferry_oci::record::{Decision, Record};
use ferry_oci::tmpfs::{Arriving, Tmpfs};
use log::warn;

use super::lease::Lease;
use super::moves::{Move, Side};
use super::ready::Ready;
use super::source::micros;
use crate::container::{
    Container, Extras, Held, HoldParams, Network, PreparedRestore, RestoreParams,
};
use crate::error::{Context as _, Error, Result};
use crate::state::{Op, admit};

/// How long CRIU may take to restore.
const RESTORE: Duration = Duration::from_secs(120);
/// How long runc may take to return after the release. Callers give up earlier and ask again.
const RELEASE: Duration = Duration::from_secs(900);

/// Brings up the loopback device of a network namespace that CRIU has just made: CRIU leaves it
/// down, and connections over it cannot be restored then.
const LOOPBACK_UP: &str = r#"nsenter -t "$CRTOOLS_INIT_PID" -n ip link set lo up || exit 1"#;

/// What is no longer needed after the release is put away so long after it. The driver takes longer to
/// come to its end.
const ANSWERS_FIRST: Duration = Duration::from_millis(40);

/// What is held of a container at its destination.
pub(super) struct AtDestination {
    pub(super) lease: Lease,
    migration: String,
    container: Arc<Container>,
    /// Until its images are there.
    waiting: Option<PreparedRestore>,
    /// Until it is decided.
    held: Option<Held>,
    /// What the dump has left out; CRIU has it once it holds the container.
    tmpfs: Option<Arriving>,
    /// As long as its clients wait.
    ready: Ready,
}

impl AtDestination {
    /// Whether a lost agent still ends the restore.
    pub(super) fn undecided(&self) -> bool {
        self.waiting.is_some() || self.held.is_some()
    }
}

impl Move {
    /// Starts a restore that waits for its images.
    pub(super) async fn prepare_restore(
        &self,
        side: &mut Side,
        container: Arc<Container>,
        request: &RestoreRequest,
        lease: Lease,
    ) -> Result<()> {
        let migration = &request.migration;
        must_be_new(&container)?;
        let private = has_private_network(&container)?;
        std::fs::create_dir_all(paths::RECORDS).context("make the folder of records")?;
        let tmpfs = arriving(migration).await?;
        let params = restore_params(&container, request, Some(&tmpfs));
        let decided = Some(paths::decided(migration));
        let fast = fast::parse(&request.fast);
        let ready = Ready::prepare(&fast).await;
        let tar = fast.contains(&Fast::Tar).then(FastTar::find).flatten();
        let log_level = fast.contains(&Fast::Log).then_some(QUIET);
        let warm = fast.contains(&Fast::Warm);
        let extras = Extras { tar, log_level, warm, ..Extras::default() };
        self.enter(Phase::PHASE_RESTORING, migration);
        let waiting = match container.prepare_restore(params, decided, private, &extras).await {
            Ok(waiting) => waiting,
            Err(error) => {
                self.enter(Phase::PHASE_FAILED, migration);
                return Err(error);
            }
        };
        let alive = lease.is_alive();
        *side = Side::Destination(Box::new(AtDestination {
            lease,
            migration: migration.clone(),
            container,
            waiting: Some(waiting),
            held: None,
            tmpfs: Some(tmpfs),
            ready,
        }));
        self.enter(Phase::PHASE_WAITING, migration);
        if !alive {
            self.abort(side).await;
            return Err(Error::failed_precondition("the caller was lost"));
        }
        Ok(())
    }

    /// Restores and holds.
    pub(super) async fn restore(
        &self,
        side: &mut Side,
        container: Arc<Container>,
        request: &RestoreRequest,
        lease: Lease,
    ) -> Result<RestoreResponse> {
        let start = Instant::now();
        let migration = &request.migration;
        let (waiting, mut tmpfs, mut ready) = match side {
            Side::Destination(destination) => (
                destination.waiting.take(),
                destination.tmpfs.take(),
                std::mem::take(&mut destination.ready),
            ),
            // To make it ready would take as long as it saves.
            _ => (None, None, Ready::default()),
        };
        ready.wake(&fast::parse(&request.fast));
        let held = match waiting {
            Some(waiting) => {
                let inventory = paths::images(migration).join(paths::INVENTORY_FILE);
                let complete = complete(migration, &mut tmpfs).await;
                match complete.and_then(|()| {
                    limited::read(&inventory, MOST_BYTES).context("read the inventory")
                }) {
                    Ok(inventory) => waiting.restore(&inventory).await,
                    Err(error) => {
                        waiting.abandon().await;
                        Err(error)
                    }
                }
            }
            None => {
                must_be_new(&container)?;
                let hold = HoldParams {
                    namespaces: has_private_network(&container)?.then(|| LOOPBACK_UP.to_owned()),
                    decided: Some(paths::decided(migration)),
                };
                std::fs::create_dir_all(paths::RECORDS).context("make the folder of records")?;
                tmpfs = Some(arriving(migration).await?);
                complete(migration, &mut tmpfs).await?;
                let params = restore_params(&container, request, tmpfs.as_ref());
                self.enter(Phase::PHASE_RESTORING, migration);
                container.restore_held(params, hold).await
            }
        };
        let held = held.inspect_err(|_| self.enter(Phase::PHASE_FAILED, migration))?;
        let pid = held.pid();
        let alive = lease.is_alive();
        *side = Side::Destination(Box::new(AtDestination {
            lease,
            migration: migration.clone(),
            container,
            waiting: None,
            held: Some(held),
            tmpfs,
            ready,
        }));
        self.enter(Phase::PHASE_HELD, migration);
        if !alive {
            self.abort(side).await;
            return Err(Error::failed_precondition("the caller was lost"));
        }
        Ok(RestoreResponse { pid, restore_us: micros(start), ..Default::default() })
    }

    /// **The commit, here.** The record is written first; it holds from the moment in which the
    /// restore itself makes [`paths::decided`], just before the tasks run. A shim that is killed
    /// in between has released nothing.
    pub(super) async fn release(&self, side: &mut Side) -> Result<ReleaseResponse> {
        let Side::Destination(destination) = side else {
            return Err(Error::failed_precondition("the container is not arriving"));
        };
        let Some(held) = destination.held.take() else {
            return Err(Error::failed_precondition("the container is not held"));
        };
        let start = Instant::now();
        let (id, namespace) = (destination.container.id(), destination.container.namespace());
        let record = |decision| Record::new(&destination.migration, id, namespace, decision);
        if let Err(error) = record(Decision::Released).write() {
            // Nothing has been decided.
            destination.held = Some(held);
            return Err(error).context("write the record of the release");
        }
        // Undecided is over, and so is what hangs on the lease.
        self.enter(Phase::PHASE_RELEASING, &destination.migration);
        let released = held.release(RELEASE).await;
        // Its clients wait for their first answers, and each unmount waits for all processors.
        let over = (std::mem::take(&mut destination.ready), destination.tmpfs.take());
        tokio::spawn(async move {
            tokio::time::sleep(ANSWERS_FIRST).await;
            tokio::task::spawn_blocking(move || drop(over)).await
        });
        match released {
            Ok(_) => {
                self.enter(Phase::PHASE_RELEASED, &destination.migration);
                Ok(ReleaseResponse { release_us: micros(start), ..Default::default() })
            }
            // It may run, or come to run: stays "releasing" until somebody looks after it.
            Err(error) if error.is_deadline() => Err(error),
            Err(error) => {
                // The record first: who sees the phase may read it.
                if let Err(error) = record(Decision::Failed).write() {
                    warn!("write the record of a failed release: {error}");
                }
                self.enter(Phase::PHASE_FAILED, &destination.migration);
                Err(error)
            }
        }
    }

    /// Ends a held restore. Nothing to do when there is none.
    pub(super) async fn abort(&self, side: &mut Side) {
        let Side::Destination(destination) = side else { return };
        match (destination.waiting.take(), destination.held.take()) {
            (Some(waiting), _) => waiting.abandon().await,
            (None, Some(held)) => held.abort().await,
            (None, None) => return,
        }
        destination.ready = Ready::default();
        take_away(&mut destination.tmpfs).await;
        self.enter(Phase::PHASE_FAILED, &destination.migration);
    }
}

/// The file systems that the dump has left out, in place for the restore.
async fn arriving(migration: &str) -> Result<Arriving> {
    let migration = migration.to_owned();
    let prepared = tokio::task::spawn_blocking(move || {
        let images = paths::images(&migration);
        let carried = carried(&images)?;
        Arriving::prepare(&migration, &carried, &images)
            .context("make the container's file systems in memory")
    });
    prepared.await.context("make file systems in memory")?
}

/// Has them hold what they held in the freeze.
async fn complete(migration: &str, tmpfs: &mut Option<Arriving>) -> Result<()> {
    let Some(mut arriving) = tmpfs.take() else { return Ok(()) };
    let images = paths::images(migration);
    let carried = carried(&images)?;
    let completed = tokio::task::spawn_blocking(move || {
        let done = arriving.complete(&carried, &images);
        (arriving, done)
    });
    let (arriving, done) = completed.await.context("fill file systems in memory")?;
    *tmpfs = Some(arriving);
    done.context("fill the container's file systems in memory")
}

/// Which those are.
fn carried(images: &Path) -> Result<Vec<Tmpfs>> {
    let record = DumpRecord::read(images).context("read the images")?;
    Ok(record.map(|record| record.options.tmpfs).unwrap_or_default())
}

/// The kernel takes milliseconds to take a mount away.
async fn take_away(tmpfs: &mut Option<Arriving>) {
    if let Some(arriving) = tmpfs.take() {
        let _ = tokio::task::spawn_blocking(move || drop(arriving)).await;
    }
}

fn restore_params(
    container: &Container,
    request: &RestoreRequest,
    tmpfs: Option<&Arriving>,
) -> RestoreParams {
    RestoreParams {
        images: paths::images(&request.migration),
        work: container.bundle().join(paths::RESTORE_WORK),
        extra: tmpfs.map(Arriving::lines).unwrap_or_default(),
        lazy_pages: request.lazy_pages,
        deadline: RESTORE,
    }
}

/// Refuses what was not created from a checkpoint, or has started, before anything is done for it: one that
/// runs is not a migration that has failed.
fn must_be_new(container: &Container) -> Result<()> {
    admit(container.snapshot().status, Op::Restore)
}

/// Whether CRIU makes a network namespace.
fn has_private_network(container: &Container) -> Result<bool> {
    Ok(Network::of(container.bundle())? == Network::Private)
}
