//! Pre-dumps on a kernel without soft-dirty bits, where CRIU cannot make them: memory is written into
//! images of CRIU's format, round by round while the container runs, by ferry's own tracker.
//!
//! ```text
//!   round 1 ─▶ 1/  pagemap-PID.img  pages-N.img      everything
//!   round 2 ─▶ 2/  the same, parent ─▶ ../1          what was written since; the rest is in the parent
//!   FREEZE
//!   frozen  ─▶ what was written since, and orders for CRIU's dump to leave all of it out
//!   dump    ─▶ images/  by CRIU, without this memory
//!   THAW
//!   finish  ─▶ images/  completed, parent ─▶ ../2
//! ```
//! `criu restore` takes such a dump as one of its own. In the freeze only what has changed is read, so
//! it does not grow with memory. [`serve`](serve::serve) is the process that tracks from one round to
//! the next; when it ends, the next round is a first one.

pub mod serve;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::reader::read_pages;
use super::scan;
use super::tracker::ranges::Ranges;
use super::tracker::{Changes, Kind, ProcessLayout, TrackError, Tracker};
use crate::cgroups;
use crate::criu::{
    HiddenRange, HiddenTask, HideError, Hiding, ImageError, Leak, LeftOut, Orders, PagesWriter,
    check, link_parent, merge, tasks,
};

/// Folder in that of a dump, until it is completed: what the frozen round has read.
const CHANGES: &str = "predump-changes";

/// Why a pre-dump, or a dump on top of one, could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PreDumpError {
    /// Writes could not be tracked.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// A file.
    #[error("{0}")]
    Io(String, #[source] io::Error),
    /// CRIU could not be told what to leave out.
    #[error("tell CRIU what to leave out")]
    Hide(#[from] HideError),
    /// Images and what was left out of them do not fit together.
    #[error(transparent)]
    Leak(#[from] Leak),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A process was dumped of which nothing is known.
    #[error("process {0} was dumped, and its memory was not tracked")]
    Unknown(u32),
    /// Out of order.
    #[error("{0}")]
    Order(&'static str),
}

impl PreDumpError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io(what.into(), source)
    }
}

/// What a round has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Bytes of pages written.
    pub bytes: u64,
    /// Bytes of pages that the rounds before have.
    pub in_parent: u64,
    /// How many processes there are.
    pub processes: u32,
    /// How long it took, microseconds.
    pub took_us: u64,
    /// For how long processes were stopped, microseconds: the sum over all.
    pub stopped_us: u64,
}

/// The pre-dumps of one container.
#[derive(Debug)]
pub struct PreDumps {
    tracker: Tracker,
    /// By process number in the innermost namespace: which pages the rounds so far have.
    held: BTreeMap<u32, Ranges>,
    /// Folder of the last round.
    last: Option<PathBuf>,
    /// What the frozen round has read, of each process.
    frozen: Option<BTreeMap<u32, LeftOut>>,
}

/// What of one process is written, and what the rounds before have.
struct Parts {
    pid: i32,
    space: u32,
    written: Vec<Range<u64>>,
    in_parent: Ranges,
}

impl PreDumps {
    /// Begins to track the container of process `init`, without looking at it yet.
    ///
    /// # Errors
    /// When its writes cannot be tracked.
    pub fn attach(init: u32) -> Result<Self, PreDumpError> {
        let tracker = Tracker::attach(Kind::WriteProtect, move || cgroups::processes(init))?;
        Ok(Self::of(tracker))
    }

    fn of(tracker: Tracker) -> Self {
        Self { tracker, held: BTreeMap::new(), last: None, frozen: None }
    }

    /// Writes what has changed since the last round into `folder`, which is made. Not while the
    /// container is frozen: processes that are new are attached to.
    ///
    /// # Errors
    /// When it cannot be tracked or written; begin anew then. Nothing is left of the folder.
    pub fn round(&mut self, folder: &Path) -> Result<Report, PreDumpError> {
        if self.frozen.is_some() {
            return Err(PreDumpError::Order("the dump has been made"));
        }
        let start = Instant::now();
        let make = fs::DirBuilder::new().mode(0o700).create(folder);
        make.map_err(PreDumpError::io(format!("make {}", folder.display())))?;
        let made = self.write_round(folder);
        match made {
            Ok(mut report) => {
                self.last = Some(folder.to_owned());
                report.took_us = micros(start.elapsed());
                Ok(report)
            }
            Err(error) => {
                let _ = fs::remove_dir_all(folder);
                Err(error)
            }
        }
    }

    fn write_round(&mut self, folder: &Path) -> Result<Report, PreDumpError> {
        if let Some(last) = &self.last {
            link_parent(folder, last).map_err(PreDumpError::io("name the pre-dump before"))?;
        }
        let round = self.tracker.round(false)?;
        let mut report = Report { stopped_us: micros(round.stops.time), ..Report::default() };
        for (number, parts) in self.parts(&round.processes).into_iter().enumerate() {
            let pages_id = number as u32 + 1;
            let writer = PagesWriter::of_task(folder, parts.space, pages_id);
            let writer = writer.map_err(PreDumpError::io("write the images"))?;
            let (bytes, missing) = write(writer, &parts)?;
            self.tracker.again(parts.pid, &missing);
            if let Some(held) = self.held.get_mut(&parts.space) {
                *held = held.difference(&Ranges::of(missing));
            }
            report.processes += 1;
            report.bytes += bytes;
            report.in_parent += parts.in_parent.bytes();
        }
        Ok(report)
    }

