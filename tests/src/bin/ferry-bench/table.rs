//! The results as a table, for a terminal and in Markdown.

use std::fmt::Write;

use crate::record::{Move, Setting};
use crate::stats::Summary;

const HEADER: [&str; 15] = [
    "cell",
    "way",
    "moves",
    "failed",
    "lost",
    "pause p50",
    "p95",
    "p99",
    "max",
    "gap p50",
    "gap max",
    "total s",
    "sent MB",
    "of MB",
    "cpu s",
];
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
    total: Option<Summary>,
    sent: Option<Summary>,
    resident: Option<Summary>,
    cpu: Option<Summary>,
    /// The parts of the pause, median milliseconds.
    steps: Vec<(String, f64)>,
}

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
            total: sum(|m| m.total_ms.map(|ms| ms / 1000.0)),
            sent: sum(|m| m.sent.map(|bytes| bytes as f64 / 1e6)),
            resident: sum(|m| m.resident.map(|bytes| bytes as f64 / 1e6)),
            cpu: sum(|m| m.cpu_s),
            steps,
        }
    }

    fn cells(&self) -> [String; 15] {
        let figure = |summary: Option<Summary>, of: fn(Summary) -> f64, digits: usize| {
            summary.map_or("-".to_owned(), |s| format!("{:.digits$}", of(s)))
        };
        [
            self.names[0].into(),
            self.names[1].into(),
            self.moves.to_string(),
            self.failed.to_string(),
            self.lost.to_string(),
            figure(self.pause, |s| s.p50, 1),
            figure(self.pause, |s| s.p95, 1),
            figure(self.pause, |s| s.p99, 1),
            figure(self.pause, |s| s.max, 1),
            figure(self.gap, |s| s.p50, 1),
            figure(self.gap, |s| s.max, 1),
            figure(self.total, |s| s.p50, 2),
            figure(self.sent, |s| s.p50, 1),
            figure(self.resident, |s| s.p50, 0),
            figure(self.cpu, |s| s.p50, 2),
        ]
    }

    /// The parts of the pause in one line.
    fn steps(&self) -> String {
        let parts: Vec<_> = self.steps.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        parts.join(", ")
    }
}

fn names_first(moves: &[Move], cell: &str) -> Option<usize> {
    moves.iter().position(|m| m.cell == cell)
}

/// For a terminal.
pub(crate) fn plain(rows: &[Row]) -> String {
    let mut lines = vec![HEADER.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let width = |n: usize| lines.iter().map(|line| line[n].len()).max().unwrap_or_default();
    let mut text = String::new();
    for line in &lines {
        for (n, cell) in line.iter().enumerate() {
            let width = width(n);
            let _ = match n < WORDS {
                true => write!(text, "{cell:<width$}  "),
                false => write!(text, "{cell:>width$}  "),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text.push_str("\nparts of the pause, median ms:\n");
    for row in rows {
        let _ = writeln!(text, "  {} {}: {}", row.names[0], row.names[1], row.steps());
    }
    text
}

/// In Markdown, with all that is needed to read it later.
pub(crate) fn markdown(rows: &[Row], setting: &Setting) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&HEADER.map(str::to_owned));
    let rule = |n| if n < WORDS { "---" } else { "---:" }.to_owned();
    text.push_str(&line(&std::array::from_fn::<_, 15, _>(rule)));
    for row in rows {
        text.push_str(&line(&row.cells()));
    }
    text.push_str("\n| cell | way | parts of the pause, median ms |\n| --- | --- | --- |\n");
    for row in rows {
        text.push_str(&line(&[row.names[0].into(), row.names[1].into(), row.steps()]));
    }
    let Setting { machine, command, load } = setting;
    let _ = write!(
        text,
        "\nPauses and gaps in milliseconds, percentiles by nearest rank; total, sent, resident \
         memory and processor time of both hosts are medians. The pause is ferry's by its report, \
         from the freezer on; by hand from the start of `runc checkpoint` to the announcement of \
         the address. The gap, from one answer to the next of a client that asks every \
         millisecond, is measured alike.\n\n{machine}; load averages before: \
         {load}\n\n```\n{command}\n```\n"
    );
    text
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
