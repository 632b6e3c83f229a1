//! The container's freezer, driven through its cgroup file: `runc pause` costs 8 to 12 ms more.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cgroups;

/// Where cgroup hierarchies are mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// How often the state is looked at while it changes.
const POLL: Duration = Duration::from_micros(100);

/// How long a vfork(2) is given to come to its end. It takes well under a millisecond.
const BETWEEN_VFORKS: Duration = Duration::from_millis(2);

/// Why a container could not be frozen or thawed.
#[derive(Debug, thiserror::Error)]
pub enum FreezerError {
    /// The process is in no cgroup that can be frozen.
    #[error("process {0} is in no cgroup that can be frozen")]
    NoFreezer(u32),
    /// A cgroup file could not be read or written.
    #[error("freezer {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A task of a frozen cgroup cannot be dumped: see [`Freezer::stopped`].
    #[error(
        "process {0} is stopped by a signal, and a dump of its frozen cgroup would wait for it in vain: let it \
         go on (kill -CONT {0})"
    )]
    Stopped(u32),
    /// The state did not change in time.
    #[error("freezer {path} did not read {wanted} within {} ms", limit.as_millis())]
    Deadline {
        /// The cgroup.
        path: PathBuf,
        /// The state that was asked for.
        wanted: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// Version of the hierarchy that holds the freezer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    V1,
    V2,
}

/// The freezer of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freezer {
    kind: Kind,
    cgroup: PathBuf,
}

/// What keeps tasks from being dumped.
#[derive(Default)]
struct Waits {
    /// One waits inside vfork(2).
    in_vfork: bool,
    /// A thread that is stopped by a signal.
    stopped: Option<u32>,
}

impl Freezer {
    /// The freezer of the container that process `pid` is in.
    ///
    /// # Errors
    /// When the process is gone or its cgroup has no freezer.
    pub fn of(pid: u32) -> Result<Self, FreezerError> {
        let failed =
            |source| FreezerError::Io { path: format!("/proc/{pid}/cgroup").into(), source };
        let text = cgroups::of_container(pid).map_err(failed)?;
        Self::from_proc(Path::new(CGROUP_ROOT), &text).ok_or(FreezerError::NoFreezer(pid))
    }

