//! `ferry-bench`: how long moves take, by hand and with ferry, side by side; and what the shim costs.
//! Called by `hack/bench`.
//!
//! ```text
//!  cells     workload x ways x link              what is moved
//!  ways      ferry's modes; hand, podman (script)
//!  run       there and back, ways interleaved
//!    client      asks every millisecond              the gap
//!    connect     connects every millisecond          the first answer on a new connection
//!    throughput  a fixed load (offer)                what is kept while memory is copied
//!    peak        high-water marks                    memory that it takes
//!  record    every single move                   --json
//!  stats     percentiles by nearest rank
//!  table     terminal, --markdown      svg --svg      profile --profile
//!  shim      memory and time of the shim beside containerd's own
//! ```
//!
//! The pause is from the freezer to the running tasks: ferry's as it reports it, by hand as the
//! script's clock shows it. The client's gap is what a user notices.

mod cells;
mod client;
mod connect;
mod hand;
mod offer;
mod peak;
mod podman;
mod profile;
mod record;
mod reporter;
mod run;
mod script;
mod shim;
mod stats;
mod svg;
mod table;
mod throughput;
mod ways;
mod workloads;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use ferry_tests::{Scene, layers, sweep};
use serde_json::json;

use cells::Cell;
use record::{Move, Setting};
use table::Row;
use ways::Way;

/// Prints a line. That nobody reads on is no error.
macro_rules! say {
    ($($text:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

#[derive(Parser)]
#[command(about = "How long moves take")]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Move containers between test hosts, by hand, with podman and with ferry, and measure
    #[command(after_long_help = table::NOTES)]
    Migrate(Migrate),
    /// Measure memory and start of the shim beside containerd's own
    Shim(shim::Shim),
    /// Ask a server every millisecond until the input ends
    #[command(hide = true)]
    Ask(client::Ask),
    /// Connect to a server every millisecond until the input ends
    #[command(hide = true)]
    Connect(connect::Connect),
    /// Put a fixed load on redis until the input ends
    #[command(hide = true)]
    Offer(offer::Offer),
}

#[derive(Args)]
struct Migrate {
    /// What to run, instead of the goal cells and one of each workload (about 20 minutes on a machine
    /// that has nothing else to do); may be repeated
    #[arg(long, value_name = "NAME")]
    cell: Vec<String>,
    /// The ways of moving, instead of those that the cell has; may be repeated
    #[arg(long)]
    way: Vec<Way>,
    /// Moves in each way, instead of the cell's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    moves: Option<u32>,
    /// Show the cells with their ways
    #[arg(long)]
    list: bool,
    /// Write every single move there, with ferry's own report of it
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables there
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the pauses there
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Show the timeline of the last move of each cell and way
    #[arg(long)]
    profile: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Action::Migrate(options) if options.list => {
            list();
            Ok(true)
        }
        Action::Migrate(options) => sweep::remove_at_signal().and_then(|()| migrate(&options)),
        Action::Shim(options) => match sweep::remove_at_signal().and_then(|()| shim::run(&options))
        {
            Ok(false) => {
                eprintln!("ferry-bench: a goal is missed, see above");
                return ExitCode::FAILURE;
            }
            done => done,
        },
        Action::Ask(ask) => client::run(&ask).map(|()| true),
        Action::Connect(connect) => connect::run(&connect).map(|()| true),
        Action::Offer(offer) => offer::run(&offer).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("ferry-bench: moves failed or connections were lost, see above");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("ferry-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn list() {
    for cell in cells::all() {
        let ways: Vec<_> =
            cell.ways.iter().map(|(way, moves)| format!("{} {moves}", way.name())).collect();
        let mark = if cell.default { "*" } else { " " };
        say!("{mark} {:<18} {:<10} {}", cell.name, cell.link.name(), ways.join(", "));
    }
    say!("Numbers are moves in each way; * runs when no cell is named.");
}

/// Whether ferry's moves all arrived with every connection.
fn migrate(options: &Migrate) -> Result<bool> {
    let moves = options.moves.map(|n| n as usize);
    let cells: Vec<_> =
        chosen(&options.cell)?.into_iter().map(|cell| cell.with(&options.way, moves)).collect();
    let podman = cells.iter().any(|cell| cell.ways.iter().any(|(way, _)| *way == Way::Podman));
    let layers: Result<Vec<_>> = podman.then(|| layers::PODMAN.ensure()).into_iter().collect();
    let scene = Scene::start_over(&layers?)?;
    let me = std::env::current_exe().context("find this program")?;
    scene.lab.client().install(&me, "/usr/local/bin/ferry-bench")?;
    let setting = Setting::of(scene.host("a"))?;
    say!("{}; load averages {}", setting.machine, setting.load);

    let mut moves: Vec<Move> = Vec::new();
    let mut skipped = Vec::new();
    for cell in &cells {
        let (needed, there) = (cell.memory_needed(), record::available_memory());
        if there < needed {
            skipped.push(format!("{}: needs {needed} MB of memory, {there} are free", cell.name));
            continue;
        }
        let done = run::cell(&scene, cell, |moved| {
            say!("{}", moved.line());
            moves.push(moved);
        });
        if let Err(e) = done {
            skipped.push(format!("{}: {e:#}", cell.name));
        }
    }
    drop(scene);
    report(options, &moves, &skipped, &setting)?;
    let clean = |m: &Move| m.error.is_none() && m.lost() == 0;
    let ferry_is_clean = moves.iter().filter(|m| !Way::is_rival(m.way)).all(clean);
    Ok(ferry_is_clean && skipped.is_empty())
}

fn chosen(names: &[String]) -> Result<Vec<Cell>> {
    let all = cells::all();
    if names.is_empty() {
        return Ok(all.into_iter().filter(|cell| cell.default).collect());
    }
    let find = |name: &String| match all.iter().find(|cell| cell.name == *name) {
        Some(cell) => Ok(cell.clone()),
        None => bail!("there is no cell {name}, see --list"),
    };
    names.iter().map(find).collect()
}

fn report(options: &Migrate, moves: &[Move], skipped: &[String], setting: &Setting) -> Result<()> {
    let rows = Row::all(moves);
    if options.profile {
        for [cell, way] in rows.iter().map(|row| row.names) {
            let mut mine = moves.iter().rev().filter(|m| m.cell == cell && m.way == way);
            mine.next().into_iter().for_each(|moved| say!("\n{}", profile::timeline(moved)));
        }
    }
    say!("\n{}", table::plain(&rows));
    for reason in skipped {
        say!("skipped: {reason}");
    }
    let all = json!({ "setting": setting, "skipped": skipped, "moves": moves });
    let files = [
        (&options.json, format!("{all:#}\n")),
        (&options.markdown, table::markdown(&rows, setting)),
        (&options.svg, svg::draw(&rows, setting)),
    ];
    for (path, text) in files {
        path.as_deref().map_or(Ok(()), |path| write(path, &text))?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
