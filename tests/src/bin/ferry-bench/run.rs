//! Running a cell: moves there and back, ways interleaved.
//!
//! ```text
//!  hand a -> b, b -> a · stop a -> b, b -> a · auto a -> b, b -> a · hand a -> b, b -> a · ...
//! ```
//!
//! ferry's ways move the same container, one after the other. Those that are moved by hand and with
//! podman are others, which replace it: two at a time would take each other's memory and processors.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use ferry_tests::{Host, Job, Scene};

use crate::cells::{Cell, Link, Watch};
use crate::client::{self, Ask, Client};
use crate::connect::Connected;
use crate::peak::Peak;
use crate::record::{self, Move};
use crate::reporter::Reporter;
use crate::throughput::{self, Load};
use crate::ways::{self, Way};
use crate::workloads::Workload;

/// How long clients ask before a move.
const BEFORE: Duration = Duration::from_millis(300);
/// How long they ask after it: a move by hand ends before their packets are sent again.
const AFTER: Duration = Duration::from_millis(1000);

/// How long memory may take to come to its place after a move.
const FILL: Duration = Duration::from_secs(60);

/// Runs `cell`; each move is told to `tell`.
///
/// # Errors
/// When a container cannot be started. A move that fails is none.
pub(crate) fn cell(scene: &Scene, cell: &Cell, mut tell: impl FnMut(Move)) -> Result<()> {
    set_link(scene, cell.link)?;
    let mut running: Option<Way> = None;
    // Under a load the rate that the machine bears is found out once.
    let mut rate = None;
    let rounds = cell.ways.iter().map(|(_, moves)| moves.div_ceil(2)).max().unwrap_or_default();
    for round in 0..rounds {
        for &(way, moves) in &cell.ways {
            let left = moves.saturating_sub(2 * round);
            if left == 0 {
                continue;
            }
            if !running.is_some_and(|other| other.shares_with(way)) {
                ways::clean(scene)?;
                start(scene, cell.workload, way)?;
            }
            running = Some(way);
            if cell.watch == Watch::Throughput && rate.is_none() {
                rate = Some(throughput::half_a_core(scene, cell.workload, scene.host("a"))?);
            }
            for (from, to) in [("a", "b"), ("b", "a")].into_iter().take(left) {
                let moved = one(scene, cell, way, (scene.host(from), scene.host(to)), rate);
                // One way only: the next move starts at `a` again.
                let stays = moved.error.is_some() || left == 1;
                let failed = moved.error.is_some();
                tell(moved);
                if stays {
                    running = None;
                }
                if failed {
                    break;
                }
            }
        }
    }
    ways::clean(scene)?;
    set_link(scene, Link::Unlimited)
}

fn start(scene: &Scene, workload: Workload, way: Way) -> Result<()> {
    let (a, b) = (scene.host("a"), scene.host("b"));
    way.start(workload, a, b)?;
    workload.prepare(scene, a)
}

/// One move, whatever becomes of it.
fn one(
    scene: &Scene,
    cell: &Cell,
    way: Way,
    (from, to): (&Host, &Host),
    rate: Option<u64>,
) -> Move {
    let mut moved = Move {
        cell: cell.name,
        way: way.name(),
        link: cell.link.name(),
        from: from.name().into(),
        to: to.name().into(),
        load: record::load(),
        ..Move::default()
    };
    let ready = way.ready(from, to).and_then(|()| Clients::start(scene, cell, rate));
    let done = ready.and_then(|clients| measure(clients, way, (from, to), &mut moved));
    if let Err(e) = done {
        moved.error = Some(format!("{e:#}"));
    }
    moved
}

/// Who talks to the container while it moves.
#[derive(Default)]
struct Clients {
    /// Asks every millisecond.
    asks: Option<Client>,
    /// Tries a new connection every millisecond.
    connects: Option<Reporter<Connected>>,
    /// Asks at a fixed rate.
    offers: Option<Load>,
    /// Asks without pause.
    load: Option<Job>,
}

impl Clients {
    fn start(scene: &Scene, cell: &Cell, rate: Option<u64>) -> Result<Self> {
        let mut clients = Self { load: cell.workload.load(scene)?, ..Self::default() };
        let (client, ask) = (scene.lab.client(), cell.workload.ask());
        if let Some(rate) = rate {
            // Nobody else: it is the throughput that is measured.
            clients.offers = Some(Load::start(scene, cell.workload, rate)?);
            sleep(throughput::BASELINE);
            return Ok(clients);
        }
        if let (Watch::NewConnections, Some(Ask { address, say, .. })) = (cell.watch, &ask) {
            let words = format!("connect {address} --say {say}");
            clients.connects = Some(Reporter::start(client, &words)?);
        }
        clients.asks = ask.map(|ask| client::start(client, &ask)).transpose()?;
        sleep(BEFORE);
        Ok(clients)
    }
}

fn measure(clients: Clients, way: Way, (from, to): (&Host, &Host), moved: &mut Move) -> Result<()> {
    let options = if clients.offers.is_some() { throughput::OPTIONS } else { "" };
    let (sent, cpu) = (record::sent(from), used(from, to));
    let peaks = (Peak::begin(from), Peak::begin(to));
    let begun = SystemTime::now();
    let took = way.go(from, to, options);
    let ended = SystemTime::now();
    if took.is_ok() {
        wait_for_memory(to)?;
    }
    moved.sent = record::sent(from).zip(sent).map(|(now, then)| now.saturating_sub(then));
    moved.cpu_s = used(from, to).zip(cpu).map(|(now, then)| now - then);
    sleep(AFTER);
    // First the move's error: it explains the client's.
    moved.add(took?);
    moved.client = clients.asks.map(Client::finish).transpose()?;
    moved.new = clients.connects.map(Reporter::finish).transpose()?;
    let report = moved.report.as_ref();
    moved.throughput = clients.offers.map(|l| l.finish((begun, ended), report)).transpose()?;
    if let Some(load) = clients.load {
        let output = load.stop()?.stdout;
        let report: serde_json::Value = serde_json::from_str(output.trim())?;
        moved.load_lost = report["errors"].as_array().map_or(0, Vec::len);
    }
    moved.peak_source = peaks.0.and_then(Peak::end);
    moved.peak_destination = peaks.1.and_then(Peak::end);
    Ok(())
}

/// Processor time of both hosts so far, seconds.
fn used(from: &Host, to: &Host) -> Option<f64> {
    Some(record::cpu(from)? + record::cpu(to)?)
}

/// Waits until ferry serves no memory there any more. Nothing is run for it: it would be measured.
fn wait_for_memory(host: &Host) -> Result<()> {
    let (stores, begun) = (host.root().join("run/ferry/pages"), Instant::now());
    while fs::read_dir(&stores).is_ok_and(|mut stores| stores.next().is_some()) {
        ensure!(begun.elapsed() < FILL, "memory is not in its place after {FILL:?}");
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn set_link(scene: &Scene, link: Link) -> Result<()> {
    for host in scene.lab.hosts() {
        host.run(&link.command())?;
    }
    Ok(())
}
