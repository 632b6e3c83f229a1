//! Less CPU time for a container, for a while: the quota of its cgroup, and the way back.
//!
//! What the quota was is written to a file before it is changed for the first time. So anyone can
//! undo it after a crash: [`undo`] puts it back, unless somebody has set another one since.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where cgroup hierarchies are mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Name of the file that remembers the quota.
const RECORD: &str = "cpu-quota.json";
/// Least quota that the kernel takes, microseconds per period.
const LEAST: u64 = 1000;
/// Period of a v2 cgroup that names none, microseconds.
const PERIOD: u64 = 100_000;

/// Why a quota could not be set or put back.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// The process is in no cgroup that can have a quota.
    #[error("process {0} is in no cgroup whose cpu time can be limited")]
    NoCgroup(u32),
    /// A file could not be read or written.
    #[error("cpu quota {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file holds something else than a quota.
    #[error("{path} does not hold a cpu quota: {text:?}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
}

type Result<T> = std::result::Result<T, QuotaError>;

/// Version of the hierarchy that holds the cpu controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    V1,
    V2,
}

/// A cgroup with the cpu controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Cgroup {
    kind: Kind,
    path: PathBuf,
}

/// A quota: microseconds per period, `None` without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Quota {
    us: Option<u64>,
    period_us: u64,
}

/// What is needed to put a quota back.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    cgroup: Cgroup,
    before: Quota,
    /// What was set since. The kernel's files do not say who has set it.
    set: Vec<Quota>,
}

/// A container whose CPU time can be limited. Dropped, it gives the container back what it had.
#[derive(Debug)]
pub struct CpuQuota {
    cgroup: Cgroup,
    folder: PathBuf,
    before: Option<Quota>,
    set: Vec<Quota>,
}

impl CpuQuota {
    /// The container of process `pid`. What is needed to undo a limit will lie in `folder`, which
    /// is the container's own, and is made and removed here.
    ///
    /// # Errors
    /// When the process is gone or in no cgroup with a cpu controller.
    pub fn of(pid: u32, folder: &Path) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = read(&proc)?;
        let cgroup = Cgroup::from_proc(Path::new(CGROUP_ROOT), &text);
        let cgroup = cgroup.filter(|cgroup| cgroup.read().is_ok());
        let cgroup = cgroup.ok_or(QuotaError::NoCgroup(pid))?;
        Ok(Self { cgroup, folder: folder.to_owned(), before: None, set: Vec::new() })
    }

    /// CPU time that the container has used so far.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn used(&self) -> Result<Duration> {
        self.cgroup.used()
    }

    /// Lets the container use `cpus` CPUs, and never more than it may by itself.
    ///
    /// # Errors
    /// When the limit cannot be remembered or not be set. Then it is as before.
    pub fn limit(&mut self, cpus: f64) -> Result<()> {
        let before = match self.before {
            Some(before) => before,
            None => self.cgroup.read()?,
        };
        let wanted = (cpus.max(0.0) * before.period_us as f64) as u64;
        let us = before.us.map_or(wanted, |own| wanted.min(own)).max(LEAST);
        let set = Quota { us: Some(us), ..before };
        // The earlier ones too: a crash may come before the new one is set.
        self.set.push(set);
        let record = Record { cgroup: self.cgroup.clone(), before, set: self.set.clone() };
        let made = fs::create_dir_all(&self.folder);
        made.map_err(|source| QuotaError::Io { path: self.folder.clone(), source })?;
        record.write(&self.folder)?;
        self.before = Some(before);
        self.cgroup.write(set)
    }

    /// Gives the container what it had. No error when nothing was changed or the cgroup is gone.
    ///
    /// # Errors
    /// When it cannot be put back.
    pub fn restore(&mut self) -> Result<()> {
        if self.before.is_some() {
            undo(&self.folder)?;
            self.before = None;
            self.set.clear();
        }
        Ok(())
    }
}

impl Drop for CpuQuota {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            log::error!("give a container its cpu time back: {error}");
        }
    }
}

/// Puts back what a [`CpuQuota`] with this `folder` has changed and not put back. A quota that
/// somebody else has set since stays. Whether there was anything to undo.
///
/// # Errors
/// When it cannot be put back; it can be tried again.
pub fn undo(folder: &Path) -> Result<bool> {
    let path = folder.join(RECORD);
    let text = match read(&path) {
        Ok(text) => text,
        Err(error) if error.not_found() => return Ok(false),
        Err(error) => return Err(error),
    };
    let record: Record = serde_json::from_str(&text)
        .map_err(|_| QuotaError::Malformed { path: path.clone(), text })?;
    match record.cgroup.read() {
        Ok(now) if record.set.contains(&now) => record.cgroup.write(record.before)?,
        Ok(_) => {}
        // A cgroup that is gone limits nobody.
        Err(error) if error.not_found() => {}
        Err(error) => return Err(error),
    }
    fs::remove_file(&path).map_err(|source| QuotaError::Io { path, source })?;
    // Nothing else is in it.
    let _ = fs::remove_dir(folder);
    Ok(true)
}

