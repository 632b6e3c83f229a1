//! Many short execs at once: no exit is lost, no output, and no zombie stays.

use std::fs::File;
use std::io::Read;

use anyhow::{Context, Result, ensure};
use ferry_tests::by_hand::{ByHand, IDLE, Shim, exec_request};
use ferry_tests::events::exits;
use ferry_tests::table;
use ferry_tests::task::api;
use std::time::Duration;

use crate::SHIMS;

const EXECS: usize = 200;
const SOON: Duration = Duration::from_secs(60);

/// Runs exec number `n` from Exec to Delete; what was wrong with it.
fn one(hand: &ByHand<'_>, shim: &Shim, n: usize) -> Result<()> {
    let exec = format!("e{n}");
    let (stdout, mut output): (String, File) = hand.fifo(&format!("{}.{exec}", shim.pid))?;
    let command = format!("echo out{n}; exit {}", n % 7);
    let mut request = exec_request("many", &exec, &["sh", "-c", &command]);
    // The reference takes a stream without one for errors for a mistake.
    (request.stdout, request.stderr) = (stdout.clone(), stdout);
    shim.task.call::<api::Empty>("Exec", &request).context("exec")?;
    shim.start("many", &exec).context("start")?;
    let code = shim.wait("many", &exec).context("wait")?;
    let deleted = shim.delete("many", &exec).context("delete")?;
    ensure!((code as usize, deleted as usize) == (n % 7, n % 7), "codes {code} and {deleted}");
    let mut text = [0; 64];
    let read = output.read(&mut text).unwrap_or_default();
    ensure!(text[..read] == *format!("out{n}\n").as_bytes(), "output {:?}", &text[..read]);
    Ok(())
}

fn all(hand: &ByHand<'_>, shim: &Shim) -> Result<Vec<String>> {
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..EXECS).map(|n| scope.spawn(move || one(hand, shim, n))).collect();
        let done = threads.into_iter().map(|t| t.join().expect("a thread has panicked"));
        let wrong =
            done.enumerate().filter_map(|(n, done)| Some(format!("{n}: {:#}", done.err()?)));
        wrong.collect()
    });
    let complete = |events: &[ferry_tests::events::Event]| {
        let exits = exits(events);
        (0..EXECS).all(|n| exits.get(format!("e{n}").as_str()) == Some(&vec![n as u32 % 7]))
    };
    hand.events.wait_for("many", SOON, complete).context("an exit that is not reported once")?;
    Ok(wrong)
}

#[test]
fn two_hundred_execs_at_once_lose_nothing_and_leave_no_zombie() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let mut results = Vec::new();
    for program in SHIMS {
        let hand = ByHand::on(lab.host("a"))?;
        let shim = hand.shim(program, "many", crate::service()?)?;
        hand.create(&shim, "many", IDLE)?;
        shim.start("many", "")?;
        let wrong = all(&hand, &shim).with_context(|| format!("{program}: {}", shim.log()))?;
        let children = format!("ps -o pid=,stat=,comm= --ppid {}", shim.pid);
        hand.host.wait_until("the shim has reaped all but its container", |h| {
            h.output(&children).is_ok_and(|o| o.stdout.lines().count() == 1)
        })?;
        // The reference can lose the end of an output.
        let (outputs, rest): (Vec<_>, Vec<_>) = wrong.iter().partition(|w| w.contains(": output"));
        println!("{program}: {wrong:?}");
        ensure!(rest.is_empty(), "{program}: {rest:?}");
        ensure!(program != SHIMS[0] || outputs.is_empty(), "{program}: {outputs:?}");
        results.push(format!("{} complete, no zombie", EXECS - wrong.len()));
        shim.has_not_panicked()?;
        hand.clear()?;
        hand.host.run("rm /run/by-hand/events.sock")?;
    }
    table::row("execs", "200 at once", &results[0], &results[1])
}
