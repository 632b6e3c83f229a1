//! Output of a container that moves: nothing lost, nothing repeated, never blocked. And the terminal of
//! one that is restored.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::Scene;
use ferry_tests::ctr::wait_for_status;
use ferry_tests::scene::{RUNTIME, traces, wait_for_traces};
use nix::sys::signal::Signal;

/// Numbers in a log, which must follow each other.
fn numbers(text: &str) -> Vec<u64> {
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

fn in_order(numbers: &[u64]) -> bool {
    numbers.windows(2).all(|pair| pair[1] == pair[0] + 1)
}

/// Writes a number every 2 ms.
const COUNT: &str = "sh -c 'n=0; while :; do n=$((n+1)); echo $n; usleep 2000; done'";

#[test]
fn a_log_file_goes_on_where_it_stopped() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    a.run(&format!(
        "ctr run -d --log-uri file:///var/log/box.log --runtime {RUNTIME} \
         docker.io/library/busybox:latest box {COUNT}"
    ))?;
    std::thread::sleep(Duration::from_millis(500));
    scene.try_migrate("box", "a", "b", "")?.checked("ferry migrate")?;
    std::thread::sleep(Duration::from_millis(500));
    let before = numbers(&a.run("cat /var/log/box.log")?.stdout);
    let after = numbers(&b.run("cat /var/log/box.log")?.stdout);
    ensure!(in_order(&before) && before.first() == Some(&1), "on a: {before:?}");
    ensure!(in_order(&after) && after.len() > 50, "on b: {after:?}");
    let (last, first) = (before.last().context("nothing on a")?, after[0]);
    ensure!(first == last + 1, "a ends with {last}, b begins with {first}");
    Ok(())
}

#[test]
fn output_into_a_fifo_goes_on_in_a_file_and_never_blocks() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    // Its client stays in the foreground and reads the FIFO.
    let reader = a.spawn(&format!(
        "exec ctr run --runtime {RUNTIME} docker.io/library/busybox:latest box \
         sh -c 'n=0; while :; do n=$((n+1)); echo $n; echo e$n >&2; usleep 200; done'"
    ))?;
    wait_for_status(a, "box", "RUNNING")?;
    std::thread::sleep(Duration::from_secs(1));
    let output = scene.try_migrate("box", "a", "b", "")?.checked("ferry migrate")?;
    ensure!(output.stdout.contains("/var/log/ferry/default/box/stdout.log"), "{output}");
    // Most of the time this shell waits inside vfork, where CRIU could not stop it.
    ensure!(!output.stdout.contains("tried again"), "{output}");
    std::thread::sleep(Duration::from_secs(1));
    let before = numbers(&reader.stdout());
    let read = |b: &ferry_tests::Host| {
        b.run("cat /var/log/ferry/default/box/stdout.log").map(|o| numbers(&o.stdout))
    };
    let after = read(b)?;
    ensure!(in_order(&before) && in_order(&after), "a {before:?}\nb {after:?}");
    let (last, first) = (before.last().context("nothing on a")?, after.first());
    ensure!(first == Some(&(last + 1)), "a ends with {last}, b begins with {first:?}");
    // More than a pipe holds has been written since, and it still goes on.
    std::thread::sleep(Duration::from_secs(1));
    ensure!(read(b)?.len() > after.len(), "the container stands still");
    let errors = b.run("head -1 /var/log/ferry/default/box/stderr.log")?.stdout;
    ensure!(errors.starts_with('e'), "{errors}");
    Ok(())
}

#[test]
fn output_to_a_log_program_goes_on_in_a_file() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let logger = "#!/bin/sh\nexec 5>&-\n/bin/cat <&3 >/var/log/box.out &\n\
                  /bin/cat <&4 >/var/log/box.err &\nwait\n";
    std::fs::write(a.root().join("usr/local/bin/logger"), logger)?;
    a.run(&format!(
        "chmod +x /usr/local/bin/logger; \
         ctr run -d --log-uri binary:///usr/local/bin/logger --runtime {RUNTIME} \
         docker.io/library/busybox:latest box {COUNT}"
    ))?;
    std::thread::sleep(Duration::from_millis(500));
    let output = scene.try_migrate("box", "a", "b", "")?.checked("ferry migrate")?;
    let log = "/var/log/ferry/default/box/stdout.log";
    ensure!(output.stdout.contains(log), "{output}");
    b.wait_until("it goes on", |b| {
        b.run(&format!("cat {log}")).is_ok_and(|log| numbers(&log.stdout).len() > 50)
    })?;
    // The program stays behind with what it has read, and ends.
    a.wait_until("the log program has ended", |a| a.run("! pgrep -f '[b]in/logger'").is_ok())?;
    let before = numbers(&a.run("cat /var/log/box.out")?.stdout);
    let after = numbers(&b.run(&format!("cat {log}"))?.stdout);
    ensure!(in_order(&before) && before.first() == Some(&1), "on a: {before:?}");
    ensure!(in_order(&after), "on b: {after:?}");
    let (last, first) = (before.last().context("nothing on a")?, after[0]);
    ensure!(first == last + 1, "a ends with {last}, b begins with {first}");
    Ok(())
}

