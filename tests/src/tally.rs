//! A container that counts in memory and in a file, so that one can see whether both are of one moment.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Host;
use crate::ctr::{until, wait_for_status};

/// Counts in memory, and in a file.
pub const COUNTS: &str = "i=0; while :; do i=$((i+1)); echo $i >> /log; usleep 200; done";

/// The same with one process alone: podman has its runtime pause a container anywhere, and one in the middle of
/// a vfork cannot be dumped. Waits at a FIFO that nobody writes to.
pub const COUNTS_ALONE: &str = "mkfifo /wait; exec 9<>/wait; i=0; while :; do i=$((i+1)); echo $i >> /log; \
     read -t 0.01 x <&9; done";

/// Lines of the file that the container of process `pid` counts in; fails unless each is one more than the
/// one before.
///
/// # Errors
/// When it is not, or cannot be read.
pub fn counted_by(host: &Host, pid: &str) -> Result<usize> {
    let log = host.run(&format!("cat /proc/{}/root/log", pid.trim()))?.stdout;
    for (number, line) in (1..).zip(log.lines()) {
        ensure!(line == number.to_string(), "process {pid}: line {number} is {line:?}");
    }
    Ok(log.lines().count())
}

/// [`counted_by`] task `id`.
///
/// # Errors
/// As there.
pub fn counted(host: &Host, id: &str) -> Result<usize> {
    let pid = host.run(&format!("ctr task ls | awk '$1 == \"{id}\" {{print $2}}'"))?.stdout;
    counted_by(host, &pid).with_context(|| id.to_owned())
}

/// Waits until task `id` has counted on.
///
/// # Errors
/// When it does not.
pub fn counts_on(host: &Host, id: &str) -> Result<()> {
    let before = counted(host, id)?;
    until(&format!("{id} counts on"), || Ok(counted(host, id)? > before))
}

/// Ends and removes container `id`.
///
/// # Errors
/// When it does not end.
pub fn end(host: &Host, id: &str) -> Result<()> {
    host.run(&format!("ctr task kill -s KILL {id}"))?;
    wait_for_status(host, id, "STOPPED")?;
    host.run(&format!("ctr task rm {id}; ctr container rm {id}")).map(drop)
}

/// What `command` prints, which is JSON.
///
/// # Errors
/// When it fails, or it is none.
pub fn json(host: &Host, command: &str) -> Result<Value> {
    let output = host.run(command)?;
    serde_json::from_str(&output.stdout).with_context(|| format!("{command}: {output}"))
}

/// Runs `command`, which has to refuse what it is asked; what it says.
///
/// # Errors
/// When it does not.
pub fn refused(host: &Host, command: &str) -> Result<String> {
    let output = host.output(command)?;
    ensure!(!output.status.success(), "{command} was not refused: {output}");
    Ok(output.stderr)
}
