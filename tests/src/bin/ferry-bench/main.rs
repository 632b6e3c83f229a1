//! `ferry-bench`: how long moves take, by hand and with ferry, side by side. Called by `hack/bench`.
//!
//! ```text
//!  cells     workload x ways x link              what is moved
//!  run       there and back, ways interleaved    one client asks every millisecond
//!  record    every single move                   --json
//!  stats     percentiles by nearest rank
//!  table     terminal, --markdown      svg --svg      profile --profile
//! ```
//!
//! The pause is from the freezer to the running tasks: ferry's as it reports it, by hand as the
//! script's clock shows it. The client's gap is what a user notices.

mod cells;
mod client;
mod hand;
mod profile;
mod record;
mod run;
mod stats;
mod svg;
mod table;
mod ways;
mod workloads;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use ferry_tests::{Scene, sweep};
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
    /// Move containers between test hosts, by hand and with ferry, and measure
    Migrate(Migrate),
    /// Ask a server every millisecond until the input ends
    #[command(hide = true)]
    Ask(client::Ask),
}

#[derive(Args)]
struct Migrate {
    /// What to run, instead of the goal cells and one of each workload; may be repeated
    #[arg(long, value_name = "NAME")]
    cell: Vec<String>,
    /// The ways of moving, instead of those that the cell has; may be repeated
    #[arg(long)]
    way: Vec<Way>,
    /// Moves in each way, instead of the cell's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    moves: Option<u32>,
    /// Show the cells
    #[arg(long)]
    list: bool,
    /// Write every single move there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table there
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
        Action::Ask(ask) => client::run(&ask).map(|()| true),
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
        let ways: Vec<_> = cell.ways.iter().map(|way| way.name()).collect();
        let mark = if cell.default { "*" } else { " " };
        let (name, link, ways) = (cell.name, cell.link.name(), ways.join(" "));
        say!("{mark} {name:<18} {link:<10} {ways:<20} {:>3} moves in each way", cell.moves);
    }
    say!("* runs when no cell is named");
}

/// Whether ferry's moves all arrived with every connection.
fn migrate(options: &Migrate) -> Result<bool> {
    let cells = chosen(&options.cell)?;
    let scene = Scene::start()?;
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
        let ways = if options.way.is_empty() { cell.ways } else { &options.way };
        let count = options.moves.map_or(cell.moves, |n| n as usize);
        let done = run::cell(&scene, cell, ways, count, |moved| {
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
    let ferry_is_clean = moves.iter().filter(|m| m.way != Way::Hand.name()).all(clean);
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
