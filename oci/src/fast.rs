//! The fast paths of a migration: what keeps the pause short, and can be turned off.
//!
//! Behind each is a slow path that is just as correct. `ferry migrate --no-fast NAME` takes it, to
//! find a fault; it is also taken where a host lacks what the fast one needs. Plan and report say
//! which are on and which were really used.

use serde::{Deserialize, Serialize};

/// A fast path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fast {
    /// runc and CRIU are started for the dump before the freeze and wait; CRIU ends after the pause.
    HeldDump,
    /// runc and CRIU are started for the restore before the freeze and wait for the images; nothing
    /// waits for runc's return.
    HeldRestore,
    /// The freezer is written directly.
    Freezer,
    /// Connections are locked by rules that are prepared before the freeze, and not by CRIU.
    Lock,
    /// Packets for the address wait at the destination and are let through when the sockets are back.
    Queue,
    /// Images of memory cross while the dump still runs.
    Images,
    /// They cross as what has changed since their pages were read: see [`crate::pages::patch`].
    Patch,
    /// Programs and libraries that are read in the pause are read ahead: see [`crate::warm`].
    Warm,
    /// CRIU logs errors and warnings, and not every step.
    Log,
    /// Idle processors do not sleep in the pause.
    Awake,
    /// The kernel is ready for the breakpoints that CRIU sets: see [`crate::breakpoints`].
    Breakpoints,
    /// Cgroups are left to runc.
    Cgroups,
    /// Memory is hidden from CRIU's dump.
    Hide,
    /// File systems in memory are packed and unpacked before the freeze: see [`crate::tmpfs`].
    Tmpfs,
    /// A small `tar` of our own for the file systems in memory.
    Tar,
    /// runc and CRIU run inside the container's network namespace where that has a path, so that
    /// CRIU takes it for the host's and has nothing to do with it.
    Netns,
}

impl Fast {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::HeldDump,
        Self::HeldRestore,
        Self::Freezer,
        Self::Lock,
        Self::Queue,
        Self::Images,
        Self::Patch,
        Self::Warm,
        Self::Log,
        Self::Awake,
        Self::Breakpoints,
        Self::Cgroups,
        Self::Hide,
        Self::Tmpfs,
        Self::Tar,
        Self::Netns,
    ];

    /// Name, as given to `--no-fast`.
    pub fn name(self) -> &'static str {
        match self {
            Self::HeldDump => "held-dump",
            Self::HeldRestore => "held-restore",
            Self::Freezer => "freezer",
            Self::Lock => "lock",
            Self::Queue => "queue",
            Self::Images => "images",
            Self::Patch => "patch",
            Self::Warm => "warm",
            Self::Log => "log",
            Self::Awake => "awake",
            Self::Breakpoints => "breakpoints",
            Self::Cgroups => "cgroups",
            Self::Hide => "hide",
            Self::Tmpfs => "tmpfs",
            Self::Tar => "tar",
            Self::Netns => "netns",
        }
    }

    /// The fast path of that name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fast| fast.name() == name)
    }
}

/// The fast paths among `names`; unknown names are those of another version and not taken.
pub fn parse<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> Vec<Fast> {
    names.into_iter().filter_map(|name| Fast::of(name.as_ref())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fast_path_has_a_name_of_its_own() {
        for fast in Fast::ALL {
            assert_eq!(Fast::of(fast.name()), Some(fast));
            let json = serde_json::to_string(&fast).unwrap();
            assert_eq!(json, format!("\"{}\"", fast.name()));
        }
    }

    #[test]
    fn unknown_names_are_not_taken() {
        assert_eq!(parse(["cgroups", "teleport"]), [Fast::Cgroups]);
    }
}
