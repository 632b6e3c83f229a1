//! `ferry migrate`: one running container from this host to another.
//!
//! ```text
//!  source.rs (here)                              agent/destination.rs (there)
//!  connect ─ plan ─ image ─ container ─ layer ─ address ─ hold     all while the container runs
//!  FREEZE ─ dump ─ transfer ──────────────────────────────▶  restore, held
//!  COMMIT  the source records: the destination shall run it
//!  ────────────────────────────────────────────── release ▶  the destination records: it runs here
//!  retire ◀───────────────────────────────────────────────   finish
//! ```
//! Before the commit every failure ends with the container running here and the destination clean
//! (`rollback`). After it, nothing here may thaw: [`settle`] asks the destination, which answers
//! for good, and either ends the source or brings it back.

mod failure;
pub(crate) mod fault;
pub(crate) mod guard;
mod images;
mod interrupt;
pub(crate) mod memory;
pub(crate) mod pause;

mod plan;
mod report;
pub(crate) mod settle;
mod source;
mod timeline;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_cli::phase::Phase;
use ferry_oci::announce;
use ferry_oci::fast::Fast;
use ferry_oci::pages::areas::is_being_filled;
use ferry_oci::pages::tracker::{self, Kind, Probe};
use ferry_oci::record::Record;
use ferry_oci::{cgroups, cpu_quota, paths};

use crate::containerd::Containerd;
use crate::describe::checks::{self, Facts, blockers};
use crate::describe::fast;
use crate::describe::host::HostFacts;
use crate::describe::memory::Way;
use crate::describe::room::RoomRequest;
use crate::lock;
use crate::network::address::{self, Cidr};
use crate::transport::Destination;
use crate::transport::link::{Link, unexpected};
use crate::wire::messages::{ContainerdAddress, Reply, Request};
use failure::{Failure, Whereabouts};
use interrupt::{Interrupt, Names, Stage};
use pause::Held;
use plan::Plan;
use report::{Bytes, Report, downtime};
use source::Source;
use timeline::Timeline;

/// How long pages of an earlier migration may still be on their way.
const FILL: Duration = Duration::from_secs(60);

/// How the memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Freeze, copy all, restore.
    Stop,
    /// Copy while it runs, then stop.
    Pre,
    /// As `pre` where memory can be tracked and served, else as `stop`.
    Auto,
}

impl Mode {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Pre => "pre",
            Self::Auto => "auto",
        }
    }
}

/// How the memory really moves on a host that offers `probe`, and why that is not what was asked
/// for. `tracker` is the one to use whatever the probe says.
fn choose_mode(
    asked: Mode,
    tracker: Option<Kind>,
    probe: &Probe,
) -> Result<(Mode, Option<String>)> {
    let cannot = match tracker {
        _ if asked == Mode::Stop => return Ok((Mode::Stop, None)),
        None | Some(Kind::WriteProtect) => &probe.write_protect_why,
        Some(Kind::None | Kind::SoftDirty) => return Ok((asked, None)),
    };
    if cannot.is_empty() {
        return Ok((asked, None));
    }
    let why = format!("its writes cannot be tracked here ({cannot})");
    match asked {
        Mode::Pre => bail!("{why}: use --mode stop"),
        _ if tracker.is_some() => bail!("{why}: leave --tracker out"),
        _ => Ok((
            Mode::Stop,
            Some(format!("{why}: its memory crosses in the pause, at some 3 ms for each MB")),
        )),
    }
}

/// What the operator asked for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Container id.
    pub(crate) container: String,
    /// Where to, as given and as understood.
    pub(crate) to: (String, Destination),
    /// The address that moves.
    pub(crate) ip: Option<Cidr>,
    /// Command that starts the agent there.
    pub(crate) agent: String,
    /// containerd, on both hosts.
    pub(crate) containerd: ContainerdAddress,
    /// How the memory moves.
    pub(crate) mode: Mode,
    /// How memory is copied while the container runs.
    pub(crate) memory: memory::Wishes,
    /// Fast paths not to take.
    pub(crate) no_fast: Vec<Fast>,
    /// Stop after the plan.
    pub(crate) dry_run: bool,
    /// Print JSON.
    pub(crate) json: bool,
}

