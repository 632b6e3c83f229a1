//! The quota, on a real cgroup of this host and on a folder that looks like one of v2.

use std::process::{Child, Command};

use super::*;

/// A process in a cgroup of its own.
struct Busy {
    child: Child,
    cgroups: Vec<PathBuf>,
}

impl Busy {
    /// `None` when this host has no cpu controller that can be used.
    fn start(name: &str) -> Option<Self> {
        let name = format!("ferry-quota-{}-{name}", std::process::id());
        let root = Path::new(CGROUP_ROOT);
        let v1 = root.join("cpu/cpu.cfs_quota_us").exists() || root.join("cpu/cpu.shares").exists();
        let parents = if v1 { vec!["cpu", "cpuacct"] } else { vec![""] };
        let mut cgroups: Vec<PathBuf> = Vec::new();
        for parent in parents {
            let path = root.join(parent).join(&name);
            // Mounted together, both are one.
            if cgroups.iter().any(|made| made.canonicalize().ok() == path.canonicalize().ok()) {
                continue;
            }
            fs::create_dir(&path).ok()?;
            cgroups.push(path);
        }
        let child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let busy = Self { child, cgroups };
        for cgroup in &busy.cgroups {
            fs::write(cgroup.join("cgroup.procs"), busy.child.id().to_string()).ok()?;
        }
        let quota = if v1 { "cpu.cfs_quota_us" } else { "cpu.max" };
        busy.cgroups[0].join(quota).exists().then_some(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for cgroup in &self.cgroups {
            // The kernel counts a process that has ended a moment longer.
            (0..100).any(|_| {
                fs::remove_dir(cgroup).is_ok() || {
                    std::thread::sleep(Duration::from_millis(10));
                    false
                }
            });
        }
    }
}

macro_rules! busy {
    ($name:literal) => {
        match Busy::start($name) {
            Some(busy) => busy,
            None => {
                println!("skipped: {}: no cpu controller that can be used", $name);
                return;
            }
        }
    };
}

#[test]
fn a_limit_is_kept_and_given_back_when_its_guard_goes() {
    let busy = busy!("guard");
    let folder = tempfile::tempdir().unwrap();
    let mut quota = CpuQuota::of(busy.child.id(), folder.path()).unwrap();
    let before = quota.cgroup.read().unwrap();
    assert_eq!(before.us, None);
    quota.limit(0.1).unwrap();
    assert_eq!(quota.cgroup.read().unwrap().us, Some(before.period_us / 10));
    let used = quota.used().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let used = quota.used().unwrap() - used;
    assert!(used > Duration::ZERO && used < Duration::from_millis(250), "used {used:?} of 500 ms");
    quota.limit(0.05).unwrap();
    let cgroup = quota.cgroup.clone();
    drop(quota);
    assert_eq!(cgroup.read().unwrap(), before);
    assert!(!folder.path().exists());
}

#[test]
fn a_limit_is_undone_by_another_after_a_crash() {
    let busy = busy!("crash");
    let folder = tempfile::tempdir().unwrap();
    let mut quota = CpuQuota::of(busy.child.id(), folder.path()).unwrap();
    let before = quota.cgroup.read().unwrap();
    quota.limit(0.5).unwrap();
    let first = quota.cgroup.read().unwrap();
    quota.limit(0.3).unwrap();
    // Remembered, and not yet set.
    quota.cgroup.write(first).unwrap();
    let cgroup = quota.cgroup.clone();
    std::mem::forget(quota);
    assert!(undo(folder.path()).unwrap());
    assert_eq!(cgroup.read().unwrap(), before);
    assert!(!undo(folder.path()).unwrap());
}

#[test]
fn what_somebody_else_has_set_since_stays() {
    let busy = busy!("other");
    let folder = tempfile::tempdir().unwrap();
    let mut quota = CpuQuota::of(busy.child.id(), folder.path()).unwrap();
    quota.limit(0.5).unwrap();
    let theirs = Quota { us: Some(70_000), ..quota.cgroup.read().unwrap() };
    quota.cgroup.write(theirs).unwrap();
    quota.restore().unwrap();
    assert_eq!(quota.cgroup.read().unwrap(), theirs);
}

#[test]
fn a_container_never_gets_more_than_its_own_quota() {
    let busy = busy!("own");
    let folder = tempfile::tempdir().unwrap();
    let mut quota = CpuQuota::of(busy.child.id(), folder.path()).unwrap();
    let own = Quota { us: Some(30_000), ..quota.cgroup.read().unwrap() };
    quota.cgroup.write(own).unwrap();
    quota.limit(1.5).unwrap();
    assert_eq!(quota.cgroup.read().unwrap().us, Some(30_000));
    quota.limit(0.0).unwrap();
    assert_eq!(quota.cgroup.read().unwrap().us, Some(LEAST));
    quota.restore().unwrap();
    assert_eq!(quota.cgroup.read().unwrap(), own);
}

#[test]
fn a_cgroup_that_is_gone_needs_nothing_undone() {
    let folder = tempfile::tempdir().unwrap();
    let busy = busy!("gone");
    let mut quota = CpuQuota::of(busy.child.id(), folder.path()).unwrap();
    quota.limit(0.5).unwrap();
    drop(busy);
    quota.restore().unwrap();
    assert!(!folder.path().exists());
}

#[test]
fn a_v2_cgroup_is_limited_through_cpu_max() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("cpu.stat"), "usage_usec 1500\nuser_usec 1\n").unwrap();
    for (before, after) in [("max 100000\n", "max 100000"), ("200000 50000\n", "200000 50000")] {
        fs::write(dir.path().join("cpu.max"), before).unwrap();
        let cgroup = Cgroup { kind: Kind::V2, path: dir.path().into() };
        assert_eq!(cgroup.used().unwrap(), Duration::from_micros(1500));
        let folder = dir.path().to_owned();
        let mut quota = CpuQuota { cgroup, folder, before: None, set: Vec::new() };
        quota.limit(0.5).unwrap();
        let set = fs::read_to_string(dir.path().join("cpu.max")).unwrap();
        assert!(set == "50000 100000" || set == "25000 50000", "{set}");
        drop(quota);
        assert_eq!(fs::read_to_string(dir.path().join("cpu.max")).unwrap(), after);
    }
}

#[test]
fn the_cgroup_is_found_on_hybrid_and_unified_hosts_and_is_never_the_root() {
    let of = |text: &str| Cgroup::from_proc(Path::new("/cg"), text);
    let hybrid = of("4:memory:/m\n1:cpu,cpuacct:/default/redis\n0::/default/redis\n").unwrap();
    assert_eq!((hybrid.kind, hybrid.path), (Kind::V1, "/cg/cpu/default/redis".into()));
    let unified = of("0::/default/redis\n").unwrap();
    assert_eq!((unified.kind, unified.path), (Kind::V2, "/cg/default/redis".into()));
    assert_eq!(of("1:cpu:/\n0::/\n"), None);
}

#[test]
fn a_record_that_is_none_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(RECORD), "{}").unwrap();
    assert!(matches!(undo(folder.path()), Err(QuotaError::Malformed { .. })));
    assert!(folder.path().join(RECORD).exists());
}
