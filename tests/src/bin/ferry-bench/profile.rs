//! The timeline of one move.

use std::fmt::Write;

use serde_json::Value;

use crate::record::Move;

/// Phases, rounds of memory and what else ferry tells, to 0.1 ms; by hand the parts of the pause.
pub(crate) fn timeline(moved: &Move) -> String {
    let mut text = format!("{}\n", moved.line());
    let Some(report) = &moved.report else { return text };
    let mut at = 0.0;
    for phase in list(&report["phases"]) {
        let ms = phase["micros"].as_f64().unwrap_or_default() / 1000.0;
        let name = phase["phase"].as_str().unwrap_or("?");
        let _ = writeln!(text, "  {at:>9.1} ms  {name:<10} {ms:>9.1} ms");
        at += ms;
    }
    for round in list(&report["happened"]["rounds"]) {
        let took = &round["took"];
        let ms = took["secs"].as_f64().unwrap_or_default() * 1e3
            + took["nanos"].as_f64().unwrap_or_default() / 1e6;
        let _ = writeln!(
            text,
            "  round {:>2}{}  {:>8} pages listed, {:>10} bytes, {ms:>9.1} ms",
            number(&round["round"]),
            if round["frozen"] == true { " (frozen)" } else { "         " },
            number(&round["listed"]),
            number(&round["bytes"]),
        );
    }
    for (name, value) in report["happened"].as_object().into_iter().flatten() {
        if name != "rounds" {
            let _ = writeln!(text, "  {name}: {value}");
        }
    }
    text
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn phases_begin_where_the_one_before_ends() {
        let report = json!({
            "phases": [{"phase": "freeze", "micros": 1500}, {"phase": "dump", "micros": 8000}],
            "happened": {
                "rounds": [{"round": 1, "frozen": true, "listed": 5, "bytes": 9,
                            "took": {"secs": 1, "nanos": 500_000}}],
                "scans_hidden": 3,
            },
        });
        let text = timeline(&Move { report: Some(report), ..Move::default() });
        assert!(text.contains("1.5 ms  dump             8.0 ms"), "{text}");
        assert!(text.contains("round  1 (frozen)"), "{text}");
        assert!(text.contains("1000.5 ms"), "{text}");
        assert!(text.contains("scans_hidden: 3"), "{text}");
    }
}
