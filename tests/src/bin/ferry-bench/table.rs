//! The results as tables, for a terminal and in Markdown: what clients wait for, what it costs, and
//! the parts of the pause.

use std::fmt::Write;

use crate::record::{Move, Setting};
use crate::stats::Summary;
use crate::throughput::Throughput;

/// Columns of words, which begin at the left.
const WORDS: usize = 2;

/// What is told of the moves of one cell in one way.
pub(crate) struct Row {
    /// The cell and the way.
    pub(crate) names: [&'static str; 2],
    /// Moves that were tried.
    moves: usize,
    failed: usize,
    lost: usize,
    /// Milliseconds.
    pub(crate) pause: Option<Summary>,
    gap: Option<Summary>,
    new: Option<Summary>,
    /// Seconds.
    total: Option<Summary>,
    cpu: Option<Summary>,
    /// MB.
    sent: Option<Summary>,
    resident: Option<Summary>,
    peak_source: Option<Summary>,
    peak_destination: Option<Summary>,
    /// Peak on the destination, in parts of what is resident.
    times: Option<Summary>,
    /// Throughput while tracked and copied, percent of the baseline.
    kept: Option<Summary>,
    /// The parts of the pause, median milliseconds.
    steps: Vec<(String, f64)>,
}

/// A table: its header, then its lines.
type Table = Vec<Vec<String>>;

impl Row {
    /// The rows of `moves`, in the order in which they first appear.
    pub(crate) fn all(moves: &[Move]) -> Vec<Self> {
        let mut names = Vec::new();
        for name in moves.iter().map(|m| [m.cell, m.way]) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let of = |[cell, way]: [&'static str; 2]| {
            let mine: Vec<_> = moves.iter().filter(|m| m.cell == cell && m.way == way).collect();
            Self::of([cell, way], &mine)
        };
        // Ways of a cell side by side.
        names.sort_by_key(|name| names_first(moves, name[0]));
        names.into_iter().map(of).collect()
    }

