//! Memory of shims whose containers idle.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::Host;

use super::{RUNTIMES, Row, start};

/// How long the last container has run before its shim is looked at.
const SETTLED: Duration = Duration::from_secs(3);

/// A line for each task: its id, then what the kernel counts for its shim, in kB. The shim is the
/// parent of the container's first process.
const ASK: &str = r#"
    ctr task ls | while read -r id pid status; do
        [ "$status" = RUNNING ] || continue
        shim=$(awk '$1 == "PPid:" {print $2}' /proc/$pid/status)
        awk -v id=$id '
            $1 == "Rss:" { rss = $2 }
            $1 == "Pss:" { pss = $2 }
            $1 ~ /^Private_(Clean|Dirty):/ { private += $2 }
            $1 == "Threads:" { threads = $2 }
            END { print id, pss, private, rss, threads }
        ' /proc/$shim/smaps_rollup /proc/$shim/status
    done"#;

/// The columns of [`ASK`], and the share of the reference's that is aimed at.
const FIGURES: [(&str, &str, Option<f64>); 4] = [
    ("idle shim, PSS", "kB", Some(1.0 / 3.0)),
    ("idle shim, private", "kB", None),
    ("idle shim, RSS", "kB", None),
    ("idle shim, threads", "", None),
];

/// Starts `containers` with each shim, and removes them again.
pub(super) fn measure(host: &Host, containers: u32) -> Result<Vec<Row>> {
    let id = |which: usize, n: u32| format!("{}-{n}", ["ferry", "reference"][which]);
    let all: Vec<_> = (0..containers).flat_map(|n| [(0, n), (1, n)]).collect();
    for (which, n) in &all {
        start(host, RUNTIMES[*which], &id(*which, *n))?;
    }
    std::thread::sleep(SETTLED);
    let seen = parse(&host.run(ASK)?.stdout)?;
    for (which, n) in &all {
        host.run(&format!("ctr task rm -f {0}; ctr container rm {0}", id(*which, *n)))?;
    }
    let column = |at: usize, which: usize| -> Result<Vec<f64>> {
        let of = |n: u32| seen.get(&id(which, n)).and_then(|values| values.get(at)).copied();
        (0..containers)
            .map(|n| of(n).with_context(|| format!("{} is missing", id(which, n))))
            .collect()
    };
    let rows = FIGURES.iter().enumerate();
    rows.map(|(at, (what, unit, goal))| {
        Ok(Row { what, unit, goal: *goal, values: [column(at, 0)?, column(at, 1)?] })
    })
    .collect()
}

fn parse(text: &str) -> Result<BTreeMap<String, Vec<f64>>> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let id = words.next().unwrap_or_default().to_owned();
        let values: Vec<f64> = words.filter_map(|word| word.parse().ok()).collect();
        ensure!(values.len() == FIGURES.len(), "{line:?} is not what a shim uses");
        Ok((id, values))
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_that_could_not_be_asked_is_no_figure() {
        assert_eq!(parse("a 1 2 3 4\n").unwrap()["a"], [1.0, 2.0, 3.0, 4.0]);
        assert!(parse("a    4\n").is_err());
    }
}
