//! Where writes of one process are noted: its userfaultfd, and which areas are registered with it.
//!
//! An area that is registered is another kind of mapping to the kernel than one that is not, and it
//! moves (mremap(2)) only what is one mapping. So a part is never registered of what the program sees
//! as a whole: whole mappings are, while no thread of the process can change them.
//!
//! ```text
//!   look ─▶ nothing new: no stop
//!     └───▶ stop all threads ─▶ look again, where it has changed ─▶ register ─▶ let go
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Stops;
use super::process::Image;
use super::ranges::Ranges;
use super::uffd::Uffd;
use crate::pages::areas::{Area, parse_maps, read_maps};
use crate::pages::inject::{take_userfaultfd, while_standing};
use crate::pages::scan::{Mode, Pagemap, Region};

/// How often a process that cannot be attached to is tried.
const ATTEMPTS: u32 = 5;

/// The registration of one process.
#[derive(Debug)]
pub(super) struct Registration {
    pid: i32,
    pub(super) uffd: Option<Arc<Uffd>>,
    image: Option<Image>,
    /// Where writes are noted, as far as is known: the process may have mapped anew since.
    covered: Ranges,
    /// Registered, and not yet known to be without marks of an earlier time.
    fresh: Ranges,
    /// What the kernel does not register, as it was when it said so.
    refused: Vec<Range<u64>>,
    attempts: u32,
    /// Why nothing is noted; none when something is.
    pub(super) untracked: Option<String>,
    /// Stops of the process that were not asked for yet.
    stops: Stops,
}

/// What a look at the areas has shown.
#[derive(Debug, Default)]
struct Look {
    /// Text of `/proc/PID/maps`.
    text: Vec<u8>,
    /// Every area that may be registered.
    candidates: Vec<Range<u64>>,
    /// Those that are.
    registered: Vec<Range<u64>>,
    /// Those that are not, and were not refused.
    missing: Vec<Range<u64>>,
}

/// What came of registering.
#[derive(Debug, Default)]
struct Done {
    look: Look,
    registered: Vec<Range<u64>>,
    refused: Vec<Range<u64>>,
    /// The memory of the userfaultfd is no more.
    gone: bool,
}

impl Registration {
    pub(super) fn new(pid: i32) -> Self {
        Self {
            pid,
            uffd: None,
            image: None,
            covered: Ranges::default(),
            fresh: Ranges::default(),
            refused: Vec::new(),
            attempts: 0,
            untracked: None,
            stops: Stops::default(),
        }
    }

