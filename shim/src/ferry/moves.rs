//! The migrations of this shim's containers: one at a time for each, in a fixed order of phases.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_oci::api::ferry::Phase;
use ferry_oci::quarantine;

use super::destination::AtDestination;
use super::lease::Lease;
use super::source::AtSource;
use crate::error::{Context as _, Error, Result};

/// The migration of each container that has had one.
#[derive(Default)]
pub(super) struct Moves {
    map: Mutex<HashMap<String, Arc<Move>>>,
}

impl Moves {
    /// The migration of container `id`, in phase NONE if it has had none.
    pub(super) fn of(&self, id: &str) -> Arc<Move> {
        self.lock().entry(id.to_owned()).or_default().clone()
    }

    /// Every migration.
    pub(super) fn all(&self) -> Vec<(String, Arc<Move>)> {
        self.lock().iter().map(|(id, a_move)| (id.clone(), a_move.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Move>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which side of a migration this container is on, and what is held for it.
#[derive(Default)]
pub(super) enum Side {
    #[default]
    None,
    Source(Box<AtSource>),
    Destination(Box<AtDestination>),
}

/// What others may see of a migration without waiting for its slow steps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) phase: Phase,
    pub(super) migration: String,
}

/// The migration of one container.
#[derive(Default)]
pub(super) struct Move {
    /// Held for the whole of a step, which orders them.
    pub(super) side: tokio::sync::Mutex<Side>,
    seen: Mutex<Seen>,
}

impl Move {
    /// Phase and migration at this moment.
    pub(super) fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says where the migration stands now.
    pub(super) fn enter(&self, phase: Phase, migration: &str) {
        let migration = if phase == Phase::PHASE_NONE { "" } else { migration };
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) =
            Seen { phase, migration: migration.to_owned() };
    }

    /// Refuses a step that is not legal now, or speaks of another migration.
    pub(super) fn admit(&self, step: Step, migration: &str) -> Result<()> {
        admit(step, migration, &self.seen())
    }

    /// A connection has ended: was it this migration's?
    pub(super) async fn lease_ended(&self) -> Result<()> {
        let mut side = self.side.lock().await;
        let lost = |lease: &Lease| !lease.is_alive();
        match &mut *side {
            Side::Source(source) if lost(&source.lease) && source.undecided() => {
                log::warn!("the driver was lost before the commit: thawing");
                self.thaw(&mut side).await
            }
            Side::Destination(destination) if lost(&destination.lease) => {
                if destination.undecided() {
                    log::warn!("the agent was lost before the commit: ending the restore");
                    self.abort(&mut side).await;
                    return Ok(());
                }
                let Seen { phase, migration } = self.seen();
                if phase == Phase::PHASE_RELEASED {
                    // The agent does this too; if it was killed, nobody else would soon.
                    let opened = tokio::task::spawn_blocking(move || open_address(&migration));
                    opened.await.context("open the address")??;
                    *side = Side::None;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Removes what is left of the rules that keep the address silent of a container that runs here.
fn open_address(migration: &str) -> Result<()> {
    let silent = quarantine::present().context("look for the address's rules")?;
    if silent.iter().any(|m| m == migration) {
        log::warn!("the agent was lost after the release: opening the address");
        quarantine::clear(migration).context("open the address")?;
    }
    Ok(())
}

/// Steps of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    PreDump,
    EndPreDumps,
    OpenPages,
    PrepareDump,
    Freeze,
    Dump,
    Checkpoint,
    End,
    Thaw,
    Commit,
    Revert,
    Retire,
    PrepareRestore,
    Restore,
    Release,
    Abort,
}

/// The whole order of the protocol.
fn admit(step: Step, migration: &str, seen: &Seen) -> Result<()> {
    use Phase as P;
    let legal: &[P] = match step {
        Step::PreDump | Step::EndPreDumps | Step::OpenPages | Step::PrepareDump => &[P::PHASE_NONE],
        Step::Freeze => &[P::PHASE_NONE, P::PHASE_PREPARED],
        Step::Dump | Step::Checkpoint => &[P::PHASE_FROZEN],
        Step::End => &[P::PHASE_CHECKPOINTED],
        Step::Thaw => &[P::PHASE_PREPARED, P::PHASE_FROZEN, P::PHASE_DUMPED, P::PHASE_CHECKPOINTED],
        Step::Commit => &[P::PHASE_DUMPED],
        Step::Revert => &[P::PHASE_COMMITTED],
        Step::Retire => &[P::PHASE_COMMITTED, P::PHASE_RETIRED],
        Step::PrepareRestore => &[P::PHASE_NONE],
        Step::Restore => &[P::PHASE_NONE, P::PHASE_WAITING],
        Step::Release => &[P::PHASE_HELD],
        Step::Abort => &[P::PHASE_NONE, P::PHASE_WAITING, P::PHASE_HELD, P::PHASE_FAILED],
    };
    // What came here and runs here may leave again.
    let leaves = matches!(
        step,
        Step::PreDump | Step::EndPreDumps | Step::OpenPages | Step::PrepareDump | Step::Freeze
    );
    let fresh = leaves && seen.phase == P::PHASE_RELEASED;
    if !fresh && !legal.contains(&seen.phase) {
        let phase = format!("{:?}", seen.phase).replace("PHASE_", "").to_lowercase();
        return Err(Error::failed_precondition(format!(
            "cannot {} now: the migration's phase is {phase}",
            format!("{step:?}").to_lowercase(),
        )));
    }
    let starts = fresh || seen.phase == P::PHASE_NONE;
    if !starts && seen.migration != migration {
        return Err(Error::failed_precondition(format!(
            "migration {} is under way, not {migration}",
            seen.migration
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Step; 16] = [
        Step::PreDump,
        Step::EndPreDumps,
        Step::OpenPages,
        Step::PrepareDump,
        Step::Freeze,
        Step::Dump,
        Step::Checkpoint,
        Step::End,
        Step::Thaw,
        Step::Commit,
        Step::Revert,
        Step::Retire,
        Step::PrepareRestore,
        Step::Restore,
        Step::Release,
        Step::Abort,
    ];

    fn legal(phase: Phase) -> Vec<Step> {
        let seen = Seen { phase, migration: "m-1".into() };
        STEPS.into_iter().filter(|&step| admit(step, "m-1", &seen).is_ok()).collect()
    }

    #[test]
    fn each_phase_has_its_steps_and_no_others() {
        use Step::{
            Abort, Checkpoint, Commit, Dump, End, EndPreDumps, Freeze, OpenPages, PreDump,
            PrepareDump, PrepareRestore, Release, Restore, Retire, Revert, Thaw,
        };
        let leaving = [PreDump, EndPreDumps, OpenPages, PrepareDump, Freeze];
        let first = [&leaving[..], &[PrepareRestore, Restore, Abort]].concat();
        assert_eq!(legal(Phase::PHASE_NONE), first);
        assert_eq!(legal(Phase::PHASE_PREPARED), [Freeze, Thaw]);
        assert_eq!(legal(Phase::PHASE_WAITING), [Restore, Abort]);
        assert_eq!(legal(Phase::PHASE_FROZEN), [Dump, Checkpoint, Thaw]);
        assert_eq!(legal(Phase::PHASE_CHECKPOINTED), [End, Thaw]);
        assert_eq!(legal(Phase::PHASE_DUMPED), [Thaw, Commit]);
        assert_eq!(legal(Phase::PHASE_COMMITTED), [Revert, Retire]);
        assert_eq!(legal(Phase::PHASE_RETIRED), [Retire]);
        assert_eq!(legal(Phase::PHASE_RESTORING), []);
        assert_eq!(legal(Phase::PHASE_HELD), [Release, Abort]);
        assert_eq!(legal(Phase::PHASE_RELEASED), leaving);
        assert_eq!(legal(Phase::PHASE_FAILED), [Abort]);
    }

    #[test]
    fn a_step_of_another_migration_is_refused() {
        let seen = Seen { phase: Phase::PHASE_DUMPED, migration: "m-1".into() };
        assert!(admit(Step::Commit, "m-1", &seen).is_ok());
        let error = admit(Step::Commit, "m-2", &seen).unwrap_err().to_string();
        assert!(error.contains("m-1 is under way"), "{error}");
    }
}
