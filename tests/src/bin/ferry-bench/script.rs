//! What the scripts of the ways without ferry have in common: they print a name and a number per
//! line, and the host's clock at each step.

use anyhow::{Context, Result, ensure};
use ferry_tests::Host;
use ferry_tests::scene::FLOATING;

use crate::ways::Took;

/// Put before every script: `at NAME` prints the time, `resident PID...` their memory.
const COMMON: &str = r#"
set -eu
at() { echo $1 $(date +%s%N); }
resident() {
    echo resident $(for pid in "$@"; do echo /proc/$pid/smaps_rollup; done |
        xargs awk '/^Rss:/ {sum += $2} END {print sum * 1024}')
}
"#;

/// Runs `script` on `from`; it moves a container to `to`, which is `$TO` in it.
///
/// It prints `resident`, then the times `begin`, `start` (of the pause), one for each of `steps`,
/// of which the last ends the pause, and `end` if anything is left to do then.
///
/// # Errors
/// When it fails or prints something else.
pub(crate) fn run(from: &Host, to: &Host, script: &str, steps: &[&str]) -> Result<Took> {
    let variables = format!("FROM={} TO={} FLOATING={FLOATING}", from.address(), to.address());
    let output = from.output(&format!("{variables}\n{COMMON}\n{script}"))?;
    ensure!(output.status.success(), "the move by hand: {output}");
    read(&output.stdout, steps).with_context(|| format!("read {output}"))
}

fn read(text: &str, steps: &[&str]) -> Result<Took> {
    let lines: Vec<(&str, u64)> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, number)| Some((name, number.parse().ok()?)))
        .collect();
    let names: Vec<_> = lines.iter().map(|(name, _)| *name).collect();
    let wanted: Vec<_> = ["resident", "begin", "start"].iter().chain(steps).copied().collect();
    ensure!(
        names.strip_prefix(&wanted[..]).is_some_and(|rest| rest.is_empty() || rest == ["end"]),
        "unexpected lines: {names:?}"
    );
    let ms = |from: usize, to: usize| lines[to].1.saturating_sub(lines[from].1) as f64 / 1e6;
    let restored = wanted.len() - 1;
    Ok(Took {
        pause_ms: ms(2, restored),
        steps: (3..=restored).map(|n| (names[n].to_owned(), ms(n - 1, n))).collect(),
        total_ms: ms(1, lines.len() - 1),
        resident: lines[0].1,
        sent: None,
        report: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_from_its_start_to_the_last_step_and_the_total_to_the_end() {
        let text = "resident 4096\nbegin 1000000\nstart 3000000\ncheckpoint 5000000\n\
                    copy 6500000\nrestore 9000000\n";
        let steps = ["checkpoint", "copy", "restore"];
        let took = read(text, &steps).unwrap();
        assert_eq!((took.pause_ms, took.total_ms, took.resident), (6.0, 8.0, 4096));
        let each: Vec<_> = took.steps.iter().map(|(_, ms)| *ms).collect();
        assert_eq!(each, [2.0, 1.5, 2.5]);
        let took = read(&format!("{text}end 11000000\n"), &steps).unwrap();
        assert_eq!((took.pause_ms, took.total_ms), (6.0, 10.0));
    }

    #[test]
    fn a_script_that_left_a_step_out_is_not_believed() {
        for text in ["resident 1\nbegin 2\n", "resident 1\nbegin 2\nstart 3\ncopy 4\nend 5\n", ""] {
            assert!(read(text, &["checkpoint", "copy"]).is_err(), "{text}");
        }
    }
}
