//! What a shim costs beside containerd's own: memory while its container idles, and time until a
//! command has run. Both are measured in the same run, in turns.

mod latency;
mod memory;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use ferry_tests::scene::RUNTIME;
use ferry_tests::{Host, Lab};
use serde_json::json;

use crate::record::Setting;
use crate::write;

/// containerd's own.
const REFERENCE: &str = "io.containerd.runc.v2";
/// In the order of the table's columns.
const RUNTIMES: [&str; 2] = [RUNTIME, REFERENCE];
const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// A process that does nothing.
const IDLE: &str = "tail -f /dev/null";

#[derive(Args)]
pub(crate) struct Shim {
    /// Idle containers with each shim
    #[arg(long, value_name = "NUMBER", default_value_t = 20)]
    containers: u32,
    /// Runs of a command with each shim
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    runs: u32,
    /// Write every single value there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table there
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// A figure of both shims.
#[derive(serde::Serialize)]
struct Row {
    what: &'static str,
    unit: &'static str,
    /// How many times the reference's ferry's may be, where there is a goal.
    goal: Option<f64>,
    /// Of ferry and of the reference, as measured.
    values: [Vec<f64>; 2],
}

/// Measures and prints. Whether the goals are reached.
pub(crate) fn run(options: &Shim) -> Result<bool> {
    let lab = Lab::start(1)?;
    let host = lab.host("a");
    let setting = Setting::of(host).context("ferry has not been built")?;
    println!("{}; load averages {}", setting.machine, setting.load);
    let mut rows = Vec::new();
    if options.containers > 0 {
        rows.extend(memory::measure(host, options.containers)?);
    }
    if options.runs > 0 {
        rows.extend(latency::measure(host, options.runs)?);
    }
    drop(lab);
    print!("\n{}", table::plain(&rows));
    if let Some(path) = &options.json {
        write(path, &format!("{:#}\n", json!({ "setting": setting, "rows": rows })))?;
    }
    if let Some(path) = &options.markdown {
        write(path, &table::markdown(&rows, &setting))?;
    }
    Ok(rows.iter().all(|row| row.reaches_goal() != Some(false)))
}

/// Starts an idle container that keeps its output as `ctr` and `nerdctl` do.
fn start(host: &Host, runtime: &str, id: &str) -> Result<()> {
    host.run(&format!("ctr run -d --runtime {runtime} {BUSYBOX} {id} {IDLE}")).map(drop)
}
