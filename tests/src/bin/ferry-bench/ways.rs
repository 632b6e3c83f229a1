//! The ways of moving: by hand, with podman, and ferry's modes.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use ferry_tests::host::SHARED;
use ferry_tests::scene::{FLOATING, RUNTIME};
use ferry_tests::{Host, Scene};
use serde_json::Value;

use crate::workloads::Workload;
use crate::{hand, podman};

/// Id of ferry's container.
const ID: &str = "bench";

/// Makes a host as if nothing had run on it, whatever state a failed move has left. The agent stays.
const CLEAN: &str = "
for id in $(ctr container ls -q); do
    ctr task rm --force $id
    ctr container rm $id
done
runc delete --force hand
for pid in $(pgrep -x criu); do kill -9 $pid; done
rm -rf /run/hand
ip addr del $FLOATING/24 dev eth0
iptables -F
nft flush ruleset
ferry drop --all";

/// Has an agent listen at the socket `$1`.
const LISTEN: &str = r#"
[ -S $1 ] || setsid ferry agent --listen unix://$1 </dev/null >/var/log/ferry-agent.log 2>&1 &
n=0
until [ -S $1 ]; do
    n=$((n + 1))
    [ $n -lt 500 ] || { cat /var/log/ferry-agent.log >&2; exit 1; }
    sleep 0.01
done"#;

/// How a container is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Way {
    /// runc checkpoint, tar over ssh, runc restore
    Hand,
    /// the same with CRIU's lazy pages: the memory is fetched once it runs
    HandLazy,
    /// podman container checkpoint --export, copy, restore --import
    Podman,
    /// ferry, all memory inside the pause
    Stop,
    /// ferry, pre-copy
    Pre,
    /// ferry as it decides itself
    Auto,
    /// the same through a Unix socket instead of ssh
    AutoUnix,
}

/// Ways that move the same container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Hand,
    Podman,
    Ferry,
}

impl Way {
    /// For tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hand => "hand",
            Self::HandLazy => "hand-lazy",
            Self::Podman => "podman",
            Self::Stop => "stop",
            Self::Pre => "pre",
            Self::Auto => "auto",
            Self::AutoUnix => "auto-unix",
        }
    }

    fn family(self) -> Family {
        match self {
            Self::Hand | Self::HandLazy => Family::Hand,
            Self::Podman => Family::Podman,
            Self::Stop | Self::Pre | Self::Auto | Self::AutoUnix => Family::Ferry,
        }
    }

    /// Whether both move the same container.
    pub(crate) fn shares_with(self, other: Self) -> bool {
        self.family() == other.family()
    }

    /// Whether it is ferry that moves.
    pub(crate) fn is_ferry(self) -> bool {
        self.family() == Family::Ferry
    }

    /// Whether `name` is that of a way without ferry.
    pub(crate) fn is_rival(name: &str) -> bool {
        Self::value_variants().iter().any(|way| way.name() == name && !way.is_ferry())
    }

    /// Starts `workload` with the floating address on `host`; `other` is prepared for it.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) fn start(self, workload: Workload, host: &Host, other: &Host) -> Result<()> {
        match self.family() {
            Family::Hand => return hand::start(workload, host, other),
            Family::Podman => return podman::start(workload, host, other),
            Family::Ferry => {}
        }
        host.run(&format!(
            "ip addr add {FLOATING}/24 dev eth0; ctr run -d --null-io --net-host \
             --runtime {RUNTIME} {} {ID} {}",
            workload.image(),
            workload.command()
        ))?;
        Ok(())
    }

    /// Makes both hosts ready for a move, of which this is no part: nothing of an earlier one is left
    /// in their memory.
    ///
    /// # Errors
    /// When a host cannot be reached.
    pub(crate) fn ready(self, from: &Host, to: &Host) -> Result<()> {
        for host in [from, to] {
            host.run("rm -rf /run/hand /run/bench")?;
        }
        if self == Self::AutoUnix {
            to.run(&format!("set -- {}\n{LISTEN}", socket(to)))?;
        }
        Ok(())
    }

    /// Moves it; `more` are options for ferry.
    ///
    /// # Errors
    /// When it did not arrive.
    pub(crate) fn go(self, from: &Host, to: &Host, more: &str) -> Result<Took> {
        let ssh = format!("ssh://root@{}", to.address());
        match self {
            Self::Hand => hand::go(from, to, false),
            Self::HandLazy => hand::go(from, to, true),
            Self::Podman => podman::go(from, to),
            Self::Stop | Self::Pre | Self::Auto => ferry(from, &ssh, self.name(), more),
            Self::AutoUnix => {
                let mut took = ferry(from, &format!("unix://{}", socket(to)), "auto", more)?;
                // Not through the interface.
                took.sent = took.report.as_ref().and_then(|r| r["bytes"]["total"].as_u64());
                Ok(took)
            }
        }
    }
}

/// Where the agent on `host` listens.
fn socket(host: &Host) -> String {
    format!("{SHARED}/agent-{}.sock", host.name())
}

/// Runs ferry.
fn ferry(from: &Host, to: &str, mode: &str, more: &str) -> Result<Took> {
    let command =
        format!("ferry migrate {ID} --to {to} --ip {FLOATING}/24 --json --mode {mode} {more}");
    let output = from.output(&command)?;
    if !output.status.success() {
        bail!("{command}: {output}");
    }
    let report: Value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("decode {}", output.stdout))?;
    Took::of_ferry(report)
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
    /// Bytes that were sent, where the interface does not count them.
    pub(crate) sent: Option<u64>,
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
            sent: None,
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
        host.run(&format!("FLOATING={FLOATING}\n{CLEAN}\n{}\ntrue", podman::clean()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_are_those_of_the_command_line_and_rivals_are_not_ferry() {
        for way in Way::value_variants() {
            let value = way.to_possible_value().unwrap();
            assert_eq!(value.get_name(), way.name());
            assert_eq!(Way::is_rival(way.name()), !way.is_ferry());
        }
        assert!(Way::Hand.shares_with(Way::HandLazy) && !Way::Hand.shares_with(Way::Podman));
        assert!(Way::Stop.shares_with(Way::AutoUnix) && !Way::Auto.shares_with(Way::Hand));
    }

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
