//! Locks that checkpoints with exit have left on their connections.

use std::path::{Path, PathBuf};

use ferry_oci::netns;
use ferry_oci::quarantine::connections::{self, Remaining};

use super::Findings;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lock {
    /// Its id.
    pub(super) id: String,
    /// The network namespace that it is in; `None` for the host's.
    pub(super) netns: Option<PathBuf>,
    /// What it still keeps silent.
    pub(super) remaining: Remaining,
}

impl Lock {
    /// Those of the host's network namespace and of the named ones.
    pub(super) fn everywhere() -> Vec<Self> {
        let all = netns::everywhere(here).into_iter();
        all.flat_map(|(path, locks)| within(path.as_deref(), locks)).collect()
    }

    /// What has to be known of it.
    pub(super) fn tell(&self, found: &mut Findings) {
        let Self { id, netns, remaining } = self;
        let (place, enter) = match netns {
            None => (String::new(), String::new()),
            Some(path) => (
                format!(" in the network namespace {}", path.display()),
                format!("nsenter --net={} ", path.display()),
            ),
        };
        let (what, cure) = match remaining.connections {
            0 => (
                format!("the lock of checkpoint {id}{place} has ended, its table is empty"),
                format!("none needed; {enter}nft delete table inet {}", connections::table(id)),
            ),
            count => (
                format!(
                    "{count} connections of checkpoint {id}{place} are kept silent for {} s more",
                    remaining.seconds
                ),
                "ferry restore REF brings them back, ferry discard REF gives them up".to_owned(),
            ),
        };
        found.note("checkpoint-lock", what, &cure);
    }
}

/// `locks` as those of the network namespace `netns`.
pub(super) fn within(netns: Option<&Path>, locks: Vec<(String, Remaining)>) -> Vec<Lock> {
    let lock = |(id, remaining)| Lock { id, netns: netns.map(Path::to_owned), remaining };
    locks.into_iter().map(lock).collect()
}

/// Ids of those in the calling thread's network namespace, and what they keep silent.
pub(super) fn here() -> Vec<(String, Remaining)> {
    let ids = connections::locked().unwrap_or_default();
    let remaining = |id: String| {
        let remaining = connections::remaining(&id).unwrap_or_default();
        (id, remaining)
    };
    ids.into_iter().map(remaining).collect()
}
