//! Which pages of a container have changed, round by round, while it runs.
//!
//! ```text
//!   attach ─▶ round ─▶ round ─▶ … ─▶ (freeze) check_areas ─▶ round(frozen)
//!             all      changed                                what is left
//! ```
//!
//! The reader of the rounds keeps a store: it reads the pages of `written` into it and removes those
//! of `absent`. When it has done so for every round and for the frozen one, the store holds exactly
//! the pages that exist in the [hideable](super::areas::Area::hideable) areas of every process, with
//! their contents. Pages are read after the round that lists them: a write that comes between is
//! noted, and listed by the next round.
//!
//! Processes come and go meanwhile, map, unmap and move memory, fork and exec. Nothing of that has to
//! be told: what is not known to be tracked counts as written.
//!
//! # Limits
//! - Writes by devices (reads that bypass the page cache, asynchronous ones above all) go past the page
//!   tables. For a process that may do such reads every page is listed a second time in the round
//!   after the one that found it written, so a read must take longer than a round to be missed.
//! - khugepaged fills holes with zeros whenever it likes, in frozen processes as well. A page of zeros
//!   that is not in the store is as good as one that does not exist.
//! - The kernel does not join what a program maps to a neighbour that is tracked. A program that maps
//!   twice, side by side, and then has both moved by a single mremap(2), which counts on their having
//!   been joined, is refused until the next round. (Linux 6.17 and newer moves several mappings by one
//!   call, but not tracked ones.)
//! - Processes that share their memory are listed only in the frozen round, except for the first of
//!   them: one between vfork(2) and exec(2) would otherwise be copied whole.

mod probe;
mod process;
pub(super) mod ranges;
mod registration;
mod space;
#[cfg(test)]
mod tests;
mod uffd;
#[cfg(test)]
pub(super) mod workload;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::PAGE;
use super::areas::{Carried, Layout};
pub use probe::{Probe, probe};
use space::Space;

/// How writes are noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// By asynchronous write protection (userfaultfd WP_ASYNC and PAGEMAP_SCAN, kernel 6.7).
    WriteProtect,
    /// By soft-dirty bits. Reading and clearing them are two steps, so the processes must not run
    /// during a round, also when it is not the last.
    SoftDirty,
    /// Not at all: every round lists everything.
    None,
}

/// Why a round could not be made. The tracker is of no use after it.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The processes of the container could not be listed.
    #[error("list the processes of the container")]
    Processes(#[source] io::Error),
    /// The kernel lacks what is needed.
    #[error("writes cannot be tracked: {0}")]
    Unsupported(String),
    /// A process could not be looked into.
    #[error("look into the memory of process {pid}")]
    Process {
        /// Its number on this host.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What has changed since the last round.
#[derive(Debug, Clone, Default)]
pub struct Round {
    /// By process. Those that ended come first, for their number may have been given to another.
    pub processes: Vec<Changes>,
    /// How long it took.
    pub took: Duration,
    /// How many pages are to be read.
    pub pages: u64,
    /// How much exists in all hideable areas, bytes.
    pub present: u64,
    /// For how long processes were stopped.
    pub stops: Stops,
}

/// How often processes were stopped: once to attach to each, and once in a round in which one has areas
/// that are not tracked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stops {
    /// Processes times stops of each.
    pub count: u32,
    /// Sum of the times from the first thread's stop to the last one's release.
    pub time: Duration,
}

impl Stops {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time += time;
    }
}

/// What has changed in one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Process number on this host.
    pub pid: i32,
    /// Process number in the innermost namespace: the one CRIU knows it by.
    pub space: u32,
    /// Pages to be read, ascending: in memory or swapped.
    pub written: Vec<Range<u64>>,
    /// Pages to be forgotten, ascending: unmapped, dropped, no longer hideable, or the zero page now.
    pub absent: Vec<Range<u64>>,
    /// It is gone, and all that is known of it is to be forgotten.
    pub exited: bool,
    /// Its areas differ from those of the last round.
    pub areas_changed: bool,
    /// Why writes of it are not noted, so that everything is listed; none when they are.
    pub untracked: Option<String>,
}

impl Changes {
    fn none(pid: i32, space: u32) -> Self {
        Self {
            pid,
            space,
            written: Vec::new(),
            absent: Vec::new(),
            exited: false,
            areas_changed: false,
            untracked: None,
        }
    }
}

