//! What a migration cost.

use std::fmt::Write;

use ferry_oci::pages::stream::RoundStats;
use serde::Serialize;

use super::timeline::{Timeline, Took};
use crate::describe::fast::Choice;
use ferry_cli::phase::Phase;

/// The downtime, in parts. Microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Downtime {
    /// From the write to the freezer until everything stood still.
    pub(crate) freeze_us: u64,
    /// CRIU's dump.
    pub(crate) dump_us: u64,
    /// Images and changed files to the destination's memory.
    pub(crate) transfer_us: u64,
    /// Restore until held, the commit, and the release.
    pub(crate) restore_us: u64,
    /// Opening the address and announcing it.
    pub(crate) network_us: u64,
    /// From the write to the freezer until the address was announced.
    pub(crate) total_us: u64,
}

/// What was sent, by kind. Bytes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Bytes {
    /// Image blobs the destination lacked.
    pub(crate) image: u64,
    /// Writable layer, while the container ran.
    pub(crate) layer: u64,
    /// Writable layer, what changed meanwhile.
    pub(crate) layer_delta: u64,
    /// Checkpoint images, the memory in them.
    pub(crate) pages: u64,
    /// Checkpoint images, the rest.
    pub(crate) images: u64,
    /// Everything that crossed, messages included.
    pub(crate) total: u64,
}

/// What of the fast paths really happened.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Happened {
    /// Pages that an earlier attempt had left at the destination.
    pub(crate) reused_pages: u64,
    /// Rounds of memory, the frozen one last.
    pub(crate) rounds: Vec<RoundStats>,
    /// Scans of CRIU's from which memory was hidden.
    pub(crate) scans_hidden: u64,
    /// Scans for guard pages from which memory was hidden that has none.
    pub(crate) guard_scans_hidden: u64,
    /// Copies of smaps that CRIU was given.
    pub(crate) smaps_given: u64,
    /// Those that it read itself.
    pub(crate) smaps_real: u64,
    /// In the source's shim, from its order to dump until every image was complete. Microseconds.
    pub(crate) shim_dump_us: u64,
    /// In the destination's shim, from its order to restore until held. Microseconds.
    pub(crate) shim_restore_us: u64,
    /// Calls of `tar` in the dump that the fast one answered.
    pub(crate) fast_tar_calls: u64,
    /// Those that the real one had to.
    pub(crate) real_tar_calls: u64,
    /// File systems in memory that the dump left out.
    pub(crate) tmpfs: u64,
    /// Those of them that had changed when it was frozen.
    pub(crate) tmpfs_again: u64,
    /// Whether CRIU was told to lock the connections, besides the lock on the address.
    pub(crate) criu_lock: bool,
    /// Images that crossed while the dump still ran.
    pub(crate) early_images: usize,
    /// Bytes of images of memory that crossed as patches, and how long those were.
    pub(crate) patched_bytes: u64,
    /// See there.
    pub(crate) patch_bytes: u64,
    /// Whether packets for the address waited at the destination; if not they were dropped.
    pub(crate) packets_queued: bool,
    /// How many had waited.
    pub(crate) packets_held: u64,
}

/// A finished migration.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Container id.
    pub(crate) container: String,
    /// Id of the migration.
    pub(crate) migration: String,
    /// Name of the host it left.
    pub(crate) source: String,
    /// Name of the host it is on.
    pub(crate) destination: String,
    /// How the memory was moved.
    pub(crate) mode: &'static str,
    /// Where the output of the container is now, if anywhere.
    pub(crate) stdout: String,
    /// Resident memory when the plan was made, bytes.
    pub(crate) resident: u64,
    /// The downtime.
    pub(crate) downtime: Downtime,
    /// From the command's start to its end.
    pub(crate) total_us: u64,
    /// What was sent.
    pub(crate) bytes: Bytes,
    /// The fast paths, and why one was not taken.
    pub(crate) fast: Vec<Choice>,
    /// What of them really happened.
    pub(crate) happened: Happened,
    /// Every phase.
    pub(crate) phases: Vec<Took>,
    /// What was left to do and could not be done, empty as a rule.
    pub(crate) warnings: Vec<String>,
}

impl Report {
    /// For a person.
    pub(crate) fn table(&self) -> String {
        let d = &self.downtime;
        let b = &self.bytes;
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{} runs on {} (was on {}), {} MiB resident, mode {}",
            self.container,
            self.destination,
            self.source,
            self.resident >> 20,
            self.mode
        );
        let _ = writeln!(
            text,
            "downtime {:.1} ms: freeze {:.1}, dump {:.1}, transfer {:.1}, restore {:.1}, \
             network {:.1}; total {:.2} s",
            ms(d.total_us),
            ms(d.freeze_us),
            ms(d.dump_us),
            ms(d.transfer_us),
            ms(d.restore_us),
            ms(d.network_us),
            ms(self.total_us) / 1000.0
        );
        let _ = writeln!(
            text,
            "sent {}: image {}, layer {} (in the freeze {}), pages {}, other images {}",
            size(b.total),
            size(b.image),
            size(b.layer),
            size(b.layer_delta),
            size(b.pages),
            size(b.images)
        );
        if let Some((last, before)) = self.happened.rounds.split_last() {
            let _ = writeln!(
                text,
                "memory: {} rounds, {} while it ran, {} pages in the freeze{}",
                before.len() + 1,
                size(before.iter().map(|round| round.bytes).sum()),
                last.listed,
                match self.happened.reused_pages {
                    0 => String::new(),
                    pages => format!(", {pages} pages were there from an earlier attempt"),
                }
            );
        }
        if !self.stdout.is_empty() {
            let _ = writeln!(text, "output goes on in {} on {}", self.stdout, self.destination);
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "warning: {warning}");
        }
        text
    }
}

/// Sums the phases of `timeline` into a downtime. `measured` is the time by the wall.
pub(crate) fn downtime(
    timeline: &Timeline,
    freeze_us: u64,
    release_us: u64,
    network_us: u64,
    measured: u64,
) -> Downtime {
    Downtime {
        freeze_us,
        dump_us: timeline.micros(Phase::Dump),
        transfer_us: timeline.micros(Phase::Transfer),
        restore_us: timeline.micros(Phase::Restore) + timeline.micros(Phase::Commit) + release_us,
        network_us,
        total_us: measured,
    }
}

fn ms(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

fn size(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        1..=1023 => format!("{bytes} B"),
        1024..=1_048_575 => format!("{} KiB", bytes >> 10),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(2048), "2 KiB");
        assert_eq!(size(3 << 20), "3.0 MiB");
    }
}