/// One migration under way, from the driver's side.
struct Migration {
    options: Options,
    id: String,
    /// Interface here that has the address.
    device: String,
    /// Fast paths that are taken.
    fast: Vec<Fast>,
    /// All of them, and why one is not taken.
    choices: Vec<fast::Choice>,
    /// How the memory moves.
    mode: Mode,
    /// Why that is not what was asked for.
    mode_why: Option<String>,
    timeline: Timeline,
    interrupt: Interrupt,
    bytes: Bytes,
    started: Instant,
}

/// Runs `ferry migrate`.
///
/// # Errors
/// When the container was not moved; the text says where it runs.
pub(crate) async fn run(options: Options) -> Result<()> {
    let _driver = lock::driver(&options.containerd.namespace, &options.container).await?;
    let interrupt = Interrupt::listen()?;
    let (container, there) = (options.container.clone(), options.to.1.host().to_owned());
    let names = Names { container, here: hostname(), there };
    tokio::select! {
        done = run_locked(options, interrupt.clone()) => done,
        left = interrupt.leave(&names) => Err(left),
    }
}

async fn run_locked(options: Options, interrupt: Interrupt) -> Result<()> {
    if let Some(record) = earlier(&options)? {
        interrupt.enter(Stage::Settling);
        return settle::resume(&options, &record).await;
    }
    let (mode, mode_why) = choose_mode(options.mode, options.memory.tracker, &tracker::probe())
        .with_context(|| format!("{} runs here as before", options.container))?;
    let mut migration = Migration {
        id: new_id(),
        device: String::new(),
        fast: Vec::new(),
        choices: Vec::new(),
        mode,
        mode_why,
        timeline: Timeline::new(options.json, interrupt.clone()),
        interrupt,
        bytes: Bytes::default(),
        started: Instant::now(),
        options,
    };
    let (mut source, mut link) = migration.connect().await?;
    let plan = migration.plan(&source, &mut link).await?;
    if migration.options.dry_run || !plan.blockers.is_empty() {
        return show(&plan, migration.options.json);
    }
    if !migration.options.json {
        eprint!("{}", plan.text());
    }
    // From here on something may have changed.
    let filled = migration.timeline.cut(Phase::Plan, migration.wait_until_filled(&source)).await;
    let ready = match filled.and_then(|f| f.map_err(|error| Failure::new(Phase::Plan, error))) {
        Ok(()) => migration.prepare(&mut source, &mut link).await,
        Err(failure) => Err(failure),
    };
    let held = match ready {
        Ok(ready) => migration.pause(ready, &mut source, &mut link).await,
        Err(failure) => Err(failure),
    };
    let frozen = match held {
        Ok(held) => held,
        Err(failure) => return Err(migration.rollback(failure, &source, link).await),
    };
    if let Err(failure) = migration.commit(&source, &frozen.epoch).await
        // A reply that was lost is no decision that was not taken.
        && Record::read(&migration.id).ok().flatten().is_none()
        // Nor is a container lost that the destination has.
        && !migration.commit_alone(&source, &frozen).await
    {
        return Err(migration.rollback(failure, &source, link).await);
    }
    // Committed: no rollback from here on.
    let report = migration.complete(frozen, &source, link).await?;
    show_report(&report, migration.options.json)
}

impl Migration {
    async fn connect(&mut self) -> Result<(Source, Link)> {
        let options = &self.options;
        let id = self.id.clone();
        let work = async {
            let source = Source::find(&options.containerd, &options.container, id).await?;
            let link = Link::open(&options.to.1, &options.agent, options.containerd.clone())
                .await
                .with_context(|| format!("host {}", options.to.1.host()))?;
            Ok((source, link))
        };
        let result = self.timeline.run(Phase::Connect, work).await;
        result.map_err(|failure| self.tell(&failure))
    }