/// Whether the areas are those of the last round.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AreasCheck {
    /// Processes that are new, gone or have other areas. Numbers on this host.
    pub changed: Vec<i32>,
    /// How long it took.
    pub took: Duration,
}

impl AreasCheck {
    /// Whether nothing has changed.
    pub fn unchanged(&self) -> bool {
        self.changed.is_empty()
    }
}

/// The areas of one process as of the last round.
#[derive(Debug, Clone)]
pub struct ProcessLayout {
    /// Process number on this host.
    pub pid: i32,
    /// Process number in the innermost namespace.
    pub space: u32,
    /// Areas and texts.
    pub layout: Arc<Layout>,
}

type Processes = Box<dyn Fn() -> io::Result<Vec<i32>> + Send>;

/// Tracks the writes of the processes of one container. Dropping it takes all tracking back, which
/// holds up their memory management for about 12 ms for a GB.
pub struct Tracker {
    kind: Kind,
    processes: Processes,
    spaces: BTreeMap<i32, Space>,
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("kind", &self.kind)
            .field("spaces", &self.spaces)
            .finish_non_exhaustive()
    }
}

impl Tracker {
    /// Begins to track the processes that `processes` lists (numbers on this host). It is asked again
    /// in every round. The processes are attached to in the first round.
    ///
    /// # Errors
    /// When the kernel cannot do what `kind` says, or the processes cannot be listed.
    pub fn attach(
        kind: Kind,
        processes: impl Fn() -> io::Result<Vec<i32>> + Send + 'static,
    ) -> Result<Self, TrackError> {
        let found = probe();
        match kind {
            Kind::WriteProtect if !found.write_protect => {
                return Err(TrackError::Unsupported(found.write_protect_why));
            }
            Kind::SoftDirty if !found.soft_dirty => {
                return Err(TrackError::Unsupported(found.soft_dirty_why));
            }
            _ => {}
        }
        processes().map_err(TrackError::Processes)?;
        Ok(Self { kind, processes: Box::new(processes), spaces: BTreeMap::new() })
    }

    /// How writes are noted.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Lists what has changed since the last round; the first one lists everything. A process that is
    /// met for the first time is stopped for about 0.1 ms, and one that has new areas for about 0.15 ms
    /// and 20 us more for each of its threads: [`Round::stops`].
    ///
    /// With `frozen` the processes must not be able to run until the pages have been read. Nothing in
    /// them is changed then, and what was not tracked is listed whole.
    ///
    /// # Errors
    /// When a process can be neither looked into nor is gone. What was noted is lost then: begin anew.
    pub fn round(&mut self, frozen: bool) -> Result<Round, TrackError> {
        let begin = Instant::now();
        let mut round = Round::default();
        self.meet(frozen, &mut round.processes)?;
        let uffds: Vec<_> =
            self.spaces.values().filter_map(|s| s.registration.uffd.clone()).collect();
        let known: Vec<_> = uffds.iter().map(|u| u.as_fd()).collect();
        let sharing: Vec<_> = self.spaces.values().map(|s| (s.pid, s.shares)).collect();
        let mut gone = Vec::new();
        for space in self.spaces.values_mut() {
            let changes = match (frozen, space.shares) {
                (true, _) => space.frozen(self.kind),
                (false, None) => {
                    let relatives = sharing.iter().filter(|(_, with)| *with == Some(space.pid));
                    let relatives: Vec<_> = relatives.map(|(pid, _)| *pid).collect();
                    space.live(self.kind, &known, &relatives)
                }
                (false, Some(_)) => continue,
            };
            let stops = space.registration.take_stops();
            round.stops.count += stops.count;
            round.stops.time += stops.time;
            match changes {
                Ok(changes) => round.processes.push(changes),
                Err(error) if is_gone(&error) || space.ended() => gone.push(space.pid),
                Err(source) => return Err(TrackError::Process { pid: space.pid, source }),
            }
        }
        if self.kind == Kind::SoftDirty && !frozen {
            self.clear_soft_dirty()?;
        }
        for pid in gone {
            round.processes.extend(self.spaces.remove(&pid).map(Space::farewell));
        }
        round.processes.sort_by_key(|c| !c.exited);
        let bytes = |c: &Changes| c.written.iter().map(|r| r.end - r.start).sum::<u64>();
        round.pages = round.processes.iter().map(bytes).sum::<u64>() / PAGE;
        round.present = self.spaces.values().map(Space::bytes).sum();
        round.took = begin.elapsed();
        Ok(round)
    }

