//! The ways of moving: by hand, and ferry's modes.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use ferry_tests::scene::{FLOATING, RUNTIME, migrate_command};
use ferry_tests::{Host, Scene};
use serde_json::Value;

use crate::hand;
use crate::workloads::Workload;

/// Id of ferry's container.
const ID: &str = "bench";

/// Makes a host as if nothing had run on it, whatever state a failed move has left.
const CLEAN: &str = "
for id in $(ctr container ls -q); do
    ctr task rm --force $id
    ctr container rm $id
done
runc delete --force hand
rm -rf /run/hand
ip addr del $FLOATING/24 dev eth0
iptables -F
nft flush ruleset
ferry drop --all
true";

/// How a container is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Way {
    /// runc checkpoint, tar over ssh, runc restore
    Hand,
    /// ferry, all memory inside the pause
    Stop,
    /// ferry, pre-copy
    Pre,
    /// ferry as it decides itself
    Auto,
}

impl Way {
    /// For tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hand => "hand",
            Self::Stop => "stop",
            Self::Pre => "pre",
            Self::Auto => "auto",
        }
    }

    /// Whether both move the same container.
    pub(crate) fn shares_with(self, other: Self) -> bool {
        (self == Self::Hand) == (other == Self::Hand)
    }

    /// Starts `workload` with the floating address on `host`; `other` is prepared for it.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) fn start(self, workload: Workload, host: &Host, other: &Host) -> Result<()> {
        if self == Self::Hand {
            return hand::start(workload, host, other);
        }
        host.run(&format!(
            "ip addr add {FLOATING}/24 dev eth0; ctr run -d --null-io --net-host \
             --runtime {RUNTIME} {} {ID} {}",
            workload.image(),
            workload.command()
        ))?;
        Ok(())
    }

    /// Moves it.
    ///
    /// # Errors
    /// When it did not arrive.
    pub(crate) fn go(self, from: &Host, to: &Host) -> Result<Took> {
        if self == Self::Hand {
            return hand::go(from, to);
        }
        let options = format!("--ip {FLOATING}/24 --json --mode {}", self.name());
        let command = migrate_command(ID, to, &options);
        let output = from.output(&command)?;
        if !output.status.success() {
            bail!("{command}: {output}");
        }
        let report: Value = serde_json::from_str(&output.stdout)
            .with_context(|| format!("decode {}", output.stdout))?;
        Took::of_ferry(report)
    }
}

/// What a move took, by its own account.
pub(crate) struct Took {
    /// Frozen to running, milliseconds.
    pub(crate) pause_ms: f64,
    /// The parts of the pause and their milliseconds.
    pub(crate) steps: Vec<(String, f64)>,
    /// From the command's start to its end, milliseconds.
    pub(crate) total_ms: f64,
    /// Resident memory before the move, bytes.
    pub(crate) resident: u64,
    /// ferry's report.
    pub(crate) report: Option<Value>,
}

impl Took {
    fn of_ferry(report: Value) -> Result<Self> {
        let ms = |value: &Value| value.as_f64().map(|us| us / 1000.0);
        let downtime = &report["downtime"];
        let parts = ["freeze", "dump", "transfer", "restore", "network"];
        let steps = parts
            .iter()
            .filter_map(|part| Some((part.to_string(), ms(&downtime[format!("{part}_us")])?)))
            .collect();
        Ok(Self {
            pause_ms: ms(&downtime["total_us"]).context("no downtime in the report")?,
            steps,
            total_ms: ms(&report["total_us"]).context("no total time in the report")?,
            resident: report["resident"].as_u64().context("no resident memory in the report")?,
            report: Some(report),
        })
    }
}

/// Removes every container and all that moves can have left.
///
/// # Errors
/// When a host cannot be reached.
pub(crate) fn clean(scene: &Scene) -> Result<()> {
    for host in scene.lab.hosts() {
        host.run(&format!("FLOATING={FLOATING}\n{CLEAN}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_steps_of_a_report_are_read_in_order() {
        let took = Took::of_ferry(json!({
            "downtime": { "freeze_us": 500, "dump_us": 8000, "restore_us": 11_000, "total_us": 20_000 },
            "total_us": 900_000,
            "resident": 42,
        }))
        .unwrap();
        assert_eq!((took.pause_ms, took.total_ms, took.resident), (20.0, 900.0, 42));
        let steps: Vec<_> = took.steps.iter().map(|(name, ms)| (name.as_str(), *ms)).collect();
        assert_eq!(steps, [("freeze", 0.5), ("dump", 8.0), ("restore", 11.0)]);
        assert!(Took::of_ferry(json!({})).is_err());
    }
}
