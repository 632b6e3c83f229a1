//! Running a cell: moves there and back, ways interleaved.
//!
//! ```text
//!  hand a -> b, b -> a · stop a -> b, b -> a · auto a -> b, b -> a · hand a -> b, b -> a · ...
//! ```
//!
//! ferry's ways move the same container, one after the other. The one that is moved by hand is
//! another, which replaces it: two at a time would take each other's memory and processors.

use std::time::Duration;

use anyhow::Result;
use ferry_tests::{Host, Scene};

use crate::cells::{Cell, Link};
use crate::client::Client;
use crate::record::{self, Move};
use crate::ways::{self, Way};
use crate::workloads::Workload;

/// How long clients ask before a move.
const BEFORE: Duration = Duration::from_millis(300);
/// How long they ask after it: a move by hand ends before their packets are sent again.
const AFTER: Duration = Duration::from_millis(1000);

/// Runs `cell`, `moves` times in each of its `ways`; each move is told to `tell`.
///
/// # Errors
/// When a container cannot be started. A move that fails is none.
pub(crate) fn cell(
    scene: &Scene,
    cell: &Cell,
    ways: &[Way],
    moves: usize,
    mut tell: impl FnMut(Move),
) -> Result<()> {
    set_link(scene, cell.link)?;
    let mut running: Option<Way> = None;
    for round in 0..moves.div_ceil(2) {
        for &way in ways {
            if !running.is_some_and(|other| other.shares_with(way)) {
                ways::clean(scene)?;
                start(scene, cell.workload, way)?;
            }
            running = Some(way);
            for (from, to) in [("a", "b"), ("b", "a")].into_iter().take(moves - 2 * round) {
                let moved = one(scene, cell, way, scene.host(from), scene.host(to));
                // One way only: the next move starts at `a` again.
                let stays = moved.error.is_some() || moves == 2 * round + 1;
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
fn one(scene: &Scene, cell: &Cell, way: Way, from: &Host, to: &Host) -> Move {
    let mut moved = Move {
        cell: cell.name,
        way: way.name(),
        link: cell.link.name(),
        from: from.name().into(),
        to: to.name().into(),
        load: record::load(),
        ..Move::default()
    };
    if let Err(e) = measure(scene, cell, way, (from, to), &mut moved) {
        moved.error = Some(format!("{e:#}"));
    }
    moved
}

fn measure(
    scene: &Scene,
    cell: &Cell,
    way: Way,
    (from, to): (&Host, &Host),
    moved: &mut Move,
) -> Result<()> {
    let load = cell.workload.load(scene)?;
    let ask = cell.workload.ask();
    let client = ask.map(|ask| Client::start(scene.lab.client(), &ask)).transpose()?;
    std::thread::sleep(BEFORE);
    let (sent, cpu) = (record::sent(from), used(from, to));
    let took = way.go(from, to);
    moved.sent = record::sent(from).zip(sent).map(|(now, then)| now.saturating_sub(then));
    moved.cpu_s = used(from, to).zip(cpu).map(|(now, then)| now - then);
    std::thread::sleep(AFTER);
    // First the move's error: it explains the client's.
    moved.add(took?);
    moved.client = client.map(Client::finish).transpose()?;
    if let Some(load) = load {
        let output = load.stop()?.stdout;
        let report: serde_json::Value = serde_json::from_str(output.trim())?;
        moved.load_lost = report["errors"].as_array().map_or(0, Vec::len);
    }
    Ok(())
}

/// Processor time of both hosts so far, seconds.
fn used(from: &Host, to: &Host) -> Option<f64> {
    Some(record::cpu(from)? + record::cpu(to)?)
}

fn set_link(scene: &Scene, link: Link) -> Result<()> {
    for host in scene.lab.hosts() {
        host.run(&link.command())?;
    }
    Ok(())
}
