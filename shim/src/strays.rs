//! What goes on without its shim when that dies in a restore: runc and CRIU, which would bring the
//! container back with nobody to look after it. There is no container yet that runc could delete.

use crate::error::{Context as _, Error, Result};
use ferry_oci::cgroups;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long what was killed may take to be gone. containerd gives all of a cleanup 5 s.
const LIMIT: Duration = Duration::from_millis(1500);
const BETWEEN: Duration = Duration::from_millis(20);

/// Ends the commands of `runc` that work on `bundle`, and all that they have started.
pub(crate) fn end(runc: &Path, bundle: &Path) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let left = commands(runc, bundle);
        if left.is_empty() {
            break;
        }
        in_time(end, "runc and CRIU")?;
        for pid in left {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        std::thread::sleep(BETWEEN);
    }
    Ok(())
}

/// Note in the bundle that its container is being made in cgroups that were nobody's.
const CLAIM: &str = "ferry-cgroups";

/// Until runc knows the container of `bundle`, all that is in its cgroups is its own, and ends with it. Not
/// so where something runs in them already.
pub(crate) fn claim_cgroups(bundle: &Path) -> Result<()> {
    match cgroups_path(bundle)? {
        Some(path) if cgroups::are_empty(&path) => {
            std::fs::write(bundle.join(CLAIM), "").context("claim the container's cgroups")
        }
        _ => Ok(()),
    }
}

/// The `cgroupsPath` of what is claimed.
fn claimed_cgroups(bundle: &Path) -> Result<Option<PathBuf>> {
    if bundle.join(CLAIM).exists() { cgroups_path(bundle) } else { Ok(None) }
}

/// Kills what is in the cgroups of the container of `bundle`, which runc does not know.
pub(crate) fn kill_members(bundle: &Path) -> Result<()> {
    claimed_cgroups(bundle).map(|path| path.iter().for_each(|path| cgroups::kill_members(path)))
}

/// runc knows the container: others may come into its cgroups.
pub(crate) fn give_up_claim(bundle: &Path) {
    let _ = std::fs::remove_file(bundle.join(CLAIM));
}

/// Removes the cgroups of the container of `bundle`, which runc does not know, with what is in them.
pub(crate) fn remove_cgroups(bundle: &Path) -> Result<()> {
    let end = Instant::now() + LIMIT;
    let Some(path) = claimed_cgroups(bundle)? else { return Ok(()) };
    while !cgroups::remove_empty(&path) {
        in_time(end, "the container's cgroups")?;
        cgroups::kill_members(&path);
        std::thread::sleep(BETWEEN);
    }
    Ok(())
}

fn in_time(end: Instant, what: &str) -> Result<()> {
    match Instant::now() < end {
        true => Ok(()),
        false => Err(Error::deadline_exceeded(format!("{what} are not gone in {LIMIT:?}"))),
    }
}

/// Those of `runc` that were given a file in `bundle`, and their descendants. None that has ended.
fn commands(runc: &Path, bundle: &Path) -> HashSet<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids: Vec<u32> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let mut found: HashSet<u32> =
        pids.iter().copied().filter(|pid| is_command(*pid, runc, bundle)).collect();
    // A child may stand before its parent.
    loop {
        let more: Vec<u32> = pids
            .iter()
            .copied()
            .filter(|pid| !found.contains(pid))
            .filter(|pid| cgroups::parent(*pid).is_some_and(|parent| found.contains(&parent)))
            .collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    found.retain(|pid| !cgroups::has_ended(*pid));
    found
}

fn is_command(pid: u32, runc: &Path, bundle: &Path) -> bool {
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words =
        text.split(|byte| *byte == 0).map(|word| Path::new(std::ffi::OsStr::from_bytes(word)));
    let program = words.next().and_then(Path::file_name);
    program.is_some() && program == runc.file_name() && words.any(|word| word.starts_with(bundle))
}

fn cgroups_path(bundle: &Path) -> Result<Option<PathBuf>> {
    /// All that is wanted of a spec: one that is decoded as a whole leaves its traces in the memory of every shim.
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Spec {
        linux: Linux,
    }
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Linux {
        cgroups_path: Option<PathBuf>,
    }
    let config = match std::fs::read(bundle.join("config.json")) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        config => config.context("read the bundle's config")?,
    };
    let spec: Spec = serde_json::from_slice(&config).context("read the bundle's config")?;
    Ok(spec.linux.cgroups_path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_command_on_the_bundle_ends_with_its_children_and_another_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("runc");
        std::fs::copy("/bin/bash", &program).unwrap();
        let start = |bundle: &str| {
            let script = "sleep 1000 & wait";
            let log = dir.path().join(bundle).join("log.json");
            let mut command = Command::new(&program);
            command.args(["-c", script]).arg(log).stdout(Stdio::null());
            command.spawn().unwrap()
        };
        let (mut mine, mut other) = (start("mine"), start("other"));
        let bundle = dir.path().join("mine");
        while commands(Path::new("runc"), &bundle).len() < 2 {
            std::thread::sleep(BETWEEN);
        }
        end(Path::new("/some/where/runc"), &bundle).unwrap();
        assert!(!mine.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        end(Path::new("runc"), &dir.path().join("other")).unwrap();
        other.wait().unwrap();
    }
}