    /// A v1 freezer hierarchy wins over v2: on a hybrid host the unified hierarchy has no members
    /// that runc froze.
    fn from_proc(root: &Path, text: &str) -> Option<Self> {
        let mut unified = None;
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let relative = path.trim_start_matches('/');
            // The root of a hierarchy cannot be frozen.
            if relative.is_empty() {
                continue;
            }
            if controllers.split(',').any(|c| c == "freezer") {
                return Some(Self { kind: Kind::V1, cgroup: root.join("freezer").join(relative) });
            }
            if controllers.is_empty() {
                unified = Some(Self { kind: Kind::V2, cgroup: root.join(relative) });
            }
        }
        unified
    }

    /// Freezes every process of the cgroup and waits until all stand still. How long that took.
    ///
    /// A task that waits for its child's exec or exit after vfork(2) counts as frozen and cannot be
    /// traced, so CRIU would wait for it in vain: the cgroup is thawed for a moment then and frozen
    /// again.
    ///
    /// # Errors
    /// After `limit` without success; the container is thawed again then.
    pub fn freeze(&self, limit: Duration) -> Result<Duration, FreezerError> {
        self.freeze_and_look(limit).map(|(took, _)| took)
    }

    /// Every thread is looked at once: it is in the pause.
    fn freeze_and_look(&self, limit: Duration) -> Result<(Duration, Waits), FreezerError> {
        let start = Instant::now();
        loop {
            let begin = Instant::now();
            let frozen = self.set(true, limit);
            let took = begin.elapsed();
            match frozen {
                Ok(()) => {
                    let waits = self.waits();
                    // Beyond the limit the dump is left to find out.
                    if !waits.in_vfork || start.elapsed() > limit {
                        return Ok((took, waits));
                    }
                    self.set(false, limit)?;
                    std::thread::sleep(BETWEEN_VFORKS);
                }
                Err(error) => {
                    if let Err(again) = self.set(false, limit) {
                        log::error!("thaw after a failed freeze: {again}");
                    }
                    return Err(error);
                }
            }
        }
    }

    /// As [`Freezer::freeze`], for a dump: fails, and thaws again, where a task is [`Freezer::stopped`].
    ///
    /// # Errors
    /// See above.
    pub fn freeze_for_dump(&self, limit: Duration) -> Result<Duration, FreezerError> {
        let (took, waits) = self.freeze_and_look(limit)?;
        let Some(thread) = self.stopped_of(&waits) else { return Ok(took) };
        if let Err(error) = self.set(false, limit) {
            log::error!("thaw a container that cannot be dumped: {error}");
        }
        Err(FreezerError::Stopped(thread))
    }

    /// A thread that is stopped by a signal, where that keeps it from being dumped. Before ptrace(2) has a
    /// stopped task it waits for it to wake up, for ever if it is frozen by version 1; and whoever waits
    /// cannot be killed. Version 2 lets the tracer have it.
    pub fn stopped(&self) -> Option<u32> {
        self.stopped_of(&self.waits())
    }

    fn stopped_of(&self, waits: &Waits) -> Option<u32> {
        waits.stopped.filter(|_| self.kind == Kind::V1)
    }

    /// Looks at the wait channels of all threads, which frozen or not are the same.
    fn waits(&self) -> Waits {
        let threads = match self.kind {
            Kind::V1 => "tasks",
            Kind::V2 => "cgroup.threads",
        };
        let mut waits = Waits::default();
        let mut found = String::new();
        read_all(&self.cgroup, threads, &mut found);
        for thread in found.lines() {
            let Ok(at) = fs::read_to_string(format!("/proc/{thread}/wchan")) else { continue };
            waits.in_vfork |= waits_in_vfork(&at);
            if waits.stopped.is_none() && is_stopped(&at) {
                waits.stopped = thread.parse().ok();
            }
        }
        waits
    }

    /// Lets every process of the cgroup run. Thawing what is not frozen is no error.
    ///
    /// # Errors
    /// When the cgroup is gone or does not thaw within `limit`.
    pub fn thaw(&self, limit: Duration) -> Result<(), FreezerError> {
        self.set(false, limit)
    }

    /// Whether every process of the cgroup stands still.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn is_frozen(&self) -> Result<bool, FreezerError> {
        let text = self.read(self.state_file())?;
        Ok(match self.kind {
            Kind::V1 => text.trim() == "FROZEN",
            Kind::V2 => text.lines().any(|l| l == "frozen 1"),
        })
    }

    fn set(&self, frozen: bool, limit: Duration) -> Result<(), FreezerError> {
        let (file, value) = match (self.kind, frozen) {
            (Kind::V1, true) => ("freezer.state", "FROZEN"),
            (Kind::V1, false) => ("freezer.state", "THAWED"),
            (Kind::V2, true) => ("cgroup.freeze", "1"),
            (Kind::V2, false) => ("cgroup.freeze", "0"),
        };
        let path = self.cgroup.join(file);
        let start = Instant::now();
        loop {
            // A v1 freezer can stay FREEZING while tasks fork: writing again makes it look again.
            fs::write(&path, value)
                .map_err(|source| FreezerError::Io { path: path.clone(), source })?;
            for _ in 0..50 {
                if self.is_frozen()? == frozen {
                    return Ok(());
                }
                if start.elapsed() > limit {
                    let wanted = if frozen { "frozen" } else { "thawed" };
                    return Err(FreezerError::Deadline {
                        path: self.cgroup.clone(),
                        wanted,
                        limit,
                    });
                }
                std::thread::sleep(POLL);
            }
        }
    }

    fn state_file(&self) -> &'static str {
        match self.kind {
            Kind::V1 => "freezer.state",
            Kind::V2 => "cgroup.events",
        }
    }

    fn read(&self, file: &str) -> Result<String, FreezerError> {
        let path = self.cgroup.join(file);
        fs::read_to_string(&path).map_err(|source| FreezerError::Io { path, source })
    }
}