    /// Whether the processes and their areas are those of the last round. Takes 0.1 ms for a process
    /// with few areas. To be called just after the freeze, before the frozen round.
    ///
    /// # Errors
    /// When a process can be neither looked into nor is gone.
    pub fn check_areas(&self) -> Result<AreasCheck, TrackError> {
        let begin = Instant::now();
        let mut check = AreasCheck::default();
        let pids = (self.processes)().map_err(TrackError::Processes)?;
        check.changed.extend(pids.iter().filter(|p| !self.spaces.contains_key(p)));
        let mut text = Vec::new();
        for space in self.spaces.values() {
            let same = pids.contains(&space.pid) && !space.ended();
            match same.then(|| space.same_areas(&mut text)) {
                Some(Ok(true)) => {}
                None | Some(Ok(false)) => check.changed.push(space.pid),
                Some(Err(error)) if is_gone(&error) => check.changed.push(space.pid),
                Some(Err(source)) => return Err(TrackError::Process { pid: space.pid, source }),
            }
        }
        check.took = begin.elapsed();
        Ok(check)
    }

    /// Guard pages in the hideable areas of every process, by pid, as of the frozen round; nothing where the
    /// kernel cannot [list them](super::scan::lists_guards).
    pub fn guards(&self) -> impl Iterator<Item = (i32, &[Range<u64>])> {
        self.spaces.values().map(|space| (space.pid, space.guards.as_slice()))
    }

    /// The areas of every process as of the last round.
    pub fn layouts(&self) -> Vec<ProcessLayout> {
        let layout =
            |s: &Space| ProcessLayout { pid: s.pid, space: s.space, layout: s.layout.clone() };
        self.spaces.values().map(layout).collect()
    }

    /// What CRIU still carries, as of the last round.
    pub fn carried(&self) -> Carried {
        Carried::of(self.spaces.values().map(|s| s.layout.areas.as_slice()))
    }

    /// Has the next round list `ranges` of process `pid` again, as far as they exist then: for pages
    /// that could not be read or did not arrive.
    pub fn again(&mut self, pid: i32, ranges: &[Range<u64>]) {
        if let Some(space) = self.spaces.get_mut(&pid) {
            space.owe(ranges);
        }
    }

    /// Takes leave of the processes that have ended and takes in those that are new.
    fn meet(&mut self, frozen: bool, changes: &mut Vec<Changes>) -> Result<(), TrackError> {
        let pids = (self.processes)().map_err(TrackError::Processes)?;
        let left = |s: &Space| !pids.contains(&s.pid) || s.ended();
        let ended: Vec<_> = self.spaces.values().filter(|s| left(s)).map(|s| s.pid).collect();
        for pid in ended {
            changes.extend(self.spaces.remove(&pid).map(Space::farewell));
        }
        for pid in pids {
            if self.spaces.contains_key(&pid) {
                continue;
            }
            match Space::new(pid) {
                // What waits for its parent to hear of its end has no memory any more.
                Ok(space) if space.ended() => {}
                Ok(space) => drop(self.spaces.insert(pid, space)),
                Err(error) if is_gone(&error) => {}
                Err(source) => return Err(TrackError::Process { pid, source }),
            }
        }
        if !frozen && self.kind == Kind::WriteProtect {
            self.find_shared();
        }
        Ok(())
    }

    /// Finds the processes that share their memory with one that comes before them.
    fn find_shared(&mut self) {
        let mut first: Vec<i32> = Vec::new();
        // Who has been tracked stays the one that is.
        let (old, new): (Vec<_>, Vec<_>) = self
            .spaces
            .values()
            .map(|s| (s.pid, s.registration.uffd.is_some()))
            .partition(|(_, tracked)| *tracked);
        for (pid, tracked) in old.into_iter().chain(new) {
            let shares = match tracked {
                true => None,
                false => first.iter().copied().find(|f| process::same_memory(*f, pid)),
            };
            if shares.is_none() {
                first.push(pid);
            }
            if let Some(space) = self.spaces.get_mut(&pid) {
                space.shares = shares;
            }
        }
    }

    fn clear_soft_dirty(&self) -> Result<(), TrackError> {
        for space in self.spaces.values() {
            match fs::write(format!("/proc/{}/clear_refs", space.pid), "4") {
                Err(error) if !is_gone(&error) => {
                    return Err(TrackError::Process { pid: space.pid, source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Whether an error says that the process has ended.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
