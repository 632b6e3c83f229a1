//! The memory of one process, from round to round.
//!
//! The tracker knows which pages the store holds: those that it has listed (`present`). From what it
//! finds in a round it derives what is to be read and what is to be forgotten, so that no history of
//! the process can lead the two apart: a page that is there and not known is to be read, whatever
//! the kernel says of writes to it.
//!
//! A round beside the running process asks the kernel for every page that exists, and protects what
//! was written in the same step. In the frozen round time counts, so it asks only for what is not
//! protected, and looks closer there:
//!
//! ```text
//!   known pages        ██████████████████████████████
//!   not protected        ▒▒   ▒        ▒▒▒              written, or vanished: look at each
//!   no page table                  ░░░░                 the same; one probe for every 2 MB where
//!                                                       the kernel does not list these
//!   unchanged          ██  ███ ████        ██████████
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::probe::lists_missing_tables;
use super::process::{Facts, reads_directly};
use super::ranges::Ranges;
use super::registration::Registration;
use super::{Changes, Kind};
use crate::pages::PAGE;
use crate::pages::areas::{Area, Layout, read_maps};
use crate::pages::scan::{self, Mode, Pagemap, Region};

/// What one page table covers, bytes.
const TABLE: u64 = 512 * PAGE;

/// Ranges that lie no further apart are looked at in one call. Bytes: to walk over so many pages costs
/// what a call costs.
const GAP: u64 = 128 * PAGE;

/// One tracked process.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) pid: i32,
    pub(super) space: u32,
    /// The process with which this one shares its memory.
    pub(super) shares: Option<i32>,
    pub(super) layout: Arc<Layout>,
    pub(super) registration: Registration,
    pidfd: OwnedFd,
    /// Pages that were listed and not taken back.
    present: Ranges,
    /// To be listed once more: what could not be read, and, where devices write to memory, what the
    /// last round found written.
    owed: Ranges,
    locked: u64,
    /// Guard pages in hideable areas, as the frozen round has found them.
    pub(super) guards: Ranges,
}

/// What a round found, before it is compared with what was known.
#[derive(Default)]
struct Found {
    present: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
    guards: Vec<Range<u64>>,
}

impl Found {
    fn add(&mut self, regions: impl IntoIterator<Item = Region>) {
        for region in regions {
            if region.written {
                self.written.push(region.range.clone());
            }
            self.present.push(region.range);
        }
    }

    fn add_all_as_written(&mut self, regions: impl IntoIterator<Item = Region>) {
        self.add(regions.into_iter().map(|r| Region { written: true, ..r }));
    }
}

impl Space {
    pub(super) fn new(pid: i32) -> io::Result<Self> {
        let process = Pid::from_raw(pid).ok_or_else(|| io::Error::other("no process number"))?;
        let pidfd = pidfd_open(process, PidfdFlags::empty())?;
        Ok(Self {
            pid,
            space: Facts::read(pid)?.space,
            shares: None,
            layout: Arc::default(),
            registration: Registration::new(pid),
            pidfd,
            present: Ranges::default(),
            owed: Ranges::default(),
            locked: 0,
            guards: Ranges::default(),
        })
    }

    /// Whether the process has ended, even if another has its number by now.
    pub(super) fn ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// What is listed when it has ended.
    pub(super) fn farewell(self) -> Changes {
        Changes {
            absent: self.present.into_vec(),
            exited: true,
            ..Changes::none(self.pid, self.space)
        }
    }

    /// Has `ranges` listed again, if there is something. They stay known: the store may have them from
    /// an earlier round.
    pub(super) fn owe(&mut self, ranges: &[Range<u64>]) {
        self.owed = self.owed.union(&Ranges::of(ranges.to_vec()));
    }

