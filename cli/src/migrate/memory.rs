//! The container's memory at its source: tracked, and sent in rounds while it runs.
//!
//! ```text
//!   attach ─ learn what the store has ─ round* ─ (hold) ─ round ─ FREEZE ─ last round, beside the dump
//! ```
//! Tracker and sender work on a thread of their own; what they produce goes through the link like
//! any stream.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_oci::cgroups;
use ferry_oci::cpu_quota::CpuQuota;
use ferry_oci::criu::{HiddenRange, HiddenTask, HideError, Hiding, Orders, StoredSmaps};
use ferry_oci::pages::areas::Layout;
use ferry_oci::pages::copier::Copier;
use ferry_oci::pages::patch::Known;
use ferry_oci::pages::rounds::{
    Diverging, LastRounds, LinkRate, OnDiverge, Policy, Round, Rounds, Throttle, Verdict,
};
use ferry_oci::pages::scan::{self, Pagemap};
use ferry_oci::pages::stream::{Compression, HashReader, Options, RoundStats};
use ferry_oci::pages::tracker::{Kind, ProcessLayout, Tracker};

use super::guard::Guard;
use super::report::Happened;
use crate::transport::link::Link;
use crate::wire::messages::Request;
use crate::wire::stream;

/// How long the destination may take to store a round, beyond its transfer.
const STORE: Duration = Duration::from_secs(120);

/// How the operator wants memory to be copied.
#[derive(Debug, Clone)]
pub(crate) struct Wishes {
    /// Most bytes per second while the container runs.
    pub(crate) bandwidth: Option<u64>,
    /// The pause that is aimed at.
    pub(crate) downtime_target: Duration,
    /// Most rounds.
    pub(crate) rounds: u32,
    /// What to do with a container that changes faster than it is copied.
    pub(crate) on_diverge: OnDiverge,
    /// The tracker to use, whatever the probe says.
    pub(crate) tracker: Option<Kind>,
}

/// The memory of one container, on its way.
pub(super) struct Memory {
    /// Away while a round is made.
    engine: Option<Engine>,
    wishes: Wishes,
    hiding: Option<Hiding>,
    orders: Orders,
    /// Areas as read shortly before the freeze, by pid.
    fresh: BTreeMap<i32, Fresh>,
    /// CRIU is to look for guard pages everywhere: they have come where there had been none.
    guards_come: bool,
    /// Less CPU time, and who gives it back if this process cannot.
    throttle: Option<(CpuQuota, Throttle, Guard)>,
    link: LinkRate,
    /// Every round so far.
    pub(super) made: Vec<RoundStats>,
    /// Taken while a round is made.
    at_work: Arc<Mutex<()>>,
}

/// What a process had a moment ago.
struct Fresh {
    layout: Layout,
    /// Guard pages in hideable areas, if the kernel can tell.
    guards: Option<Vec<Range<u64>>>,
}

/// What a round needs; moves to a blocking thread for it.
struct Engine {
    copier: Copier,
    /// When the last round looked.
    scanned: Option<Instant>,
}

impl Memory {
    /// Begins to track the container of process `init`.
    ///
    /// # Errors
    /// When its writes cannot be tracked.
    pub(super) fn attach(init: u32, wishes: &Wishes) -> Result<Self> {
        let kind = wishes.tracker.unwrap_or(Kind::WriteProtect);
        let tracker = Tracker::attach(kind, move || cgroups::processes(init))
            .context("track the container's memory")?;
        let options = Options {
            bandwidth: wishes.bandwidth,
            compression: Compression::Auto,
            ..Options::default()
        };
        Ok(Self {
            engine: Some(Engine { copier: Copier::new(tracker, options), scanned: None }),
            wishes: wishes.clone(),
            hiding: None,
            orders: Orders::default(),
            fresh: BTreeMap::new(),
            guards_come: false,
            throttle: None,
            link: LinkRate::default(),
            made: Vec::new(),
            at_work: Arc::default(),
        })
    }

