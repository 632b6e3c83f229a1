//! What is kept of every move, and the machine it was measured on.

use std::fs;

use anyhow::Result;
use ferry_tests::Host;
use serde::Serialize;
use serde_json::Value;

use crate::client::Seen;
use crate::connect::Connected;
use crate::throughput::Throughput;
use crate::ways::Took;

/// One move, or one that failed.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Move {
    /// Name of the cell.
    pub(crate) cell: &'static str,
    /// Name of the way.
    pub(crate) way: &'static str,
    /// Bandwidth between the hosts.
    pub(crate) link: &'static str,
    /// Host that was left.
    pub(crate) from: String,
    /// Host that was gone to.
    pub(crate) to: String,
    /// Load of the machine before it, average of a minute.
    pub(crate) load: f64,
    /// Frozen to running, milliseconds.
    pub(crate) pause_ms: Option<f64>,
    /// The parts of the pause, milliseconds.
    pub(crate) steps: Vec<(String, f64)>,
    /// The whole move, milliseconds.
    pub(crate) total_ms: Option<f64>,
    /// Resident memory, bytes.
    pub(crate) resident: Option<u64>,
    /// What left the source's interface during the move, bytes; through a Unix socket what ferry
    /// wrote to it.
    pub(crate) sent: Option<u64>,
    /// Most memory that was in use on the source beyond what was before the move, bytes.
    pub(crate) peak_source: Option<u64>,
    /// The same on the destination, until all of the container's memory was in its place.
    pub(crate) peak_destination: Option<u64>,
    /// Processor time of all that runs on both hosts during the move, seconds.
    pub(crate) cpu_s: Option<f64>,
    /// What the client saw.
    pub(crate) client: Option<Seen>,
    /// What the client saw that tries a new connection every millisecond.
    pub(crate) new: Option<Connected>,
    /// What got done under a fixed load.
    pub(crate) throughput: Option<Throughput>,
    /// Connections of the load that were lost.
    pub(crate) load_lost: usize,
    /// Why it failed.
    pub(crate) error: Option<String>,
    /// ferry's own report.
    pub(crate) report: Option<Value>,
}

impl Move {
    /// Adds what the mover says.
    pub(crate) fn add(&mut self, took: Took) {
        self.pause_ms = Some(took.pause_ms);
        self.steps = took.steps;
        self.total_ms = Some(took.total_ms);
        self.resident = Some(took.resident);
        self.sent = took.sent.or(self.sent);
        self.report = took.report;
    }

    /// Connections that clients lost.
    pub(crate) fn lost(&self) -> usize {
        self.load_lost + self.client.as_ref().map_or(0, |seen| seen.lost)
    }

    /// One line for a person.
    pub(crate) fn line(&self) -> String {
        let what = format!("{} {} {} -> {}", self.cell, self.way, self.from, self.to);
        let Some(pause) = self.pause_ms else {
            return format!("{what}: FAILED: {}", self.error.as_deref().unwrap_or("?"));
        };
        let steps: Vec<_> = self.steps.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        let mut more = String::new();
        if let Some(seen) = &self.client {
            more += &format!(", gap {:.1} ms", seen.longest_gap_ms);
        }
        if let Some(new) = &self.new {
            more += &format!(", new connection {:.1} ms", new.longest_gap_ms);
        }
        if let Some(kept) = self.throughput.as_ref().and_then(Throughput::kept) {
            more += &format!(", kept {:.1} %", kept * 100.0);
        }
        format!(
            "{what}: pause {pause:.1} ms ({}){more}, total {:.2} s, lost {}",
            steps.join(", "),
            self.total_ms.unwrap_or_default() / 1000.0,
            self.lost()
        )
    }
}

/// Where and how it was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Setting {
    /// Date, kernel, processors and versions.
    pub(crate) machine: String,
    /// The command line that does it again.
    pub(crate) command: String,
    /// Load averages before the first move.
    pub(crate) load: String,
}

impl Setting {
    /// Asks `host`.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub(crate) fn of(host: &Host) -> Result<Self> {
        let script = "
            echo $(date +%F), kernel $(uname -r), $(nproc) CPUs, \
            $(ferry --version), \
            containerd $(containerd --version | awk '{print $3}'), \
            runc $(runc --version | awk 'NR == 1 {print $3}'), \
            criu $(criu --version | awk 'NR == 1 {print $2}'), \
            redis $(redis-server --version | sed 's/.*v=\\([^ ]*\\).*/\\1/')\
            $(podman --version 2>/dev/null | awk '{print \", podman \" $3}')";
        let words: Vec<_> = std::env::args().skip(1).collect();
        let loads = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Ok(Self {
            machine: host.run(script)?.stdout.trim().to_owned(),
            command: format!("hack/bench {}", words.join(" ")),
            load: loads.split(' ').take(3).collect::<Vec<_>>().join(" "),
        })
    }
}

/// Load of the machine, average of a minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

/// Memory that is free for new programs, MB.
pub(crate) fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().split(' ').next()?.parse().ok()).map_or(0, |kb: u64| kb >> 10)
}

/// Bytes that `host` has sent.
pub(crate) fn sent(host: &Host) -> Option<u64> {
    let file = host.root().join("sys/class/net/eth0/statistics/tx_bytes");
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Processor time of all that ever ran on `host`, seconds.
pub(crate) fn cpu(host: &Host) -> Option<f64> {
    let groups = host.root().join("sys/fs/cgroup");
    if let Ok(nanos) = fs::read_to_string(groups.join("cpuacct/cpuacct.usage")) {
        return nanos.trim().parse::<f64>().ok().map(|nanos| nanos / 1e9);
    }
    let stat = fs::read_to_string(groups.join("cpu.stat")).ok()?;
    let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    micros.parse::<f64>().ok().map(|micros| micros / 1e6)
}