    /// How much is known to exist, bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.present.bytes()
    }

    /// Whether the areas are those of the last round.
    pub(super) fn same_areas(&self, text: &mut Vec<u8>) -> io::Result<bool> {
        read_maps(self.pid, text)?;
        Ok(*text == self.layout.maps && Facts::read(self.pid)?.locked == self.locked)
    }

    /// A round beside the running process. `known` are the userfaultfds of all processes, `relatives`
    /// the processes that share the memory of this one.
    pub(super) fn live(
        &mut self,
        kind: Kind,
        known: &[BorrowedFd<'_>],
        relatives: &[i32],
    ) -> io::Result<Changes> {
        let facts = Facts::read(self.pid)?;
        if kind == Kind::WriteProtect {
            self.registration.update(facts.image, known, relatives)?;
        }
        let changed = self.refresh(&facts, kind)?;
        let pagemap = Pagemap::open(self.pid)?;
        let mut found = Found::default();
        let layout = self.layout.clone();
        for area in layout.areas.iter().filter(|a| a.hideable()) {
            if self.registration.tracks(&area.range()) {
                found.add(self.registration.protect(&pagemap, area)?);
            } else {
                look(kind, &pagemap, area, &mut found)?;
            }
        }
        let direct = kind != Kind::None && (has_aio(&layout) || reads_directly(self.pid));
        let echo = if direct { Ranges::of(found.written.clone()) } else { Ranges::default() };
        let changes = self.compare(found, changed);
        self.owed = echo;
        Ok(changes)
    }

    /// A round while the process cannot run: nothing is protected and nothing is injected.
    pub(super) fn frozen(&mut self, kind: Kind) -> io::Result<Changes> {
        let facts = Facts::read(self.pid)?;
        let changed = self.refresh(&facts, kind)?;
        let pagemap = Pagemap::open(self.pid)?;
        let mut found = Found::default();
        let layout = self.layout.clone();
        let (mut runs, mut doubt) = (Ranges::default(), Ranges::default());
        let (tracked, others): (Vec<_>, Vec<_>) = layout
            .areas
            .iter()
            .filter(|a| a.hideable())
            .partition(|a| self.registration.tracks(&a.range()));
        for run in crate::pages::areas::join(tracked.into_iter()) {
            let mut ranges = Vec::new();
            match pagemap.unprotected(run.clone(), &mut ranges) {
                Ok(()) => {
                    ranges.into_iter().for_each(|r| doubt.push(r));
                    runs.push(run);
                }
                // Part of it is not what was registered: so every page is looked at.
                Err(error) if is_eperm(&error) => {
                    let mut regions = Vec::new();
                    look_for_guards(&pagemap, run.clone(), &mut found)?;
                    pagemap.present(run, Mode::Look, &mut regions)?;
                    found.add(regions);
                }
                Err(error) => return Err(error),
            }
        }
        for area in others {
            look_for_guards(&pagemap, area.range(), &mut found)?;
            look(kind, &pagemap, area, &mut found)?;
        }
        self.settle(&pagemap, &runs, doubt, &mut found)?;
        self.guards = Ranges::of(std::mem::take(&mut found.guards));
        Ok(self.compare(found, changed))
    }

    /// Finds out what is true of the known pages of `runs`, of which `doubt` are not protected.
    fn settle(
        &self,
        pagemap: &Pagemap,
        runs: &Ranges,
        doubt: Ranges,
        found: &mut Found,
    ) -> io::Result<()> {
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(doubt.as_slice().len());
        for range in doubt.as_slice() {
            match joined.last_mut() {
                Some(last) if range.start - last.end <= GAP => last.end = range.end,
                _ => joined.push(range.clone()),
            }
        }
        let doubt = Ranges::of(joined).intersection(runs);
        let known = self.present.intersection(runs).difference(&doubt);
        let vanished = if lists_missing_tables() {
            Ranges::default()
        } else {
            vanished(&known, |page| pagemap.exists(page))?
        };
        let vanished = vanished.intersection(runs);
        let mut regions = Vec::new();
        for range in doubt.union(&vanished).as_slice() {
            // None of them is ever protected.
            look_for_guards(pagemap, range.clone(), found)?;
            pagemap.present(range.clone(), Mode::Look, &mut regions)?;
        }
        found.add(regions);
        found.present.extend(known.difference(&vanished).into_vec());
        Ok(())
    }

    /// Says what has changed, and remembers it.
    fn compare(&mut self, found: Found, areas_changed: bool) -> Changes {
        let present = Ranges::of(found.present);
        let unknown = present.difference(&self.present);
        let owed = std::mem::take(&mut self.owed).intersection(&present);
        let written = Ranges::of(found.written).union(&unknown).union(&owed);
        let absent = self.present.difference(&present);
        self.present = present;
        Changes {
            written: written.into_vec(),
            absent: absent.into_vec(),
            areas_changed,
            untracked: self.registration.untracked.clone(),
            ..Changes::none(self.pid, self.space)
        }
    }

    /// Reads the areas if they may differ from those of the last round.
    fn refresh(&mut self, facts: &Facts, kind: Kind) -> io::Result<bool> {
        let mut text = Vec::new();
        read_maps(self.pid, &mut text)?;
        let changed = text != self.layout.maps || facts.locked != self.locked;
        if changed || by_words(kind) {
            self.layout = Arc::new(Layout::read(self.pid)?);
            self.locked = facts.locked;
        }
        Ok(changed)
    }
}