/// What `file` says in this cgroup and those inside it.
fn read_all(cgroup: &Path, file: &str, found: &mut String) {
    found.push_str(&fs::read_to_string(cgroup.join(file)).unwrap_or_default());
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            read_all(&entry.path(), file, found);
        }
    }
}

/// Whether a task's wait channel is that of the parent in a vfork(2). The kernel names the function
/// it sleeps in, or the one that was inlined into.
pub(crate) fn waits_in_vfork(wchan: &str) -> bool {
    ["wait_for_vfork_done", "kernel_clone", "_do_fork"].contains(&wchan.trim())
}

/// Whether a task's wait channel is that of one that a signal has stopped. Its state says so only until it
/// is frozen.
fn is_stopped(wchan: &str) -> bool {
    ["do_signal_stop", "get_signal"].contains(&wchan.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_hosts_freeze_through_v1() {
        let text = "3:freezer:/default/redis\n0::/default/redis\n";
        let freezer = Freezer::from_proc(Path::new("/cg"), text).unwrap();
        assert_eq!(freezer.cgroup, Path::new("/cg/freezer/default/redis"));
        assert_eq!(freezer.kind, Kind::V1);
    }

    #[test]
    fn unified_hosts_freeze_through_v2() {
        let freezer = Freezer::from_proc(Path::new("/cg"), "0::/default/redis\n").unwrap();
        assert_eq!(freezer.cgroup, Path::new("/cg/default/redis"));
        assert_eq!(freezer.kind, Kind::V2);
    }

    #[test]
    fn the_root_cgroup_is_never_frozen() {
        assert_eq!(Freezer::from_proc(Path::new("/cg"), "3:freezer:/\n0::/\n"), None);
    }

    #[test]
    fn a_parent_in_vfork_is_told_from_a_frozen_task() {
        assert!(waits_in_vfork("kernel_clone"));
        assert!(!waits_in_vfork("__refrigerator"));
        assert!(!waits_in_vfork("0"));
    }

    #[test]
    fn a_state_that_never_comes_is_a_deadline_and_thaws() {
        let dir = tempfile::tempdir().unwrap();
        // A plain file never reads FROZEN after "FROZEN" was replaced: it reads what was written,
        // so the v2 pair is used, whose state is a second file that nobody updates.
        fs::write(dir.path().join("cgroup.freeze"), "0").unwrap();
        fs::write(dir.path().join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        let freezer = Freezer { kind: Kind::V2, cgroup: dir.path().to_path_buf() };
        let error = freezer.freeze(Duration::from_millis(5)).unwrap_err();
        assert!(matches!(error, FreezerError::Deadline { wanted: "frozen", .. }));
        assert_eq!(fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap(), "0");
    }

    #[test]
    fn a_stopped_task_is_in_the_way_of_version_1_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            // Left behind stopped by a failure, it must not hold up who reads the test's output.
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id();
        for file in ["tasks", "cgroup.threads"] {
            fs::write(dir.path().join(file), format!("{pid}\n")).unwrap();
        }
        let stopped = |kind| Freezer { kind, cgroup: dir.path().to_path_buf() }.stopped();
        assert_eq!(stopped(Kind::V1), None);
        let signal =
            |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal);
        signal(nix::sys::signal::Signal::SIGSTOP).unwrap();
        let start = Instant::now();
        while stopped(Kind::V1).is_none() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(POLL);
        }
        assert_eq!((stopped(Kind::V1), stopped(Kind::V2)), (Some(pid), None));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
