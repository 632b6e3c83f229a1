//! The phases of a migration: their names, their order and their deadlines.
//!
//! A library of its own, so that the fault tests are made from the same list: a new phase without
//! a fault test does not build.

use std::time::Duration;

use serde::Serialize;

/// The phases, in order. Fault tests are made from [`Phase::ALL`]: a new phase is killed in
/// before it can be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Reach both containerds, the shim and the agent.
    Connect,
    /// Describe both sides and refuse what cannot be moved.
    Plan,
    /// Send the image's blobs and unpack it.
    Image,
    /// Create container, snapshot and task.
    Container,
    /// Send the writable layer while the container runs.
    Layer,
    /// Copy the memory while the container runs.
    Precopy,
    /// Put the address there, silent.
    Address,
    /// Start dump and restore up to where they need the container frozen.
    Hold,
    /// Lock the connections and freeze.
    Freeze,
    /// Dump the frozen container.
    Dump,
    /// Send the images and what changed in the writable layer.
    Transfer,
    /// Restore, and hold.
    Restore,
    /// Record on the source that the destination shall run it.
    Commit,
    /// Let it run there.
    Release,
    /// End the frozen tasks here and remove what is left of the container.
    Retire,
    /// Make permanent what was created there.
    Finish,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 16] = [
        Self::Connect,
        Self::Plan,
        Self::Image,
        Self::Container,
        Self::Layer,
        Self::Precopy,
        Self::Address,
        Self::Hold,
        Self::Freeze,
        Self::Dump,
        Self::Transfer,
        Self::Restore,
        Self::Commit,
        Self::Release,
        Self::Retire,
        Self::Finish,
    ];

    /// Its name, as in reports and fault points.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Plan => "plan",
            Self::Image => "image",
            Self::Container => "container",
            Self::Layer => "layer",
            Self::Precopy => "precopy",
            Self::Address => "address",
            Self::Hold => "hold",
            Self::Freeze => "freeze",
            Self::Dump => "dump",
            Self::Transfer => "transfer",
            Self::Restore => "restore",
            Self::Commit => "commit",
            Self::Release => "release",
            Self::Retire => "retire",
            Self::Finish => "finish",
        }
    }

    /// How long it may take. What grows with the container's size is bounded by the streams, which
    /// must not stand still, and by the freeze's own limit.
    pub fn deadline(self) -> Duration {
        Duration::from_secs(match self {
            Self::Connect | Self::Plan | Self::Address | Self::Commit => 30,
            Self::Container | Self::Hold | Self::Release | Self::Retire | Self::Finish => 90,
            Self::Restore => 150,
            Self::Dump => 600,
            Self::Transfer => 1200,
            // The last rounds of the freeze send what a container that runs goes on writing.
            Self::Image | Self::Layer | Self::Freeze => 3600,
            // Its rounds have their own end.
            Self::Precopy => 24 * 3600,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_every_phase_once_and_in_order() {
        assert!(Phase::ALL.is_sorted());
        assert_eq!(Phase::ALL.last().map(|&p| p as usize), Some(Phase::ALL.len() - 1));
    }
}
