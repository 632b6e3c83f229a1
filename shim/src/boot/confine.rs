//! Where a new shim lives: its cgroup, its OOM score, its core scheduling.

use anyhow::{Context as _, Result};
use std::path::Path;

/// The highest score, of who is killed first.
const MOST: i32 = 1000;

/// Moves the shim into `cgroup`, if given, and has the kernel kill it before containerd when memory is
/// short.
pub(super) fn confine(pid: u32, cgroup: &str) -> Result<()> {
    if !cgroup.is_empty() {
        ferry_oci::cgroups::enter(Path::new(cgroup), pid)
            .with_context(|| format!("move the shim into the cgroup {cgroup}"))?;
    }
    let parent = std::os::unix::process::parent_id();
    let score = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .context("read containerd's OOM score")?;
    let score: i32 = score.trim().parse().context("read containerd's OOM score")?;
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), (score + 1).min(MOST).to_string())
        .context("set the shim's OOM score")
}

/// Gives this process group, with the shim that it starts, a core scheduling cookie of its own: no
/// other's threads run beside its threads on a core.
// One call, which takes numbers only.
#[allow(unsafe_code)]
pub(super) fn own_core() -> std::io::Result<()> {
    let (create, whole_group): (libc::c_ulong, libc::c_ulong) =
        (libc::PR_SCHED_CORE_CREATE as libc::c_ulong, 2);
    // SAFETY: prctl(PR_SCHED_CORE) takes integers, and without PR_SCHED_CORE_GET no pointer.
    let done = unsafe { libc::prctl(libc::PR_SCHED_CORE, create, 0, whole_group, 0) };
    nix::errno::Errno::result(done).map(drop).map_err(Into::into)
}