    /// Learns which pages the destination has from an earlier attempt; how many.
    ///
    /// # Errors
    /// When the connection breaks or brings something else.
    pub(super) async fn learn(&mut self, link: &mut Link, patience: Duration) -> Result<u64> {
        let engine = self.engine.as_mut().context("the tracker is gone")?;
        let (mut reader, mut count) = (HashReader::new(), 0);
        link.send(&Request::PageHashes).await?;
        link.receive(patience, |bytes| {
            reader.push(bytes, |space, addr, hash| {
                count += 1;
                engine.copier.sender.learn(space, addr, hash);
            })?;
            Ok(())
        })
        .await?;
        reader.finish()?;
        link.done(patience).await?;
        Ok(count)
    }

    /// Copies while the container runs, until freezing it would cost no more than is aimed at.
    ///
    /// # Errors
    /// When the connection breaks, or it does not converge and is not to be moved then.
    pub(super) async fn precopy(
        &mut self,
        link: &mut Link,
        init: u32,
        quota_folder: &Path,
    ) -> Result<Option<Diverging>> {
        let policy = Policy {
            downtime_target: self.wishes.downtime_target,
            max_rounds: self.wishes.rounds,
            ..Policy::default()
        };
        let mut rounds = Rounds::new(policy);
        loop {
            let round = self.live_round(link).await?;
            match rounds.after(round) {
                Verdict::Again => {}
                Verdict::Stop(_) => return Ok(None),
                Verdict::Diverges(why) => match self.wishes.on_diverge {
                    OnDiverge::Stop => return Ok(Some(why)),
                    OnDiverge::Fail => bail!(
                        "it changes its memory faster than it can be copied ({why:?}), and \
                         --on-diverge is fail"
                    ),
                    OnDiverge::Throttle => {
                        if !self.throttle(init, quota_folder).await? {
                            return Ok(Some(why));
                        }
                        rounds.throttled();
                    }
                },
            }
        }
    }