/// The page tables that cover pages of `known` and are gone. A page that vanished while its table
/// stayed is not among `known`, so the first page of each table stands for the others.
fn vanished(known: &Ranges, mut exists: impl FnMut(u64) -> io::Result<bool>) -> io::Result<Ranges> {
    let mut vanished = Ranges::default();
    let mut probed = u64::MAX;
    for range in known.as_slice() {
        for table in range.start / TABLE..range.end.div_ceil(TABLE) {
            let first = range.start.max(table * TABLE);
            if table != probed && !exists(first)? {
                vanished.push(table * TABLE..(table + 1) * TABLE);
            }
            probed = table;
        }
    }
    Ok(vanished)
}

/// Whether the kernel has to be asked for every single page.
fn by_words(kind: Kind) -> bool {
    kind == Kind::SoftDirty || !scan::available()
}

fn look_for_guards(pagemap: &Pagemap, range: Range<u64>, found: &mut Found) -> io::Result<()> {
    if scan::lists_guards() { pagemap.guards(range, &mut found.guards) } else { Ok(()) }
}

/// Lists the pages of an area without changing anything.
fn look(kind: Kind, pagemap: &Pagemap, area: &Area, found: &mut Found) -> io::Result<()> {
    let mut regions = Vec::new();
    if !by_words(kind) {
        pagemap.present(area.range(), Mode::Look, &mut regions)?;
    } else if area.rss + area.swap > 0 {
        pagemap.present_by_words(area.range(), &mut regions)?;
    }
    if kind == Kind::SoftDirty {
        found.add(regions);
    } else {
        found.add_all_as_written(regions);
    }
    Ok(())
}

/// Whether the kernel completes reads of the process by itself (io_submit(2)).
fn has_aio(layout: &Layout) -> bool {
    layout.areas.iter().any(|a| a.name.starts_with(b"/[aio]"))
}

fn is_eperm(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_table_is_probed_once_and_missed_as_a_whole() {
        // Of the second table nothing is known, the third and the fifth are gone.
        let page = |table: u64, page: u64| table * TABLE + page * PAGE;
        let known = Ranges::of(vec![
            page(0, 3)..page(0, 5),
            page(0, 9)..page(1, 0),
            page(2, 511)..page(4, 1),
            page(4, 7)..page(4, 8),
        ]);
        let mut probed = Vec::new();
        let gone = vanished(&known, |address| {
            probed.push(address);
            Ok(![2, 4].contains(&(address / TABLE)))
        });
        assert_eq!(probed, [page(0, 3), page(2, 511), page(3, 0), page(4, 0)]);
        let expected = [page(2, 0)..page(3, 0), page(4, 0)..page(5, 0)];
        assert_eq!(gone.unwrap().as_slice(), expected);
    }
}