    /// In the freeze, before CRIU's dump into `images`: reads what has changed since the last round, and
    /// gives orders to leave out everything that is known, in the folder that `hiding` is.
    ///
    /// # Errors
    /// When memory cannot be read, or orders cannot be given: the dump is to be a whole one then.
    pub fn frozen(&mut self, images: &Path, hiding: &Hiding) -> Result<Report, PreDumpError> {
        if self.last.is_none() {
            return Err(PreDumpError::Order("there is no pre-dump"));
        }
        let start = Instant::now();
        let folder = images.join(CHANGES);
        let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        make.map_err(PreDumpError::io(format!("make {}", folder.display())))?;
        let round = self.tracker.round(true)?;
        let (mut report, mut frozen) = (Report::default(), BTreeMap::new());
        for parts in self.parts(&round.processes) {
            let left = read_changes(&folder, &parts)?;
            report.processes += 1;
            report.bytes +=
                left.present.iter().map(|(range, _)| range.end - range.start).sum::<u64>();
            report.in_parent += parts.in_parent.bytes();
            frozen.insert(parts.space, left);
        }
        // Last: what CRIU leaves out has been read.
        self.order(hiding)?;
        self.frozen = Some(frozen);
        report.took_us = micros(start.elapsed());
        Ok(report)
    }

    fn order(&self, hiding: &Hiding) -> Result<(), PreDumpError> {
        let guards: BTreeMap<i32, &[Range<u64>]> = self.tracker.guards().collect();
        let known = scan::lists_guards();
        let tasks = self.tracker.layouts();
        let tasks = tasks.iter().map(|process| HiddenTask {
            pid: process.pid,
            ranges: hidden(process, |start, end| {
                let guards = guards.get(&process.pid).copied().unwrap_or_default();
                !known || guards.iter().any(|guard| guard.start < end && start < guard.end)
            }),
            smaps: None,
        });
        Ok(hiding.write(&Orders { tasks: tasks.collect() })?)
    }

    /// After CRIU's dump, of which the container may run on by now: completes the images.
    ///
    /// # Errors
    /// When memory is missing in them: the dump is of no use then.
    pub fn finish(&mut self, images: &Path) -> Result<(), PreDumpError> {
        let frozen = self.frozen.take().ok_or(PreDumpError::Order("nothing was frozen"))?;
        let last = self.last.take().ok_or(PreDumpError::Order("there is no pre-dump"))?;
        let layouts = self.tracker.layouts();
        let folder = images.join(CHANGES);
        let mut dumped = tasks(images).map_err(PreDumpError::io("look at the images"))?;
        for process in &layouts {
            // What has ended without having been waited for has no memory.
            if !dumped.contains(&process.space) {
                continue;
            }
            dumped.retain(|space| *space != process.space);
            check(images, process.space, &hidden(process, |_, _| true))?;
            let Some(left) = frozen.get(&process.space) else { continue };
            let content = changes_of(&folder, process.space);
            let content =
                File::open(content).map_err(PreDumpError::io("read what was left out"))?;
            merge(images, process.space, left, &content)?;
        }
        if let Some(unknown) = dumped.first() {
            return Err(PreDumpError::Unknown(*unknown));
        }
        link_parent(images, &last).map_err(PreDumpError::io("name the pre-dump before"))?;
        fs::remove_dir_all(folder).map_err(PreDumpError::io("remove what was left out"))
    }

    /// What is to be written of each process that lives, and what the rounds before have of it. From now
    /// on all of it is held.
    fn parts(&mut self, changes: &[Changes]) -> Vec<Parts> {
        let mut parts = Vec::new();
        for change in changes {
            if change.exited {
                self.held.remove(&change.space);
                continue;
            }
            let written = Ranges::of(change.written.clone());
            let absent = Ranges::of(change.absent.clone());
            let held = self.held.entry(change.space).or_default();
            let in_parent = held.difference(&absent).difference(&written);
            *held = in_parent.union(&written);
            let (pid, space) = (change.pid, change.space);
            parts.push(Parts { pid, space, written: written.into_vec(), in_parent });
        }
        parts
    }
}

/// What of a process CRIU is told to leave out.
fn hidden(process: &ProcessLayout, guards: impl Fn(u64, u64) -> bool) -> Vec<HiddenRange> {
    let areas = process.layout.areas.iter().filter(|area| area.hideable());
    let range = |start, end| HiddenRange { start, end, guards: guards(start, end) };
    areas.map(|area| range(area.start, area.end)).collect()
}