    /// Has writes to all areas noted that can be, of the memory `image`. `known` are the userfaultfds of
    /// all processes, `relatives` the processes that share this memory.
    ///
    /// Neighbours that become equal by it are joined by the kernel, so this comes before the areas are
    /// read.
    pub(super) fn update(
        &mut self,
        image: Image,
        known: &[BorrowedFd<'_>],
        relatives: &[i32],
    ) -> io::Result<()> {
        self.attach(image, known);
        let Some(uffd) = self.uffd.clone() else { return Ok(()) };
        let look = self.look()?;
        self.refused.retain(|range| look.candidates.contains(range));
        if look.missing.is_empty() {
            self.covered = Ranges::of(look.registered);
            return Ok(());
        }
        let mut stops = self.stops;
        let registered = while_standing(
            self.pid,
            relatives,
            |time| stops.add(time),
            || self.register(&uffd, look),
        );
        self.stops = stops;
        match registered {
            Ok(done) => {
                self.take(done?);
                self.untracked = None;
            }
            // What is new counts as written; the next round tries again.
            Err(error) => {
                log::debug!("new areas of process {} are not tracked yet: {error}", self.pid);
                let look = self.look()?;
                if look.registered.is_empty() {
                    self.untracked = Some(error.to_string());
                }
                self.covered = Ranges::of(look.registered);
            }
        }
        Ok(())
    }

    /// Takes a userfaultfd of the process if there is none, or if the memory is a new one.
    fn attach(&mut self, image: Image, known: &[BorrowedFd<'_>]) {
        if self.image != Some(image) {
            self.detach();
            self.image = Some(image);
            self.attempts = 0;
        }
        if self.uffd.is_some() || self.attempts == ATTEMPTS {
            return;
        }
        self.attempts += 1;
        let taken = take_userfaultfd(self.pid, known).map_err(|e| e.to_string()).and_then(|t| {
            self.stops.add(t.stopped);
            Uffd::new(t.fd).map_err(|e| format!("userfaultfd: {e}"))
        });
        match taken {
            Ok(uffd) => {
                self.uffd = Some(Arc::new(uffd));
                self.untracked = None;
            }
            Err(why) => self.untracked = Some(why),
        }
    }

    fn detach(&mut self) {
        self.uffd = None;
        self.covered = Ranges::default();
        self.fresh = Ranges::default();
        self.refused.clear();
    }

    fn look(&self) -> io::Result<Look> {
        let mut text = Vec::new();
        read_maps(self.pid, &mut text)?;
        let areas = parse_maps(&text).map_err(io::Error::other)?;
        let candidates: Vec<_> = areas.iter().filter(|a| a.candidate()).map(Area::range).collect();
        let pagemap = Pagemap::open(self.pid)?;
        let mut look = Look { text, candidates, ..Look::default() };
        for area in &look.candidates {
            if pagemap.is_registered(area.start)? {
                look.registered.push(area.clone());
            } else if !self.refused.contains(area) {
                look.missing.push(area.clone());
            }
        }
        Ok(look)
    }

    /// Registers what is missing. The process stands still; `look` was taken before.
    fn register(&self, uffd: &Uffd, look: Look) -> io::Result<Done> {
        let mut text = Vec::new();
        read_maps(self.pid, &mut text)?;
        let look = if text == look.text { look } else { self.look()? };
        let mut done = Done { look, ..Done::default() };
        for area in &done.look.missing {
            match uffd.register(area) {
                Ok(()) => done.registered.push(area.clone()),
                // Of an exec the next round will know.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOMEM | libc::ESRCH)) => {
                    done.gone = true;
                    break;
                }
                // Not of a kind that can be.
                Err(_) => done.refused.push(area.clone()),
            }
        }
        Ok(done)
    }

    fn take(&mut self, done: Done) {
        if done.gone {
            self.detach();
            self.image = None;
            return;
        }
        let registered = Ranges::of(done.registered);
        self.covered = Ranges::of(done.look.registered).union(&registered);
        self.fresh = self.fresh.union(&registered);
        self.refused.extend(done.refused);
    }

    /// Whether writes to all of `range` are noted, as far as is known.
    pub(super) fn tracks(&self, range: &Range<u64>) -> bool {
        self.uffd.is_some() && self.covered.covers(range)
    }

    /// Lists the pages of an area in which writes are noted, and protects those that were written.
    pub(super) fn protect(&mut self, pagemap: &Pagemap, area: &Area) -> io::Result<Vec<Region>> {
        let whole = Ranges::of(vec![area.range()]);
        match self.try_protect(pagemap, area, &whole) {
            Ok(regions) => {
                self.fresh = self.fresh.difference(&whole);
                return Ok(regions);
            }
            Err(error) if !is_changed(&error) => return Err(error),
            Err(_) => {}
        }
        // The process has mapped it anew. What was protected before the error is not told, so
        // everything counts as written. The next round registers it.
        self.covered = self.covered.difference(&whole);
        let mut regions = Vec::new();
        pagemap.present(area.range(), Mode::Look, &mut regions)?;
        Ok(as_written(regions))
    }

    /// Protects what was written, and takes care of marks of an earlier time where there may be some.
    ///
    /// The kernel ends the registration of an area that is moved, and of its neighbours if it joins
    /// them, and leaves the marks on their pages. A page that is written then is writable and marked
    /// as protected: no further write to it would be noted, unless the mark is taken away.
    fn try_protect(
        &self,
        pagemap: &Pagemap,
        area: &Area,
        whole: &Ranges,
    ) -> io::Result<Vec<Region>> {
        let mut regions = Vec::new();
        pagemap.present(area.range(), Mode::Protect, &mut regions)?;
        let fresh = self.fresh.intersection(whole);
        if fresh.is_empty() {
            return Ok(regions);
        }
        let marked = regions.iter().filter(|r| !r.written).map(|r| r.range.clone());
        let stale = Ranges::of(marked.collect()).intersection(&fresh);
        if stale.is_empty() {
            return Ok(regions);
        }
        for range in stale.as_slice() {
            self.uffd.as_ref().map_or(Ok(()), |uffd| uffd.lift(range))?;
        }
        regions.clear();
        pagemap.present(area.range(), Mode::Protect, &mut regions)?;
        Ok(as_written(regions))
    }

    /// The stops since this was last asked.
    pub(super) fn take_stops(&mut self) -> Stops {
        std::mem::take(&mut self.stops)
    }
}

fn as_written(regions: Vec<Region>) -> Vec<Region> {
    regions.into_iter().map(|r| Region { written: true, ..r }).collect()
}

/// Whether an error says that an area is not what it was.
fn is_changed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOENT | libc::EAGAIN))
}
