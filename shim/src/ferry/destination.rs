//! A container that arrives: restored, held, and either let run or ended.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_oci::api::ferry::{Phase, ReleaseResponse, RestoreResponse};
use ferry_oci::paths;
use ferry_oci::record::{Decision, Record};
use log::warn;

use super::lease::Lease;
use super::moves::{Move, Side};
use super::source::micros;
use crate::container::{Container, Held, HoldParams, RestoreParams};
use crate::error::{Context as _, Error, Result};

/// How long CRIU may take to restore.
const RESTORE: Duration = Duration::from_secs(120);
/// How long runc may take to return after the release. Callers give up earlier and ask again.
const RELEASE: Duration = Duration::from_secs(900);

/// Brings up the loopback device of a network namespace that CRIU has just made: CRIU leaves it
/// down, and connections over it cannot be restored then.
const LOOPBACK_UP: &str = r#"nsenter -t "$CRTOOLS_INIT_PID" -n ip link set lo up || exit 1"#;

/// What is held of a container at its destination.
pub(super) struct AtDestination {
    pub(super) lease: Lease,
    migration: String,
    container: Arc<Container>,
    /// Until it is decided.
    held: Option<Held>,
}

impl AtDestination {
    /// Whether a lost agent still ends the restore.
    pub(super) fn undecided(&self) -> bool {
        self.held.is_some()
    }
}

impl Move {
    /// Restores and holds.
    pub(super) async fn restore(
        &self,
        side: &mut Side,
        container: Arc<Container>,
        migration: &str,
        images: PathBuf,
        lease: Lease,
    ) -> Result<RestoreResponse> {
        let start = Instant::now();
        let work = container.bundle().join("ferry-restore");
        let params = RestoreParams { images, work, extra: Vec::new(), deadline: RESTORE };
        let hold = HoldParams {
            namespaces: has_private_network(container.bundle())?.then(|| LOOPBACK_UP.to_owned()),
            decided: Some(paths::decided(migration)),
        };
        std::fs::create_dir_all(paths::RECORDS).context("make the folder of records")?;
        self.enter(Phase::PHASE_RESTORING, migration);
        let held = match container.restore_held(params, hold).await {
            Ok(held) => held,
            Err(error) => {
                self.enter(Phase::PHASE_FAILED, migration);
                return Err(error);
            }
        };
        let pid = held.pid();
        *side = Side::Destination(AtDestination {
            lease: lease.clone(),
            migration: migration.to_owned(),
            container,
            held: Some(held),
        });
        self.enter(Phase::PHASE_HELD, migration);
        if !lease.is_alive() {
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
        match held.release(RELEASE).await {
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
        if let Side::Destination(destination) = side
            && let Some(held) = destination.held.take()
        {
            held.abort().await;
            self.enter(Phase::PHASE_FAILED, &destination.migration);
        }
    }
}

/// Whether the bundle's spec asks for a network namespace of its own.
fn has_private_network(bundle: &Path) -> Result<bool> {
    let config = std::fs::read(bundle.join("config.json")).context("read the bundle's spec")?;
    let spec: oci_spec::runtime::Spec =
        serde_json::from_slice(&config).context("read the bundle's spec")?;
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let own = |n: &oci_spec::runtime::LinuxNamespace| {
        n.typ() == oci_spec::runtime::LinuxNamespaceType::Network
            && n.path().as_ref().is_none_or(|p| p.as_os_str().is_empty())
    };
    Ok(namespaces.into_iter().flatten().any(own))
}