/// Writes the images of one process: bytes of pages, and what had vanished before it was read.
fn write(writer: PagesWriter, parts: &Parts) -> Result<(u64, Vec<Range<u64>>), PreDumpError> {
    let failed = || PreDumpError::io("write the images");
    // Ranges of both kinds in the order of addresses. One thread reads, so pieces come in order too.
    let state = Mutex::new((writer, parts.in_parent.as_slice().iter().peekable()));
    let before = |start: u64| -> io::Result<()> {
        let mut state = state.lock().map_err(|_| io::Error::other("a reader has failed"))?;
        let (writer, parent) = &mut *state;
        while let Some(range) = parent.next_if(|range| range.start < start) {
            writer.in_parent(range.clone());
        }
        Ok(())
    };
    let read = read_pages(parts.pid, &parts.written, 1, |range, bytes| {
        before(range.start)?;
        let mut state = state.lock().map_err(|_| io::Error::other("a reader has failed"))?;
        state.0.present(range.start, bytes)
    });
    let read = read.map_err(failed())?;
    before(u64::MAX).map_err(failed())?;
    let (writer, _) = state.into_inner().map_err(|_| PreDumpError::Order("a reader has failed"))?;
    Ok((writer.finish().map_err(failed())?, read.missing))
}

/// Reads what has changed of a frozen process into a file, as it comes.
fn read_changes(folder: &Path, parts: &Parts) -> Result<LeftOut, PreDumpError> {
    let failed = || PreDumpError::io("write what has changed");
    let file = File::create_new(changes_of(folder, parts.space)).map_err(failed())?;
    let state = Mutex::new((file, 0, Vec::<(Range<u64>, u64)>::new()));
    let read = read_pages(parts.pid, &parts.written, 1, |range, bytes| {
        let mut state = state.lock().map_err(|_| io::Error::other("a reader has failed"))?;
        let (file, at, present) = &mut *state;
        file.write_all(bytes)?;
        match present.last_mut() {
            Some((last, _)) if last.end == range.start => last.end = range.end,
            _ => present.push((range, *at)),
        }
        *at += bytes.len() as u64;
        Ok(())
    });
    let read = read.map_err(failed())?;
    let (_, _, present) =
        state.into_inner().map_err(|_| PreDumpError::Order("a reader has failed"))?;
    // Nothing vanishes while it stands still, but guard pages: those are no pages.
    log::debug!("{} ranges of process {} could not be read", read.missing.len(), parts.pid);
    Ok(LeftOut { present, in_parent: parts.in_parent.as_slice().to_vec() })
}

fn changes_of(folder: &Path, space: u32) -> PathBuf {
    folder.join(space.to_string())
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::Pagemap;
    use crate::pages::tracker::probe;
    use std::os::unix::fs::FileExt;
    use std::process::{Child, Command, Stdio};

    /// A process that does nothing any more.
    struct Idle(Child);

    impl Idle {
        fn start() -> Self {
            let mut cat = Command::new("cat");
            let child = cat.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(100));
            Self(child)
        }

        fn pre_dumps(&self) -> PreDumps {
            let pid = self.0.id() as i32;
            PreDumps::of(Tracker::attach(Kind::WriteProtect, move || Ok(vec![pid])).unwrap())
        }
    }

    impl Drop for Idle {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn what_was_not_read_is_not_left_out_of_the_dump() {
        if !probe().write_protect {
            println!(
                "skipped: what_was_not_read_is_not_left_out_of_the_dump: {}",
                probe().write_protect_why
            );
            return;
        }
        let (dir, idle) = (tempfile::tempdir().unwrap(), Idle::start());
        let mut dumps = idle.pre_dumps();
        let report = dumps.round(&dir.path().join("1")).unwrap();
        assert!(report.bytes > 0 && report.processes == 1, "{report:?}");
        // Every page is that of the process.
        let space = *dumps.held.keys().next().unwrap();
        let pagemap = Pagemap::read(&dir.path().join("1"), space).unwrap();
        let pages = File::open(dir.path().join("1/pages-1.img")).unwrap();
        let memory = File::open(format!("/proc/{}/mem", idle.0.id())).unwrap();
        let mut at = 0;
        for run in &pagemap.runs {
            let mut both = [0, 1].map(|_| vec![0; (run.end - run.start) as usize]);
            pages.read_exact_at(&mut both[0], at).unwrap();
            memory.read_exact_at(&mut both[1], run.start).unwrap();
            assert!(both[0] == both[1], "{run:?}");
            at += run.end - run.start;
        }
        // The frozen round cannot write what it reads.
        let (images, library) = (dir.path().join("images"), dir.path().join("library"));
        fs::create_dir_all(images.join(CHANGES).join(space.to_string())).unwrap();
        let hiding = Hiding::prepare(&dir.path().join("hide"), &library).unwrap();
        let failed = dumps.frozen(&images, &hiding).unwrap_err();
        assert!(failed.to_string().contains("write what has changed"), "{failed}");
        assert_eq!(fs::read_dir(dir.path().join("hide")).unwrap().count(), 0, "there are orders");
        fs::remove_dir_all(&images).unwrap();
        dumps.frozen(&images, &hiding).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("hide")).unwrap().count(), 1, "no orders");
    }
}
