//! What a migration will do, or why it will not.

use serde::Serialize;

use crate::describe::checks::Blocker;
use crate::describe::container::ContainerFacts;
use crate::describe::fast::{Choice, taken};
use crate::describe::host::HostFacts;
use crate::describe::memory::{Carried, told};

/// The plan, shown before anything changes.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    /// Container id.
    pub(crate) container: String,
    /// Id of the migration.
    pub(crate) migration: String,
    /// How the memory will be moved.
    pub(crate) mode: &'static str,
    /// Why that is not what was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mode_why: Option<String>,
    /// The address that moves, or none.
    pub(crate) ip: Option<String>,
    /// The source.
    pub(crate) source: HostFacts,
    /// The destination.
    pub(crate) destination: HostFacts,
    /// The container.
    pub(crate) facts: ContainerFacts,
    /// Bytes of image blobs, at most.
    pub(crate) image_bytes: u64,
    /// Memory that CRIU carries in the pause, and what that costs.
    pub(crate) carried: Vec<Carried>,
    /// The fast paths, and why one is not taken.
    pub(crate) fast: Vec<Choice>,
    /// What stands in the way.
    pub(crate) blockers: Vec<Blocker>,
}

impl Plan {
    /// For a person.
    pub(crate) fn text(&self) -> String {
        let f = &self.facts;
        let connections = f.sockets.iter().filter(|s| s.connected).count();
        let mut text = format!(
            "{} ({}, {} processes, {} MiB resident, {connections} connections)\n  from {} (kernel {}, criu {}, runc {})\n  to   {} (kernel {}, criu {}, runc {})\n",
            self.container,
            f.image,
            f.processes,
            f.resident >> 20,
            self.source.hostname,
            self.source.kernel,
            self.source.criu.as_deref().unwrap_or("-"),
            self.source.runc.as_deref().unwrap_or("-"),
            self.destination.hostname,
            self.destination.kernel,
            self.destination.criu.as_deref().unwrap_or("-"),
            self.destination.runc.as_deref().unwrap_or("-"),
        );
        let address = self.ip.as_deref().unwrap_or("none");
        text += &format!("  mode {}, address {address}\n", self.mode);
        if let Some(why) = &self.mode_why {
            text += &format!("    {why}\n");
        }
        if !self.carried.is_empty() {
            text += &format!("  carried by CRIU in the pause: {}\n", told(&self.carried));
        }
        let on = taken(&self.fast).iter().map(|fast| fast.name()).collect::<Vec<_>>().join(", ");
        text += &format!("  fast paths: {}\n", if on.is_empty() { "none" } else { &on });
        for choice in &self.fast {
            if let Some(why) = &choice.off {
                text += &format!("    not {}: {why}\n", choice.name.name());
            }
        }
        if self.blockers.is_empty() {
            return text + "  nothing stands in the way\n";
        }
        text += "cannot be moved:\n";
        for blocker in &self.blockers {
            text +=
                &format!("  {}: {}\n      cure: {}\n", blocker.name, blocker.what, blocker.cure);
        }
        text
    }
}
