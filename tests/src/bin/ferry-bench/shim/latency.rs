//! How long it takes until a command has run, with either shim in turn.

use anyhow::{Context, Result, ensure};
use ferry_tests::Host;

use super::{BUSYBOX, RUNTIMES, Row, start};

/// Runs of each that are not counted.
const WARM_UP: u32 = 2;

/// Milliseconds of `runs` runs of `$(command N)`, where N is 0 or 1 in turn: lines "N micros".
const TURNS: &str = r#"
    now() { echo ${EPOCHREALTIME/./}; }
    for run in $(seq $runs); do
        for n in $((run % 2)) $(((run + 1) % 2)); do
            start=$(now)
            command $n || exit
            echo $n $(($(now) - start))
        done
    done"#;

pub(super) fn measure(host: &Host, runs: u32) -> Result<Vec<Row>> {
    let run = format!(
        "command() {{ case $1 in 0) ctr run --rm --runtime {} {BUSYBOX} l true;; \
         1) ctr run --rm --runtime {} {BUSYBOX} l true;; esac }}",
        RUNTIMES[0], RUNTIMES[1]
    );
    let exec = "command() { ctr task exec --exec-id l latency-$1 true; }";
    for (n, runtime) in RUNTIMES.iter().enumerate() {
        start(host, runtime, &format!("latency-{n}"))?;
    }
    let rows = [
        ("ctr run --rm busybox true", Some(1.05), turns(host, &run, runs)?),
        ("ctr task exec true", None, turns(host, exec, runs)?),
    ];
    for n in 0..RUNTIMES.len() {
        host.run(&format!("ctr task rm -f latency-{n}; ctr container rm latency-{n}"))?;
    }
    Ok(rows.map(|(what, goal, values)| Row { what, unit: "ms", goal, values }).into())
}

fn turns(host: &Host, command: &str, runs: u32) -> Result<[Vec<f64>; 2]> {
    let script = format!("runs={}\n{command}\n{TURNS}", runs + WARM_UP);
    let mut bash = host.command(&["bash", "-c", &script]);
    let lines = ferry_tests::exec::run(&mut bash)?.stdout;
    let mut values = [Vec::new(), Vec::new()];
    for line in lines.lines() {
        let (n, micros) = line.split_once(' ').with_context(|| format!("{line:?} is no time"))?;
        let column = n.parse().ok().and_then(|n: usize| values.get_mut(n));
        let micros: f64 = micros.parse().with_context(|| format!("{line:?} is no time"))?;
        column.with_context(|| format!("{line:?} is no time"))?.push(micros / 1000.0);
    }
    for column in &mut values {
        ensure!(column.len() == (runs + WARM_UP) as usize, "only {} runs", column.len());
        column.drain(..WARM_UP as usize);
    }
    Ok(values)
}