    /// One more round: what was written since the last one.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn live_round(&mut self, link: &mut Link) -> Result<Round> {
        let start = Instant::now();
        let before = self.engine.as_ref().and_then(|engine| engine.scanned);
        let mut stats = self.round(link, false).await?;
        let sent = Instant::now();
        link.done(STORE).await?;
        stats.link = self.link.after(&stats, sent.elapsed(), link.round_trip());
        self.made.push(stats);
        Ok(Round::new(before.map(|before| start - before), start.elapsed(), &stats))
    }

    /// Rounds just before the freeze, once everything else is ready for it.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn last_live_rounds(&mut self, link: &mut Link) -> Result<()> {
        let mut rounds = LastRounds::new(self.wishes.downtime_target);
        while !rounds.enough(self.live_round(link).await?) {}
        Ok(())
    }

    /// The last round. The container is frozen; the answer to it is still to come.
    ///
    /// # Errors
    /// When memory cannot be read or the connection breaks.
    pub(super) async fn last_round(&mut self, link: &mut Link) -> Result<()> {
        let stats = self.round(link, true).await?;
        self.made.push(stats);
        Ok(())
    }

    async fn round(&mut self, link: &mut Link, frozen: bool) -> Result<RoundStats> {
        let mut engine = self.engine.take().context("the tracker is gone")?;
        link.send(&Request::Pages).await?;
        let (mut writer, chunks) = stream::writer();
        let at_work = self.at_work.clone();
        let work = tokio::task::spawn_blocking(move || {
            let _at_work = at_work.lock();
            let stats = engine.round(frozen, &mut writer);
            (engine, stats)
        });
        let sent = link.stream(chunks).await;
        let (engine, stats) = work.await?;
        self.engine = Some(engine);
        sent?;
        stats
    }

    /// Makes the container one step slower, until [`Memory`] is dropped. Whether there was a step
    /// left.
    async fn throttle(&mut self, init: u32, folder: &Path) -> Result<bool> {
        if self.throttle.is_none() {
            let quota = CpuQuota::of(init, folder).context("throttle the container")?;
            let (start, before) = (Instant::now(), quota.used()?);
            tokio::time::sleep(Duration::from_millis(200)).await;
            let used = quota.used()?.saturating_sub(before).as_secs_f64();
            let own = used / start.elapsed().as_secs_f64();
            let guard = Guard::start(folder, init).await?;
            self.throttle = Some((quota, Throttle::new(own), guard));
        }
        let Some((quota, throttle, _)) = &mut self.throttle else { return Ok(false) };
        let Some(cpus) = throttle.next_step() else { return Ok(false) };
        quota.limit(cpus.max(0.01))?;
        Ok(true)
    }

    /// Gives a throttled container its CPU time back.
    pub(super) fn unthrottle(&mut self) {
        // Its guard ends later: waiting for it takes longer.
        if let Some((quota, ..)) = &mut self.throttle
            && let Err(error) = quota.restore()
        {
            log::warn!("give the container its CPU time back: {error}");
        }
    }

    /// Has the dump leave out what the store has. The orders are in `folder`, which the shim has
    /// made for the dump that waits.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(super) fn hide(&mut self, folder: &Path, library: &Path) -> Result<()> {
        self.hiding = Some(Hiding::join(folder, library));
        self.read_areas()?;
        self.write_orders(true)
    }

    /// Reads the areas of every process again, and where guard pages are. Locks, advice and guards come
    /// and go without any trace in maps, by which the tracker sees changes. Takes 13 ms for each GB,
    /// so before the last rounds.
    ///
    /// # Errors
    /// When the tracker is gone.
    pub(super) fn read_areas(&mut self) -> Result<()> {
        let engine = self.engine.as_ref().context("the tracker is gone")?;
        let pids = engine.copier.tracker.layouts().into_iter().map(|process| process.pid);
        // One that has ended meanwhile is left out.
        let read = |pid| {
            let layout = Layout::read(pid).ok()?;
            let guards = guards(pid, &layout);
            Some((pid, Fresh { layout, guards }))
        };
        self.fresh = pids.filter_map(read).collect();
        Ok(())
    }

    /// Reads the pages that CRIU will carry, as they are now.
    pub(super) fn known(&mut self) -> Result<Known> {
        self.read_areas()?;
        let mut known = Known::default();
        for (pid, fresh) in &self.fresh {
            // One that has ended meanwhile is left out.
            if let Err(error) = known.gather(*pid, &fresh.layout.areas) {
                log::debug!("read pages of process {pid}: {error}");
            }
        }
        Ok(known)
    }

    /// Whether the orders still hold, in the freeze. If not, they wait for the last round.
    ///
    /// # Errors
    /// When the processes cannot be looked into.
    pub(super) fn areas_unchanged(&self) -> Result<bool> {
        let engine = self.engine.as_ref().context("the tracker is gone")?;
        Ok(self.hiding.is_none() || engine.copier.tracker.check_areas()?.unchanged())
    }

    /// Gives orders from the layout as of the last round; before the freeze with copies of smaps.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(super) fn write_orders(&mut self, with_smaps: bool) -> Result<()> {
        let Some(hiding) = &self.hiding else { return Ok(()) };
        let engine = self.engine.as_ref().context("the tracker is gone")?;
        let mut tasks = Vec::new();
        for process in engine.copier.tracker.layouts() {
            let fresh = self.fresh.get(&process.pid);
            let fresh = fresh.filter(|fresh| fresh.layout.maps == process.layout.maps);
            let smaps = fresh.map_or(&process.layout.smaps, |fresh| &fresh.layout.smaps);
            let smaps = with_smaps.then(|| hiding.store_smaps(process.pid, smaps)).transpose()?;
            // Those of a moment ago say nothing once the areas are others.
            let guards = fresh.filter(|_| with_smaps && !self.guards_come);
            let guards = guards.and_then(|fresh| fresh.guards.as_deref());
            tasks.push(task(&process, smaps, guards));
        }
        self.orders = Orders { tasks };
        match hiding.write(&self.orders) {
            // Areas that changed while they were read: in the freeze they are found to be others.
            Err(HideError::Range(..)) if with_smaps => Ok(()),
            written => Ok(written?),
        }
    }

    /// After the last round: CRIU must have looked for guard pages wherever there are some.
    ///
    /// # Errors
    /// When some were set just before the freeze where there had been none.
    pub(super) fn check_guards(&mut self) -> Result<()> {
        let engine = self.engine.as_ref().context("the tracker is gone")?;
        for (pid, guards) in engine.copier.tracker.guards() {
            let hidden = self.orders.tasks.iter().filter(|task| task.pid == pid);
            let mut blind = hidden.flat_map(|task| &task.ranges).filter(|range| !range.guards);
            if blind.any(|range| guards.iter().any(|g| g.start < range.end && range.start < g.end))
            {
                self.guards_come = true;
                bail!("process {pid} has set guard pages just now");
            }
        }
        Ok(())
    }

    /// Adds what really happened to `happened`.
    pub(super) fn tell(&mut self, happened: &mut Happened) {
        happened.rounds = std::mem::take(&mut self.made);
        let report = self.hiding.as_ref().map(Hiding::report).transpose();
        match report.map(Option::flatten) {
            Ok(Some(report)) => {
                happened.scans_hidden = report.scans_hidden;
                happened.guard_scans_hidden = report.guard_scans_hidden;
                happened.smaps_given = report.smaps_given;
                happened.smaps_real = report.smaps_real;
            }
            Ok(None) => {}
            Err(error) => log::debug!("what was hidden from the dump: {error}"),
        }
    }

    /// Compares the images with what was hidden; a warning, if there is one.
    ///
    /// # Errors
    /// When memory would be lost.
    pub(super) fn check_images(&self, images: &Path) -> Result<Option<String>> {
        use ferry_oci::criu::Leak;
        let engine = self.engine.as_ref().context("the tracker is gone")?;
        let (mut warning, mut seen) = (None, Vec::new());
        for process in engine.copier.tracker.layouts() {
            // What is hidden, or would be: the store has just that.
            let served = task(&process, None, None);
            let hidden = self.orders.tasks.iter().find(|task| task.pid == process.pid);
            let same = |hidden: &HiddenTask| addresses(hidden).eq(addresses(&served));
            if !hidden.is_some_and(same) && self.hiding.is_some() {
                bail!("process {} has changed its areas in the freeze", process.pid);
            }
            match ferry_oci::criu::check(images, process.space, &served.ranges) {
                Ok(_) => {}
                // Served from the store all the same; expected where nothing is hidden.
                Err(leak @ Leak::InImages(..)) => {
                    warning = self.hiding.is_some().then(|| leak.to_string());
                }
                Err(leak) => return Err(leak).context("check the images"),
            }
            seen.push(process.space);
        }
        let dumped = ferry_oci::criu::tasks(images).context("check the images")?;
        if let Some(pid) = dumped.into_iter().find(|pid| !seen.contains(pid)) {
            bail!("process {pid} was dumped, and its memory was not copied");
        }
        Ok(warning)
    }
}

