//! The tables that `hack/test` shows at its end: what ferry does and what the reference does, and what
//! survives a checkpoint. Tests add to files, since they run in many processes.

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::{Context, Result};

/// Names the file.
const FILE: &str = "FERRY_TABLE";
/// Names that of what survives.
const SURVIVORS: &str = "FERRY_SURVIVORS";
/// Longest cell there, in characters: errors are long.
const LONGEST: usize = 70;
/// Name the containerd and the runtime that the tests run with, where they are not the usual ones.
const VERSIONS: [&str; 2] = ["FERRY_CONTAINERD", "FERRY_RUNC"];

/// Adds a row: `area` groups rows, `case` says what was done; then what came of it with each.
///
/// # Errors
/// When the file cannot be written.
pub fn row(area: &str, case: &str, ferry: &str, reference: &str) -> Result<()> {
    let version = VERSIONS.map(|name| std::env::var(name).unwrap_or_default()).join(" ");
    add(FILE, &[version.trim(), area, case, ferry, reference].map(str::to_owned))
}

/// Adds a row to the table of what survives: what came of `item` on the same host, from host to host,
/// and on the same host with the reference.
///
/// # Errors
/// When the file cannot be written.
pub fn survivor(item: &str, stayed: &str, crossed: &str, reference: &str) -> Result<()> {
    let cells = [item, stayed, crossed, reference];
    add(SURVIVORS, &cells.map(|cell| cell.chars().take(LONGEST).collect()))
}

fn add(table: &str, cells: &[String]) -> Result<()> {
    let Some(path) = std::env::var_os(table) else { return Ok(()) };
    let cells: Vec<_> = cells.iter().map(|cell| cell.replace(['|', '\n'], " ")).collect();
    let mut file =
        OpenOptions::new().append(true).create(true).open(path).context("open the table")?;
    // One write, so that rows of several processes do not mix.
    file.write_all(format!("{}\n", cells.join("|")).as_bytes()).context("add to the table")
}
