//! What a container gets done while its memory is tracked and copied, beside what it got done just
//! before.
//!
//! ```text
//!  load at a fixed rate ────────────────────────────────────────────────────▶
//!  · baseline ·│ connect ─ plan ─ ... │ precopy: tracked and copied │ freeze ─ ...
//!              └ the move begins      └─── the window ───┘
//! ```
//!
//! Both windows are taken from the same run of the load, at every move anew: what the machine does
//! besides changes from minute to minute. The rate is the one at which redis takes half a core.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Host, Scene};
use serde::Serialize;
use serde_json::Value;

use crate::offer::Done;
use crate::reporter::Reporter;
use crate::workloads::{REDIS, Workload};

/// How long the baseline is.
pub(crate) const BASELINE: Duration = Duration::from_secs(6);
/// Most bytes per second of pre-copy: half of 1 Gbit/s, so that it takes several seconds.
pub(crate) const OPTIONS: &str = "--bandwidth 60M";
/// Part of a core that the load is to take.
const SHARE: f64 = 0.5;
/// The first rate that is tried, commands per second.
const FIRST: u64 = 10_000;
/// No machine is that slow, or that fast.
const LEAST: u64 = 100;
const MOST: u64 = 1_000_000;
/// How often the rate is corrected.
const TRIALS: usize = 3;

/// One move under load.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Throughput {
    /// Commands offered per second.
    pub(crate) offered: u64,
    /// Commands done in each second of the baseline.
    pub(crate) baseline: Vec<u64>,
    /// The same while memory was tracked and copied.
    pub(crate) tracked: Vec<u64>,
}

impl Throughput {
    /// What was done while memory was copied, in parts of the baseline.
    pub(crate) fn kept(&self) -> Option<f64> {
        let mean = |seconds: &[u64]| match seconds.len() {
            0 => None,
            count => Some(seconds.iter().sum::<u64>() as f64 / count as f64),
        };
        Some(mean(&self.tracked)? / mean(&self.baseline)?)
    }
}

/// A load that runs.
pub(crate) struct Load {
    reporter: Reporter<Done>,
    rate: u64,
    begun: SystemTime,
}

impl Load {
    /// Starts it, `rate` commands per second.
    ///
    /// # Errors
    /// When it does not connect.
    pub(crate) fn start(scene: &Scene, workload: Workload, rate: u64) -> Result<Self> {
        let keys = workload.keys().max(1);
        let words = format!("offer {REDIS} --keys {keys} --rate {rate}");
        let reporter = Reporter::start(scene.lab.client(), &words)?;
        Ok(Self { reporter, rate, begun: SystemTime::now() })
    }

    /// Ends it. The move has run from `start` until just now `end`, and `report` is ferry's of it.
    ///
    /// # Errors
    /// When the connection was lost, or no pre-copy was long enough to be measured.
    pub(crate) fn finish(
        self,
        (start, end): (SystemTime, SystemTime),
        report: Option<&Value>,
    ) -> Result<Throughput> {
        let done = self.reporter.finish()?;
        if let Some(error) = done.error {
            anyhow::bail!("the load was lost: {error}");
        }
        let (from, to) = report.and_then(|report| copied(report, end)).context("no pre-copy")?;
        let throughput = Throughput {
            offered: self.rate,
            baseline: done.per_second(self.begun, start),
            tracked: done.per_second(from, to),
        };
        ensure!(
            !throughput.baseline.is_empty() && !throughput.tracked.is_empty(),
            "pre-copy took {:?}: too short to be measured",
            to.duration_since(from).unwrap_or_default()
        );
        Ok(throughput)
    }
}

/// When memory was tracked and copied, in a move that has ended at `end`.
fn copied(report: &Value, end: SystemTime) -> Option<(SystemTime, SystemTime)> {
    let phases = report["phases"].as_array()?;
    let micros = |phase: &Value| phase["micros"].as_u64().map(Duration::from_micros);
    // The phases follow each other; what is after them is the end of the program.
    let place = phases.iter().position(|phase| phase["phase"] == "precopy")?;
    let after: Duration = phases[place + 1..].iter().filter_map(micros).sum();
    let to = end.checked_sub(after)?;
    Some((to.checked_sub(micros(&phases[place])?)?, to))
}

/// The rate at which redis on `host` takes half a core.
///
/// # Errors
/// When it cannot be tried.
pub(crate) fn half_a_core(scene: &Scene, workload: Workload, host: &Host) -> Result<u64> {
    let mut rate = FIRST;
    for _ in 0..TRIALS {
        let before = used(host)?;
        let load = Load::start(scene, workload, rate)?;
        sleep(Duration::from_secs(1));
        let done = load.reporter.finish()?;
        // By command, so that it does not matter what else has kept the processors from redis.
        let commands: u64 = done.tenths.values().sum();
        let cost = (used(host)? - before) / commands as f64;
        ensure!(cost.is_finite() && cost > 0.0, "redis takes no time: {:?}", done.error);
        rate = ((SHARE / cost) as u64).clamp(LEAST, MOST);
    }
    Ok(rate)
}

/// Processor time of redis on `host` so far, seconds.
fn used(host: &Host) -> Result<f64> {
    let pids = host.run("pgrep -x redis-server")?.stdout;
    let proc = host.root().join("proc");
    let mut nanos = 0.0;
    for pid in pids.split_whitespace() {
        let tasks = proc.join(pid).join("task");
        for task in fs::read_dir(&tasks).context("look for redis")?.flatten() {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            nanos += text.split(' ').next().and_then(|n| n.parse::<f64>().ok()).unwrap_or_default();
        }
    }
    Ok(nanos / 1e9)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use serde_json::json;

    use super::*;

    #[test]
    fn pre_copy_ended_before_all_that_came_after_it() {
        let report = json!({"phases": [
            {"phase": "plan", "micros": 500_000}, {"phase": "precopy", "micros": 4_000_000},
            {"phase": "dump", "micros": 30_000}, {"phase": "finish", "micros": 20_000},
        ]});
        let at = |ms| UNIX_EPOCH + Duration::from_millis(ms);
        assert_eq!(copied(&report, at(9050)), Some((at(5000), at(9000))));
        assert_eq!(copied(&json!({"phases": []}), at(9050)), None);
    }

    #[test]
    fn what_was_kept_is_the_mean_of_one_by_the_mean_of_the_other() {
        let throughput =
            Throughput { offered: 10, baseline: vec![10, 10, 10], tracked: vec![8, 10] };
        assert_eq!(throughput.kept(), Some(0.9));
        assert_eq!(Throughput::default().kept(), None);
    }
}
