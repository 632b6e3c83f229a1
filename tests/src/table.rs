//! The table that `hack/test` shows at its end: what ferry does and what the reference does. Tests add
//! to a file, since they run in many processes.

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::{Context, Result};

/// Names the file.
const FILE: &str = "FERRY_TABLE";
/// Names the containerd that the tests run with, when it is not the usual one.
const VERSION: &str = "FERRY_CONTAINERD";

/// Adds a row: `area` groups rows, `case` says what was done; then what came of it with each.
///
/// # Errors
/// When the file cannot be written.
pub fn row(area: &str, case: &str, ferry: &str, reference: &str) -> Result<()> {
    let Some(path) = std::env::var_os(FILE) else { return Ok(()) };
    let version = std::env::var(VERSION).unwrap_or_default();
    let cells = [&version, area, case, ferry, reference].map(|cell| cell.replace(['|', '\n'], " "));
    let mut file =
        OpenOptions::new().append(true).create(true).open(path).context("open the table")?;
    // One write, so that rows of several processes do not mix.
    file.write_all(format!("{}\n", cells.join("|")).as_bytes()).context("add to the table")
}