    /// A container that has just come here may still get pages: a dump would take those that are
    /// missing for zeros.
    async fn wait_until_filled(&self, source: &Source) -> Result<()> {
        let init = source.init_pid;
        // What a driver that was killed has left.
        cpu_quota::undo(&paths::quota_folder(init))
            .context("give the container its CPU time back")?;
        let start = Instant::now();
        loop {
            let filling = tokio::task::spawn_blocking(move || {
                let pids = cgroups::processes(init)?;
                std::io::Result::Ok(pids.into_iter().find(|&pid| {
                    // One that has ended needs no memory.
                    is_being_filled(pid).unwrap_or_default()
                }))
            });
            let filling = filling.await?.context("look into the container's memory")?;
            let Some(pid) = filling else { return Ok(()) };
            if start.elapsed() > FILL {
                bail!(
                    "memory of process {pid} is still to be filled after {} s: either pages of an \
                     earlier migration are still on their way (ferry status), or the program has a \
                     userfaultfd of its own and cannot be moved",
                    FILL.as_secs()
                );
            }
            // Each look reads the smaps of every process.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn plan(&mut self, source: &Source, link: &mut Link) -> Result<Plan> {
        let options = &self.options;
        let patience = Phase::Plan.deadline();
        let work = async {
            let version = source.containerd.version().await?;
            let here = HostFacts::gather(version);
            let there = match link.ask(&Request::DescribeHost, patience).await? {
                Reply::Host(facts) => *facts,
                other => return Err(unexpected(&other)),
            };
            let request = RoomRequest {
                id: options.container.clone(),
                ip: options.ip,
                paths: checks::paths_needed(&source.facts),
                netns: checks::netns_needed(&source.facts),
            };
            let room = match link.ask(&Request::DescribeRoom(request), patience).await? {
                Reply::Room(room) => room,
                other => return Err(unexpected(&other)),
            };
            let device = match options.ip {
                Some(cidr) => address::device_with(cidr.ip)?,
                None => None,
            };
            let goes_along = match (options.ip, &device) {
                (Some(cidr), Some(device)) => address::goes_along(&cidr, device)?,
                _ => Vec::new(),
            };
            let fast = fast::choose(&fast::Facts {
                source: &here,
                destination: &there,
                container: &source.facts,
                copies_memory: self.mode != Mode::Stop,
                moves_address: options.ip.is_some(),
                refused: &options.no_fast,
            });
            let way = match self.mode {
                Mode::Stop => Way::Images,
                Mode::Pre | Mode::Auto => {
                    Way::Store { hidden: fast::taken(&fast).contains(&Fast::Hide) }
                }
            };
            let found = blockers(&Facts {
                source: &here,
                destination: &there,
                container: &source.facts,
                room: &room,
                way,
                ip: options.ip,
                ip_on_source: device.as_deref(),
                goes_along: &goes_along,
                link_on_ip: match options.ip {
                    Some(cidr) => link.comes_from(cidr.ip)?,
                    None => false,
                },
            });
            let plan = Plan {
                container: options.container.clone(),
                migration: self.id.clone(),
                mode: self.mode.name(),
                mode_why: self.mode_why.clone(),
                ip: options.ip.map(|c| c.to_string()),
                source: here,
                destination: there,
                facts: source.facts.clone(),
                image_bytes: source.content.blobs.iter().map(|b| b.size).sum(),
                carried: source.facts.memory.carried(way),
                fast,
                blockers: found,
            };
            Ok((plan, device.unwrap_or_default()))
        };
        let result = self.timeline.run(Phase::Plan, work).await;
        let (plan, device) = result.map_err(|failure| self.tell(&failure))?;
        self.device = device;
        self.fast = fast::taken(&plan.fast);
        self.choices = plan.fast.clone();
        Ok(plan)
    }

    async fn commit(&mut self, source: &Source, epoch: &str) -> Result<(), Failure> {
        let (to, ip) = (&self.options.to.0, self.options.ip);
        self.timeline.run(Phase::Commit, source.commit(to, ip, &self.device, epoch)).await
    }

    /// Decides in place of a shim that was killed and has taken the container with it.
    async fn commit_alone(&self, source: &Source, held: &Held) -> bool {
        let (to, ip) = (&self.options.to.0, self.options.ip);
        let address = &self.options.containerd;
        source.commit_alone(to, ip, &self.device, &held.epoch, address, held.frozen_at).await
    }

    /// After the commit: release there, retire here. Whatever fails is settled with the
    /// destination, never rolled back.
    async fn complete(
        &mut self,
        mut held: Held,
        source: &Source,
        mut link: Link,
    ) -> Result<Report> {
        let patience = Phase::Release.deadline();
        let released = self
            .timeline
            .run(Phase::Release, async {
                match link.ask(&Request::Commit, patience).await? {
                    Reply::Running { release_us, network_us, packets } => {
                        Ok((release_us, network_us, packets))
                    }
                    other => Err(unexpected(&other)),
                }
            })
            .await;
        let downtime_us = micros(held.frozen_at);
        let record = Record::read(&self.id)?.context("the record of the commit is gone")?;
        let mut warnings = std::mem::take(&mut held.warnings);
        // Before the source forgets it.
        if let Some(memory) = &mut held.memory {
            memory.tell(&mut held.happened);
        }
        let (release_us, network_us, packets) = match released {
            Ok(times) => times,
            Err(failure) => {
                // The reply is lost, the decision is not: ask another agent.
                let sent = link.sent();
                drop(link);
                let outcome = settle::ask(&self.options, &record).await;
                let outcome = outcome.map_err(|error| {
                    let doubt = Failure::new(failure.phase(), error.context(failure.to_string()));
                    self.tell(&doubt.at(Whereabouts::InDoubt))
                })?;
                settle::act(&self.options, &record, outcome, &failure.to_string()).await?;
                warnings.push(format!("the first agent was lost ({failure})"));
                return Ok(self.report(held, source, (0, 0), downtime_us, sent, warnings));
            }
        };
        held.happened.packets_held = packets;
        let retire = source::retire(&source.containerd, &self.options.containerd, &record);
        if let Err(failure) = self.timeline.run(Phase::Retire, retire).await {
            return Err(self.tell(&failure.at(Whereabouts::Destination)));
        }
        let patience = Phase::Finish.deadline();
        let order = Request::Finish { migration: self.id.clone() };
        let finish = link.order(&order, patience);
        if let Err(failure) = self.timeline.run(Phase::Finish, finish).await {
            // Only marks are left there; another agent removes them.
            drop(link);
            settle::finish(&self.options, &self.id)
                .await
                .map_err(|_| self.tell(&failure.at(Whereabouts::Destination)))?;
            warnings.push("the first agent was lost while it finished".to_owned());
            let times = (release_us, network_us);
            return Ok(self.report(held, source, times, downtime_us, 0, warnings));
        }
        source::forget(&self.id)?;
        let times = (release_us, network_us);
        Ok(self.report(held, source, times, downtime_us, link.sent(), warnings))
    }

    /// Undoes everything on both sides. The container runs here afterwards.
    async fn rollback(&self, failure: Failure, source: &Source, mut link: Link) -> anyhow::Error {
        let mut failure = failure;
        self.interrupt.enter(Stage::Undoing);
        // Here first: this is what the clients wait for.
        if failure.phase() >= Phase::Hold
            && let Err(error) = source.thaw().await
        {
            let gone = source.is_gone(&self.options.containerd).await;
            let at = if gone { Whereabouts::Gone } else { Whereabouts::InDoubt };
            failure = failure.leaves(format!("thaw here: {error:#}")).at(at);
            if gone && let Err(error) = source::clear(&self.id).await {
                failure = failure.leaves(format!("{error:#}"));
            }
            if gone && let Err(error) = self.call_back() {
                log::warn!("announce the address here again: {error:#}");
            }
        }
        let patience = Duration::from_secs(60);
        if failure.is_cut() || link.order(&Request::Abort, patience).await.is_err() {
            // The agent is lost, or in the middle of something: it undoes by itself when its input
            // ends, and a second one waits for it or does it in its place.
            let host = link.host().to_owned();
            drop(link);
            let settled = settle::ask_about(&self.options, &self.id, self.options.ip, "").await;
            if let Err(error) = settled {
                failure = failure.leaves(format!(
                    "{host} may have leftovers of migration {}, which it removes when it is \
                     asked again ({error:#})",
                    self.id
                ));
            }
        }
        self.tell(&failure)
    }

    /// Leads the clients here again, as the shim would have: whoever starts the container anew has them.
    fn call_back(&self) -> Result<()> {
        let Some(cidr) = self.options.ip else { return Ok(()) };
        match address::device_with(cidr.ip)? {
            Some(device) => Ok(announce::to_neighbours(cidr.ip, &device)?),
            None => Ok(()),
        }
    }

    fn tell(&self, failure: &Failure) -> anyhow::Error {
        let here = hostname();
        let there = self.options.to.1.host();
        anyhow::anyhow!(failure.tell(&self.options.container, &here, there))
    }

    fn report(
        &self,
        held: Held,
        source: &Source,
        (release_us, network_us): (u64, u64),
        downtime_us: u64,
        sent: u64,
        warnings: Vec<String>,
    ) -> Report {
        Report {
            container: self.options.container.clone(),
            migration: self.id.clone(),
            source: hostname(),
            destination: self.options.to.1.host().to_owned(),
            mode: self.mode.name(),
            stdout: held.stdout.trim_start_matches("file://").to_owned(),
            resident: source.facts.resident,
            downtime: downtime(&self.timeline, held.freeze_us, release_us, network_us, downtime_us),
            total_us: micros(self.started),
            bytes: Bytes { total: sent, ..self.bytes },
            fast: self.choices.clone(),
            happened: held.happened,
            phases: self.timeline.took().to_vec(),
            warnings,
        }
    }
}

/// The record of an earlier migration of the same container that was decided and not finished.
fn earlier(options: &Options) -> Result<Option<Record>> {
    let records = Record::all().context("read the records of earlier migrations")?;
    Ok(records.into_iter().find(|r| {
        // A record without a destination speaks of a container that came here.
        !r.destination.is_empty()
            && r.container == options.container
            && r.namespace == options.containerd.namespace
    }))
}

fn show(plan: &Plan, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(plan)?);
    } else {
        print!("{}", plan.text());
    }
    if let Some(first) = plan.blockers.first() {
        bail!(
            "{} runs on {} as before: {} ({} in all)",
            plan.container,
            plan.source.hostname,
            first.name,
            plan.blockers.len()
        );
    }
    Ok(())
}