/// Counts as [`COUNT`] does, and says 0 when its input ends.
const READS_TOO: &str = "sh -c 'exec 3<&0; { cat <&3; echo 0; } & \
                         n=0; while :; do n=$((n+1)); echo $n; usleep 2000; done'";

#[test]
fn streams_that_nobody_is_at_any_more_neither_end_nor_hold_a_container_here() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    // This client's FIFOs go with it.
    let mut client = a.spawn(&format!(
        "exec ctr run --runtime {RUNTIME} docker.io/library/busybox:latest box {READS_TOO}"
    ))?;
    client.wait_for("100\n", SOON)?;
    for name in ["one", "two"] {
        a.run(&format!("ferry checkpoint box {name} --exit"))?;
        a.run(&format!("ferry restore {name}"))?;
        std::thread::sleep(Duration::from_millis(300));
    }
    for (from, to) in [("a", "b"), ("b", "a")] {
        scene.try_migrate("box", from, to, "")?.checked("ferry migrate")?;
        std::thread::sleep(Duration::from_millis(300));
    }
    a.run("ctr task kill -s KILL box")?;
    let mut all = numbers(&client.wait(SOON)?.stdout);
    let read = all.len();
    for host in [a, b] {
        let written = numbers(&host.run("cat /var/log/ferry/default/box/stdout.log")?.stdout);
        ensure!(written.len() > 50, "on {}: {written:?}", host.name());
        all.extend(written);
    }
    all.sort_unstable();
    ensure!(read > 50 && in_order(&all) && all.first() == Some(&1), "{all:?}");
    Ok(())
}

/// How long an answer at a terminal may take.
const SOON: Duration = Duration::from_secs(30);

const SIZE: (u16, u16) = (24, 80);

#[test]
fn a_restored_terminal_waits_for_its_client() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let before = [traces(a)?, traces(b)?];
    let run = format!("ctr run --tty --runtime {RUNTIME} docker.io/library/busybox:latest box sh");
    let mut client = a.spawn_at_terminal(&run, SIZE)?;
    let mut typed = client.stdin().context("no input")?;
    // What is typed is echoed, so the answers are no part of it.
    typed.write_all(b"n=41; echo it$((1+1))is\n")?;
    client.wait_for("it2is", SOON)?;
    a.run("ferry checkpoint box held --exit")?;
    client.wait(SOON)?;
    a.run(&format!("ferry push held --to ssh://root@{}", b.address()))?;
    // On another host, and where it was.
    for host in [b, a] {
        for end in ["exit 4", "killed with its shim"] {
            host.run("ferry restore held")?;
            let mut client = host.spawn_at_terminal("ctr task attach box", SIZE)?;
            let mut typed = client.stdin().context("no input")?;
            typed.write_all(b"tty; echo is$((n+1))here\n")?;
            client.wait_for("is42here", SOON)?;
            if end == "exit 4" {
                typed.write_all(b"exit 4\n")?;
                let ended = client.wait(SOON)?;
                ensure!(ended.status.code() == Some(4), "{ended}");
                ensure!(ended.stdout.contains("/dev/pts/"), "{ended}");
            } else {
                // Nobody is there any more who would clear up.
                client.signal(Signal::SIGKILL);
                host.run("pkill -KILL containerd-shim")?;
                host.wait_until("its task is gone", |host| {
                    host.output("ctr task ls -q").is_ok_and(|o| o.stdout.trim().is_empty())
                })?;
            }
        }
        host.run("ctr container rm box && ferry discard held")?;
    }
    for (host, before) in [a, b].into_iter().zip(&before) {
        wait_for_traces(host, before, "after all of it")?;
    }
    Ok(())
}
