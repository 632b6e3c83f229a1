//! Places where a test may have the worker killed. In a product they are nothing.

use super::shared::Shared;

/// Such a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// Messages were read, a fault among them; nothing else has been done.
    ReadFault,
    /// Messages were read, a fork among them.
    ReadFork,
    /// Messages were read, a move among them.
    ReadRemap,
    /// Messages were read, a drop of content among them.
    ReadRemove,
    /// Messages were read, an unmapping among them.
    ReadUnmap,
    /// A forked child is known to the next worker; its parent's record does not say so yet.
    ForkPublished,
    /// One record has been replayed by a new worker.
    Replayed,
    /// A log has been rewritten, and is not yet the one that counts.
    Compacted,
    /// A page was filled and is not marked.
    Copied,
    /// The pages of a chunk are marked and not given back.
    Marked,
    /// A chunk is said to be given back and is not.
    Freed,
    /// A descriptor is about to be closed.
    Closing,
}

/// Ends this process if a test asked for it here.
pub(super) fn hit(shared: &Shared, point: Point) {
    #[cfg(any(test, feature = "fault-points"))]
    {
        use super::shared::Word;
        use std::sync::atomic::Ordering::SeqCst;
        let word = shared.word(Word::Point);
        if word.load(SeqCst) != point as u64 + 1 {
            return;
        }
        // So many passes first, then so many kills.
        let skip = shared.word(Word::PointAfter);
        if skip.load(SeqCst) > 0 {
            skip.fetch_sub(1, SeqCst);
            return;
        }
        let times = shared.word(Word::PointTimes);
        if times.fetch_sub(1, SeqCst) == 1 {
            word.store(0, SeqCst);
        }
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL);
    }
    #[cfg(not(any(test, feature = "fault-points")))]
    let _ = (shared, point);
}
