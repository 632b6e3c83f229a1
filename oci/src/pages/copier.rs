//! A round of a container's memory: what the tracker lists, as a stream.

use std::io::{self, Write};

use super::stream::{Change, Options, Processes, RoundStats, SendError, Sender};
use super::tracker::{TrackError, Tracker};

/// Why a round was not made. Nothing more can be copied after it.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Memory could not be tracked.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Memory could not be read or sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The stream could not be written.
    #[error("write the stream of pages")]
    Io(#[from] io::Error),
}

/// A tracker, and a sender that knows what the receiver has.
pub struct Copier {
    /// Which pages have changed.
    pub tracker: Tracker,
    /// What becomes of them.
    pub sender: Sender,
    processes: Processes,
}

impl Copier {
    /// Nothing has been copied yet.
    pub fn new(tracker: Tracker, options: Options) -> Self {
        Self { tracker, sender: Sender::new(options), processes: Processes::default() }
    }

    /// Writes what has changed since the last round to `out`; with `frozen` the processes cannot run.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub fn round(
        &mut self,
        frozen: bool,
        out: &mut (dyn Write + Send),
    ) -> Result<RoundStats, CopyError> {
        let round = self.tracker.round(frozen)?;
        let changes: Vec<_> = round.processes.iter().map(Change::from).collect();
        let mut stats = self.sender.round(frozen, &changes, &self.processes, out)?;
        (stats.stops, stats.stopped) = (round.stops.count, round.stops.time);
        for (pid, range) in self.sender.vanished() {
            self.tracker.again(*pid, std::slice::from_ref(range));
        }
        out.flush()?;
        Ok(stats)
    }
}