impl Drop for Memory {
    /// A round that was left in the middle ends first: it may be at work in a process of the
    /// container, and this one may be about to end.
    fn drop(&mut self) {
        drop(self.at_work.lock());
    }
}

impl Engine {
    fn round(&mut self, frozen: bool, out: &mut (dyn std::io::Write + Send)) -> Result<RoundStats> {
        let scanned = Instant::now();
        let stats = self.copier.round(frozen, out)?;
        self.scanned = Some(scanned);
        Ok(stats)
    }
}

/// What is hidden, guard pages or not.
fn addresses(task: &HiddenTask) -> impl Iterator<Item = (u64, u64)> {
    task.ranges.iter().map(|range| (range.start, range.end))
}

/// Where guard pages lie in the hideable areas of process `pid`; `None` when that cannot be told.
fn guards(pid: i32, layout: &Layout) -> Option<Vec<Range<u64>>> {
    if !scan::lists_guards() {
        return None;
    }
    let (pagemap, mut found) = (Pagemap::open(pid).ok()?, Vec::new());
    let looked = layout.hideable().into_iter().map(|range| pagemap.guards(range, &mut found));
    looked.collect::<std::io::Result<()>>().ok()?;
    Some(found)
}

/// What is hidden of a process. `guards` are all its guard pages, if that is known.
fn task(
    process: &ProcessLayout,
    smaps: Option<StoredSmaps>,
    guards: Option<&[Range<u64>]>,
) -> HiddenTask {
    let has_guards = |start, end| {
        guards.is_none_or(|guards| guards.iter().any(|g| g.start < end && start < g.end))
    };
    let ranges = process.layout.areas.iter().filter(|area| area.hideable());
    let ranges = ranges.map(|area| HiddenRange {
        start: area.start,
        end: area.end,
        guards: has_guards(area.start, area.end),
    });
    HiddenTask { pid: process.pid, ranges: ranges.collect(), smaps }
}
