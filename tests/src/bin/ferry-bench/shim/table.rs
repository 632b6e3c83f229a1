//! The figures of both shims side by side.

use std::fmt::Write;

use super::Row;
use crate::record::Setting;
use crate::stats::Summary;

const HEADER: [&str; 8] = ["", "values", "ferry p50", "p95", "runc.v2 p50", "p95", "ratio", "goal"];

impl Row {
    /// Ferry's median in parts of the reference's.
    fn ratio(&self) -> Option<f64> {
        let [ferry, reference] = self.values.each_ref().map(|values| median(values));
        Some(ferry? / reference?)
    }

    /// None where there is no goal.
    pub(super) fn reaches_goal(&self) -> Option<bool> {
        Some(self.ratio()? <= self.goal?)
    }

    fn cells(&self) -> Vec<String> {
        let figure = |value: f64| match self.unit {
            "ms" => format!("{value:.1} ms"),
            "" => format!("{value}"),
            unit => format!("{value} {unit}"),
        };
        let mut cells = vec![self.what.to_owned(), self.values[0].len().to_string()];
        for values in &self.values {
            let summary = Summary::of(values.iter().copied());
            let of = |pick: fn(Summary) -> f64| summary.map_or("-".into(), |s| figure(pick(s)));
            cells.extend([of(|s| s.p50), of(|s| s.p95)]);
        }
        cells.push(self.ratio().map_or("-".into(), |ratio| format!("{ratio:.3}")));
        cells.push(match (self.goal, self.reaches_goal()) {
            (Some(goal), Some(true)) => format!("<= {goal:.2}"),
            (Some(goal), _) => format!("<= {goal:.2} MISSED"),
            (None, _) => "-".into(),
        });
        cells
    }
}

fn median(values: &[f64]) -> Option<f64> {
    Summary::of(values.iter().copied()).map(|summary| summary.p50)
}

fn lines(rows: &[Row]) -> Vec<Vec<String>> {
    let header = HEADER.map(str::to_owned).to_vec();
    [header].into_iter().chain(rows.iter().map(Row::cells)).collect()
}

/// For a terminal.
pub(super) fn plain(rows: &[Row]) -> String {
    let lines = lines(rows);
    let width = |n: usize| lines.iter().map(|line| line[n].len()).max().unwrap_or_default();
    let widths: Vec<_> = (0..HEADER.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(n, (cell, width))| match n {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

/// With where and how it was measured.
pub(super) fn markdown(rows: &[Row], setting: &Setting) -> String {
    let mut text =
        format!("`{}`: {}; load averages {}\n\n", setting.command, setting.machine, setting.load);
    for (n, line) in lines(rows).iter().enumerate() {
        let _ = writeln!(text, "| {} |", line.join(" | "));
        if n == 0 {
            let _ = writeln!(text, "|---|{}", "---:|".repeat(HEADER.len() - 1));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ferry: f64, goal: Option<f64>) -> Row {
        Row { what: "memory", unit: "kB", goal, values: [vec![ferry, 900.0, 1.0], vec![300.0; 3]] }
    }

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        assert_eq!(row(60.0, None).ratio(), Some(0.2));
        assert_eq!(row(60.0, None).reaches_goal(), None);
        assert_eq!(row(60.0, Some(0.25)).reaches_goal(), Some(true));
        assert!(plain(&[row(90.0, Some(0.25))]).contains("0.300  <= 0.25 MISSED"));
    }
}