impl QuotaError {
    fn not_found(&self) -> bool {
        let gone = |code| code == libc::ENOENT || code == libc::ENODEV;
        matches!(self, Self::Io { source, .. } if source.raw_os_error().is_some_and(gone))
    }
}

impl Record {
    /// Whole or not at all: who reads it may find it while it is written.
    fn write(&self, folder: &Path) -> Result<()> {
        let (path, draft) = (folder.join(RECORD), folder.join(".cpu-quota.draft"));
        let bytes = serde_json::to_vec(self).map_err(io::Error::from);
        bytes
            .and_then(|bytes| fs::write(&draft, bytes))
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(|source| QuotaError::Io { path, source })
    }
}

impl Cgroup {
    /// A v1 cpu hierarchy wins: on a hybrid host the unified one has no controllers.
    fn from_proc(root: &Path, text: &str) -> Option<Self> {
        let mut unified = None;
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let relative = path.trim_start_matches('/');
            // The root of a hierarchy has no quota, and limiting it would stop the host.
            if relative.is_empty() {
                continue;
            }
            if controllers.split(',').any(|controller| controller == "cpu") {
                // Where both are mounted together a link has the name of each.
                return Some(Self { kind: Kind::V1, path: root.join("cpu").join(relative) });
            }
            if controllers.is_empty() {
                unified = Some(Self { kind: Kind::V2, path: root.join(relative) });
            }
        }
        unified
    }

    fn read(&self) -> Result<Quota> {
        let number = |path: &Path, text: &str| {
            text.trim()
                .parse::<i64>()
                .map_err(|_| QuotaError::Malformed { path: path.to_owned(), text: text.to_owned() })
        };
        match self.kind {
            Kind::V1 => {
                let (quota, period) =
                    (self.path.join("cpu.cfs_quota_us"), self.path.join("cpu.cfs_period_us"));
                let us = number(&quota, &read(&quota)?)?;
                let period_us = number(&period, &read(&period)?)?;
                Ok(Quota { us: u64::try_from(us).ok(), period_us: period_us.unsigned_abs() })
            }
            Kind::V2 => {
                let path = self.path.join("cpu.max");
                let text = read(&path)?;
                let (us, period) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
                let us = if us == "max" { None } else { Some(number(&path, us)?.unsigned_abs()) };
                let period_us =
                    if period.is_empty() { PERIOD } else { number(&path, period)?.unsigned_abs() };
                Ok(Quota { us, period_us })
            }
        }
    }

    fn write(&self, quota: Quota) -> Result<()> {
        let (file, text) = match (self.kind, quota.us) {
            (Kind::V1, None) => ("cpu.cfs_quota_us", "-1".to_owned()),
            (Kind::V1, Some(us)) => ("cpu.cfs_quota_us", us.to_string()),
            (Kind::V2, None) => ("cpu.max", format!("max {}", quota.period_us)),
            (Kind::V2, Some(us)) => ("cpu.max", format!("{us} {}", quota.period_us)),
        };
        let path = self.path.join(file);
        fs::write(&path, text).map_err(|source| QuotaError::Io { path, source })
    }

    fn used(&self) -> Result<Duration> {
        let malformed = |path: &Path, text: &str| QuotaError::Malformed {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        if self.kind == Kind::V2 {
            let path = self.path.join("cpu.stat");
            let text = read(&path)?;
            let us = text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
            return us.map(Duration::from_micros).ok_or_else(|| malformed(&path, &text));
        }
        // cpuacct has the same cgroups as cpu, mounted together with it or not.
        let relative = self.path.strip_prefix(Path::new(CGROUP_ROOT).join("cpu"));
        let path = Path::new(CGROUP_ROOT).join("cpuacct").join(relative.unwrap_or(&self.path));
        let path = path.join("cpuacct.usage");
        let text = read(&path)?;
        let ns = text.trim().parse().map_err(|_| malformed(&path, &text))?;
        Ok(Duration::from_nanos(ns))
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| QuotaError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
#[path = "cpu_quota_tests.rs"]
mod tests;
