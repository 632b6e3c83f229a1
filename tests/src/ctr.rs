//! Containers through `ctr`, with ferry and with containerd's own shim, the reference.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Host, Output};

/// Ferry's runtime.
pub const FERRY: &str = "io.containerd.ferry.v2";
/// containerd's own.
pub const REFERENCE: &str = "io.containerd.runc.v2";
/// Both: where the reference fails too, the test is wrong.
pub const RUNTIMES: [&str; 2] = [REFERENCE, FERRY];
/// An image with a shell and the usual small programs.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// An image with python3 besides.
pub const PYTHON: &str = "docker.io/library/python:latest";
/// A process that does nothing, and that CRIU does not disturb (`sleep` ends when it is dumped).
pub const IDLE: &str = "tail -f /dev/null";
/// How long something may take that happens by itself.
pub const SOON: Duration = Duration::from_secs(60);

/// What there is of containers on a host.
const TRACES: &str = "\
    ls /run/containerd/runc/default /run/ferry/s \
       /run/containerd/io.containerd.runtime.v2.task/default 2>/dev/null | grep -v :; \
    grep -o '/run/containerd/[^ ]*/rootfs' /proc/mounts; pgrep -a containerd-shim; \
    ls /run/containerd/s";

/// `ctr run` in the background.
///
/// # Errors
/// When it fails.
pub fn start(host: &Host, runtime: &str, options: &str, id: &str, command: &str) -> Result<()> {
    host.run(&format!("ctr run -d --runtime {runtime} {options} {BUSYBOX} {id} {command}"))?;
    Ok(())
}

/// Status of task `id`, as `ctr task ls` has it; empty if there is none.
///
/// # Errors
/// When the host cannot be asked.
pub fn status(host: &Host, id: &str) -> Result<String> {
    let list = host.run("ctr task ls")?.stdout;
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
    let status = line.and_then(|line| line.split_whitespace().nth(2));
    Ok(status.unwrap_or_default().to_string())
}

/// Waits until the status of task `id` is `expected`.
///
/// # Errors
/// When it does not come to that.
pub fn wait_for_status(host: &Host, id: &str, expected: &str) -> Result<()> {
    until(&format!("task {id} is {expected}"), || Ok(status(host, id)? == expected))
        .with_context(|| format!("it is {:?}", status(host, id).unwrap_or_default()))
}

/// Asks until something is `done`.
///
/// # Errors
/// When asking fails, or it is not done soon.
pub fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !done()? {
        ensure!(Instant::now() < deadline, "waited {SOON:?} until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Ends and removes container `id`; returns the exit code of its task.
///
/// # Errors
/// When it does not end.
pub fn remove(host: &Host, id: &str) -> Result<i32> {
    if status(host, id)? != "STOPPED" {
        host.run(&format!("ctr task kill -s KILL {id}"))?;
        wait_for_status(host, id, "STOPPED")?;
    }
    let deleted = host.output(&format!("ctr task rm {id}; echo; ctr container rm {id}"))?;
    let code = deleted.stderr.split("exit with non-zero exit code ").nth(1);
    let code = code.and_then(|code| code.split(|c: char| !c.is_ascii_digit()).next());
    code.map_or(Ok(0), |code| code.parse().with_context(|| format!("read {}", deleted.stderr)))
}

/// Runs `command` on the host until it prints `text`; what it printed.
///
/// # Errors
/// With what it says instead.
pub fn wait_for(host: &Host, command: &str, text: &str) -> Result<Output> {
    let mut last = host.output(command)?;
    until(&format!("`{command}` says {text:?}"), || {
        let found = last.stdout.contains(text);
        if !found {
            last = host.output(command)?;
        }
        Ok(found)
    })
    .with_context(|| format!("it says {last}"))?;
    Ok(last)
}

/// Fails if a container has left something on the host.
///
/// # Errors
/// With what there is.
pub fn assert_nothing_left(host: &Host) -> Result<()> {
    assert_prints_nothing(host, TRACES)
}

/// Fails unless `traces`, a command that lists what should not be there, soon prints nothing.
///
/// # Errors
/// With what it prints.
pub fn assert_prints_nothing(host: &Host, traces: &str) -> Result<()> {
    let mut left = String::new();
    until("nothing is left behind", || {
        left = host.run(&format!("{traces}; true"))?.stdout;
        Ok(left.trim().is_empty())
    })
    .with_context(|| format!("left behind:\n{left}"))
}

/// Pids of the shims on the host.
///
/// # Errors
/// When the host cannot be asked.
pub fn shims(host: &Host) -> Result<Vec<i32>> {
    let list = host.run("pgrep containerd-shim || true")?.stdout;
    list.lines().map(|pid| pid.parse().with_context(|| format!("read {list}"))).collect()
}
