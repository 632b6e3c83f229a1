//! The one wrapper around every phase: deadline, time, progress, fault point.

use std::future::Future;
use std::io::Write;
use std::time::Instant;

use anyhow::Result;
use ferry_cli::phase::Phase;
use serde::Serialize;
use tokio::time::timeout;

use super::failure::Failure;
use super::fault;
use super::interrupt::{Interrupt, Stage};

/// One phase that has ended.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Took {
    /// Which.
    pub(crate) phase: Phase,
    /// From start to end.
    pub(crate) micros: u64,
}

/// Runs phases, one after the other, and keeps their times.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    took: Vec<Took>,
    quiet: bool,
    /// Progress of the pause, told when it is over.
    untold: String,
    interrupt: Option<Interrupt>,
}

impl Timeline {
    /// A timeline that tells its progress on standard error, unless `quiet`.
    pub(crate) fn new(quiet: bool, interrupt: Interrupt) -> Self {
        Self { quiet, interrupt: Some(interrupt), ..Self::default() }
    }

    /// Does `work` of `phase`, unless it is interrupted before the commit.
    ///
    /// # Errors
    /// Of the interruption only.
    pub(crate) async fn cut<T>(
        &self,
        phase: Phase,
        work: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let Some(interrupt) = self.interrupt.as_ref() else { return Ok(work.await) };
        tokio::select! {
            biased;
            name = interrupt.come(), if phase <= Phase::Commit => {
                Err(Failure::interrupted(phase, name))
            }
            done = work => Ok(done),
        }
    }

    /// Runs one phase within its deadline.
    ///
    /// # Errors
    /// With the phase's error, marked with the phase.
    pub(crate) async fn run<T>(
        &mut self,
        phase: Phase,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T, Failure> {
        self.cut(phase, fault::point(phase)).await?;
        if let Some(interrupt) = self.interrupt.as_ref().filter(|_| phase == Phase::Commit) {
            interrupt.enter(Stage::Decided);
        }
        let start = Instant::now();
        let work = timeout(phase.deadline(), work);
        // The commit is waited for: it may have been recorded already.
        let done = if phase < Phase::Commit { self.cut(phase, work).await } else { Ok(work.await) };
        let result = match done {
            Ok(Ok(result)) => result.map_err(|error| Failure::new(phase, error)),
            Ok(Err(_)) => Err(Failure::deadline(phase)),
            Err(interrupted) => Err(interrupted),
        };
        let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.took.push(Took { phase, micros });
        if !self.quiet {
            let mark = if result.is_ok() { "" } else { "  failed" };
            let ms = micros as f64 / 1000.0;
            self.untold += &format!("  {:<10} {ms:>9.1} ms{mark}\n", phase.name());
            // A terminal may be slow, and the clients would wait for it.
            let in_pause = (Phase::Freeze..Phase::Release).contains(&phase);
            if !in_pause || result.is_err() {
                // Not eprint, which panics where there is no terminal any more.
                let untold = std::mem::take(&mut self.untold);
                let _ = write!(std::io::stderr(), "{untold}");
            }
        }
        result
    }

    /// The phases that have ended.
    pub(crate) fn took(&self) -> &[Took] {
        &self.took
    }

    /// Microseconds of one phase, the last time it ran; 0 when it did not run.
    pub(crate) fn micros(&self, phase: Phase) -> u64 {
        self.took.iter().rev().find(|t| t.phase == phase).map_or(0, |t| t.micros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_phase_is_timed_and_named() {
        let mut timeline = Timeline::default();
        let work = async { anyhow::bail!("no route") };
        let failure = timeline.run::<()>(Phase::Dump, work).await.unwrap_err();
        assert_eq!(failure.phase(), Phase::Dump);
        assert_eq!(timeline.took().len(), 1);
    }
}
