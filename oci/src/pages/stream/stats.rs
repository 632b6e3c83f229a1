//! What a round did, in numbers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One round of a page stream, as its sender saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundStats {
    /// Number of the round, from 1.
    pub round: u32,
    /// Whether the container was frozen.
    pub frozen: bool,
    /// Pages that were listed as written.
    pub listed: u64,
    /// Pages that were read.
    pub read: u64,
    /// Pages that had vanished when they were to be read; the next round knows of them.
    pub vanished: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages that the destination had at the same address.
    pub known: u64,
    /// Pages that it had elsewhere.
    pub same: u64,
    /// Pages sent as they were.
    pub raw: u64,
    /// Pages sent compressed.
    pub zstd: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// From begin to end.
    pub took: Duration,
    /// Time in which the link took no more.
    pub blocked: Duration,
    /// Time in which nothing was written because of the bandwidth that was set.
    pub limited: Duration,
    /// Rate of the link in bytes per second, as far as it was ever the bottleneck; `None` for the
    /// sender alone, see [`LinkRate`](crate::pages::rounds::LinkRate).
    pub link: Option<f64>,
    /// Stops of processes to track what is new in them; the tracker's, and 0 for the sender alone.
    pub stops: u32,
    /// Time that they took, summed over the processes.
    pub stopped: Duration,
}

impl RoundStats {
    /// Pages whose contents were sent.
    pub fn sent(&self) -> u64 {
        self.raw + self.zstd
    }

    /// Bytes of memory dealt with per second.
    pub fn memory_rate(&self) -> f64 {
        (self.read * crate::pages::PAGE) as f64 / self.took.as_secs_f64().max(1e-9)
    }

    /// Bytes of the stream per second.
    pub fn wire_rate(&self) -> f64 {
        self.bytes as f64 / self.took.as_secs_f64().max(1e-9)
    }

    /// Adds what another worker counted.
    pub(super) fn add(&mut self, other: &Self) {
        self.read += other.read;
        self.vanished += other.vanished;
        self.zero += other.zero;
        self.known += other.known;
        self.same += other.same;
        self.raw += other.raw;
        self.zstd += other.zstd;
    }
}
