//! The table that `hack/test` shows at its end: what ferry does and what the reference does. Tests add
//! to a file, since they run in many processes.

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::{Context, Result};

/// Names the file.
const FILE: &str = "FERRY_TABLE";
/// Name the containerd and the runtime that the tests run with, where they are not the usual ones.
const VERSIONS: [&str; 2] = ["FERRY_CONTAINERD", "FERRY_RUNC"];

/// Adds a row: `area` groups rows, `case` says what was done; then what came of it with each.
///
/// # Errors
/// When the file cannot be written.
pub fn row(area: &str, case: &str, ferry: &str, reference: &str) -> Result<()> {
    let Some(path) = std::env::var_os(FILE) else { return Ok(()) };
    let version = VERSIONS.map(|name| std::env::var(name).unwrap_or_default()).join(" ");
    let version = version.trim();
    let cells = [version, area, case, ferry, reference].map(|cell| cell.replace(['|', '\n'], " "));
    let mut file =
        OpenOptions::new().append(true).create(true).open(path).context("open the table")?;
    // One write, so that rows of several processes do not mix.
    file.write_all(format!("{}\n", cells.join("|")).as_bytes()).context("add to the table")
}
