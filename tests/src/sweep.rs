//! Removing a lab: after its test, and after a test that was killed.
//!
//! The id of a test's lab names its owner, so that a lab whose owner is gone is known even if
//! nothing but a cgroup is left of it. Labs made by `hack/testbed` have no owner and stay.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::FlockArg;
use nix::sys::signal::{SigSet, Signal};

use crate::cgroup::{self, Cgroup};
use crate::{cache, process};

/// Run-time state of all labs: process ids, logs, and where their disks are.
pub const STATE: &str = "/run/ferry-testbed";

/// State of lab `id`.
pub fn state(id: &str) -> PathBuf {
    Path::new(STATE).join(id)
}

/// Disks of lab `id`.
pub fn disk(id: &str) -> PathBuf {
    cache::dir().join("labs").join(id)
}

/// An id for lab number `n` of this process.
pub fn owned_id(n: usize) -> String {
    let pid = std::process::id().cast_signed();
    format!("t{pid}-{}-{n}", process::started(pid).unwrap_or_default())
}

/// The owner that an id names, by process id and start time.
fn owner(id: &str) -> Option<(i32, u64)> {
    let mut parts = id.strip_prefix('t')?.split('-');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether the lab's owner is gone.
fn orphaned(id: &str) -> bool {
    owner(id)
        .is_some_and(|(pid, start)| !process::alive(pid) || process::started(pid) != Some(start))
}

/// The ids of all labs of which anything is left.
pub fn labs() -> Result<BTreeSet<String>> {
    let mut ids: BTreeSet<_> = cgroup::labs()?.into_iter().collect();
    for dir in [PathBuf::from(STATE), cache::dir().join("labs")] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            ids.extend(entry.file_name().into_string());
        }
    }
    Ok(ids)
}

/// Removes all labs whose owner is gone. Returns their ids.
pub fn sweep() -> Result<Vec<String>> {
    let _lock = cache::lock("sweep", FlockArg::LockExclusive)?;
    let orphans: Vec<_> = labs()?.into_iter().filter(|id| orphaned(id)).collect();
    for id in &orphans {
        remove(id).with_context(|| format!("remove what was left of lab {id}"))?;
    }
    Ok(orphans)
}

/// Removes lab `id`: processes (and with them namespaces, mounts and interfaces), cgroups, files.
pub fn remove(id: &str) -> Result<()> {
    Cgroup::of_lab(id)?.destroy()?;
    let state = state(id);
    // Another cache may have been in use when the lab was made.
    let disk = fs::read_link(state.join("disk")).unwrap_or_else(|_| disk(id));
    remove_dir(&disk)?;
    remove_dir(&state)?;
    for parent in [disk.parent(), state.parent()].into_iter().flatten() {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

/// Ends this process at SIGINT, SIGTERM or SIGHUP, its labs removed. Must run before other threads.
pub fn remove_at_signal() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().context("block signals")?;
    std::thread::spawn(move || {
        let _ = signals.wait();
        let mine = format!("t{}-", std::process::id());
        for lab in labs().unwrap_or_default() {
            if lab.starts_with(&mine) {
                let _ = remove(&lab);
            }
        }
        std::process::exit(130);
    });
    Ok(())
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_of_this_process_is_not_orphaned() {
        assert!(!orphaned(&owned_id(0)));
    }

    #[test]
    fn a_lab_whose_process_id_is_used_by_another_is_orphaned() {
        assert!(orphaned("t1-1-0") || process::started(1) == Some(1));
        assert!(orphaned(&format!("t{}-1-0", std::process::id())));
    }

    #[test]
    fn a_lab_without_an_owner_stays() {
        assert!(!orphaned("ferry"));
        assert!(!orphaned("two"));
    }
}