fn show_report(report: &Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(())
}

/// An id that is unique among the migrations of both hosts.
pub(crate) fn new_id() -> String {
    let since =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("m{:x}-{:x}", since.as_micros(), std::process::id())
}

pub(crate) fn hostname() -> String {
    nix::unistd::gethostname()
        .map_or_else(|_| "this host".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// A client of this host's containerd, for commands that need no container.
pub(crate) async fn containerd(address: &ContainerdAddress) -> Result<Containerd> {
    Ok(Containerd::connect(&address.socket, &address.namespace).await?)
}

#[cfg(test)]
mod tests {
    use super::{Kind, Mode, Probe, choose_mode};

    #[test]
    fn memory_that_cannot_be_tracked_crosses_in_the_pause() {
        let can = Probe { write_protect: true, ..Probe::default() };
        let why = "kernel 5.10".to_owned();
        let cannot = Probe { soft_dirty: true, write_protect_why: why, ..Probe::default() };
        for asked in [Mode::Stop, Mode::Pre, Mode::Auto] {
            assert_eq!(choose_mode(asked, None, &can).unwrap(), (asked, None));
        }
        let (mode, why) = choose_mode(Mode::Auto, None, &cannot).unwrap();
        assert_eq!(mode, Mode::Stop);
        assert!(why.unwrap().contains("kernel 5.10"));
        let refused = choose_mode(Mode::Pre, None, &cannot).unwrap_err().to_string();
        assert!(refused.contains("--mode stop"), "{refused}");
        assert!(choose_mode(Mode::Auto, Some(Kind::WriteProtect), &cannot).is_err());
        // All of it is sent again in the pause, which needs no tracker.
        assert_eq!(choose_mode(Mode::Pre, Some(Kind::None), &cannot).unwrap().0, Mode::Pre);
    }
}