    fn of(names: [&'static str; 2], moves: &[&Move]) -> Self {
        let sum = |value: fn(&Move) -> Option<f64>| {
            Summary::of(moves.iter().filter_map(|moved| value(moved)))
        };
        let mut steps: Vec<(String, f64)> = Vec::new();
        if let Some(first) = moves.iter().find(|m| !m.steps.is_empty()) {
            for (n, (name, _)) in first.steps.iter().enumerate() {
                let values = moves.iter().filter_map(|m| m.steps.get(n)).map(|(_, ms)| *ms);
                steps.extend(Summary::of(values).map(|s| (name.clone(), s.p50)));
            }
        }
        Self {
            names,
            moves: moves.len(),
            failed: moves.iter().filter(|m| m.error.is_some()).count(),
            lost: moves.iter().map(|m| m.lost()).sum(),
            pause: sum(|m| m.pause_ms),
            gap: sum(|m| m.client.as_ref().map(|seen| seen.longest_gap_ms)),
            new: sum(|m| m.new.as_ref().map(|new| new.longest_gap_ms)),
            total: sum(|m| m.total_ms.map(|ms| ms / 1000.0)),
            cpu: sum(|m| m.cpu_s),
            sent: sum(|m| megabytes(m.sent)),
            resident: sum(|m| megabytes(m.resident)),
            peak_source: sum(|m| megabytes(m.peak_source)),
            peak_destination: sum(|m| megabytes(m.peak_destination)),
            times: sum(|m| Some(m.peak_destination? as f64 / m.resident? as f64)),
            kept: sum(|m| m.throughput.as_ref().and_then(Throughput::kept).map(|k| k * 100.0)),
            steps,
        }
    }

    /// The parts of the pause in one line.
    fn steps(&self) -> String {
        let parts: Vec<_> = self.steps.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        parts.join(", ")
    }
}

fn megabytes(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| bytes as f64 / 1e6)
}

fn names_first(moves: &[Move], cell: &str) -> Option<usize> {
    moves.iter().position(|m| m.cell == cell)
}

/// What clients wait for.
fn waits(rows: &[Row]) -> Table {
    let header = [
        "moves",
        "failed",
        "lost",
        "pause p50",
        "p95",
        "p99",
        "max",
        "gap p50",
        "p95",
        "p99",
        "max",
        "new p50",
        "max",
    ];
    table(&header, rows, |row| {
        let mut cells: Vec<_> = [row.moves, row.failed, row.lost].map(|n| n.to_string()).into();
        for summary in [row.pause, row.gap] {
            cells.extend([
                figure(summary, |s| s.p50, 1),
                figure(summary, |s| s.p95, 1),
                figure(summary, |s| s.p99, 1),
                figure(summary, |s| s.max, 1),
            ]);
        }
        cells.extend([figure(row.new, |s| s.p50, 1), figure(row.new, |s| s.max, 1)]);
        cells
    })
}

/// What it costs.
fn costs(rows: &[Row]) -> Table {
    let header = [
        "total s",
        "cpu s",
        "resident MB",
        "sent MB",
        "source +MB",
        "destination +MB",
        "of resident",
        "max",
        "kept %",
        "min",
    ];
    table(&header, rows, |row| {
        vec![
            figure(row.total, |s| s.p50, 2),
            figure(row.cpu, |s| s.p50, 2),
            figure(row.resident, |s| s.p50, 0),
            figure(row.sent, |s| s.p50, 1),
            figure(row.peak_source, |s| s.p50, 1),
            figure(row.peak_destination, |s| s.p50, 1),
            figure(row.times, |s| s.p50, 2),
            figure(row.times, |s| s.max, 2),
            figure(row.kept, |s| s.p50, 1),
            figure(row.kept, |s| s.min, 1),
        ]
    })
}

fn steps(rows: &[Row]) -> Table {
    table(&["parts of the pause, median ms"], rows, |row| vec![row.steps()])
}

/// A table of `rows`; `header` is for what `cells` says of each.
fn table(header: &[&str], rows: &[Row], cells: impl Fn(&Row) -> Vec<String>) -> Table {
    let names = ["cell", "way"].into_iter().chain(header.iter().copied());
    let line = |row: &Row| row.names.map(str::to_owned).into_iter().chain(cells(row)).collect();
    [names.map(str::to_owned).collect()].into_iter().chain(rows.iter().map(line)).collect()
}

fn figure(summary: Option<Summary>, of: fn(Summary) -> f64, digits: usize) -> String {
    summary.map_or("-".to_owned(), |s| format!("{:.digits$}", of(s)))
}

/// For a terminal.
pub(crate) fn plain(rows: &[Row]) -> String {
    let tables = [waits(rows), costs(rows), steps(rows)];
    tables.map(|table| aligned(&table)).join("\n")
}

fn aligned(table: &Table) -> String {
    let columns = table.first().map_or(0, Vec::len);
    let width = |n: usize| table.iter().map(|line| line[n].len()).max().unwrap_or_default();
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in table {
        for (n, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            // Words, and the parts of the pause, begin at the left.
            let _ = match n < WORDS || columns == WORDS + 1 {
                true => write!(text, "{cell:<width$}  "),
                false => write!(text, "{cell:>width$}  "),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// In Markdown, with all that is needed to read it later.
pub(crate) fn markdown(rows: &[Row], setting: &Setting) -> String {
    let mut text = String::new();
    for table in [waits(rows), costs(rows), steps(rows)] {
        for (n, line) in table.iter().enumerate() {
            let _ = writeln!(text, "| {} |", line.join(" | "));
            if n == 0 {
                let rule = |n| if n < WORDS { "---" } else { "---:" };
                let rules: Vec<_> = (0..line.len()).map(rule).collect();
                let _ = writeln!(text, "| {} |", rules.join(" | "));
            }
        }
        text.push('\n');
    }
    let Setting { machine, command, load } = setting;
    let _ =
        write!(text, "{NOTES}\n\n{machine}; load averages before: {load}\n\n```\n{command}\n```\n");
    text
}

/// What the figures are.
pub(crate) const NOTES: &str = "\
Pause, gap and new in milliseconds, percentiles by nearest rank; what has no name is a median.

- pause: ferry's by its report, from the write to the freezer until the address was announced; by \
hand and with podman from the start of the checkpoint to the announcement.
- gap: the longest time from one answer to the next of a client that asks every millisecond.
- new: the same of a client that tries a new connection every millisecond: from the freeze to the \
first answer on a new one.
- total: the whole command; by hand with lazy pages until the last page was fetched.
- cpu: of all that runs on both hosts, the container too, until its memory is in its place.
- sent: what left the source's interface; through a Unix socket what ferry wrote to it.
- source +MB, destination +MB: the most memory of all that runs on that host, beyond what was in use \
before, by the high-water mark of its cgroup (not sampled). On the destination that is the container \
itself, images, pages in the store and programs; `of resident` is its part of what was resident.
- kept: commands that redis has done per second while its memory was tracked and copied, in percent \
of those just before, at a fixed offered load of half a core.";

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
