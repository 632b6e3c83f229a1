//! A cgroup per lab in every hierarchy of the machine (v1, v2 or both). It says which processes
//! belong to the lab, also when all else is lost.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::process;

/// Groups are called this plus the lab's id.
const PREFIX: &str = "ferry-testbed-";
/// How long killed processes may take to go.
const PATIENCE: Duration = Duration::from_secs(20);

/// The group of a lab, or of one host within it.
#[derive(Clone, Debug)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
}

impl Cgroup {
    /// The group of lab `id`; it need not exist.
    pub fn of_lab(id: &str) -> Result<Self> {
        let name = format!("{PREFIX}{id}");
        Ok(Self { dirs: hierarchies()?.into_iter().map(|dir| dir.join(&name)).collect() })
    }

    /// The group `name` within this one.
    pub fn child(&self, name: &str) -> Self {
        Self { dirs: self.dirs.iter().map(|dir| dir.join(name)).collect() }
    }

    /// Makes the group in every hierarchy.
    pub fn create(&self) -> Result<()> {
        for dir in &self.dirs {
            create(dir).with_context(|| format!("make the cgroup {}", dir.display()))?;
        }
        Ok(())
    }

    /// Where v2 is alone: moves what is left in the group itself into the leaf that its host's first
    /// process made (see boot.sh), and hands all controllers on.
    pub fn hand_on(&self) -> Result<()> {
        let [dir] = self.dirs.as_slice() else { return Ok(()) };
        let leaf = dir.join("init");
        if !leaf.exists() {
            return Ok(());
        }
        let list = fs::read_to_string(dir.join("cgroup.procs")).context("read a host's group")?;
        for pid in list.lines() {
            // One that has ended meanwhile need not be moved.
            let _ = fs::write(leaf.join("cgroup.procs"), pid);
        }
        hand_on_controllers(dir);
        Ok(())
    }

    /// The files a process writes `0` to in order to enter the group.
    pub fn doors(&self) -> Vec<PathBuf> {
        self.dirs
            .iter()
            .map(|dir| {
                // Where v2 is alone, a host's first process made this leaf (see boot.sh).
                let leaf = dir.join("init/cgroup.procs");
                if leaf.exists() && self.dirs.len() == 1 { leaf } else { dir.join("cgroup.procs") }
            })
            .collect()
    }

    /// Thaws and kills all processes in the group, waits until they are gone, removes the group.
    pub fn destroy(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut left = Vec::new();
            for dir in &self.dirs {
                thaw(dir);
                left.extend(pids(dir));
            }
            for pid in &left {
                process::signal(*pid, Signal::SIGKILL);
            }
            if left.is_empty() && self.dirs.iter().all(|dir| remove(dir)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("processes {left:?} of {} do not end", self.dirs[0].display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The ids of all labs that have a group anywhere.
pub fn labs() -> Result<Vec<String>> {
    let names = hierarchies()?.into_iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten();
    Ok(names
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(PREFIX).map(str::to_owned))
        .collect())
}

fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let found = parse_hierarchies(&mounts);
    if found.is_empty() {
        bail!("no cgroup hierarchy is mounted");
    }
    Ok(found)
}

/// Mount points of cgroup file systems whose root is mounted.
fn parse_hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, source) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let is_root = mount.next()? == "/";
            let point = mount.next()?;
            (is_root && source.starts_with("cgroup")).then(|| PathBuf::from(point))
        })
        .collect()
}

fn create(dir: &Path) -> std::io::Result<()> {
    let parent = dir.parent().unwrap_or(dir);
    hand_on_controllers(parent);
    fs::create_dir(dir).or_else(|e| match e.kind() {
        ErrorKind::AlreadyExists => Ok(()),
        _ => Err(e),
    })?;
    // A v1 cpuset takes no process before it has these.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if dir.join("tasks").exists() && dir.join(file).exists() {
            fs::write(dir.join(file), fs::read(parent.join(file))?)?;
        }
    }
    Ok(())
}

/// v2 hands controllers on only where told so; not all can be.
fn hand_on_controllers(dir: &Path) {
    if let Ok(controllers) = fs::read_to_string(dir.join("cgroup.controllers")) {
        for controller in controllers.split_whitespace() {
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

/// Calls `act` for every group below `dir`, innermost first, then for `dir`.
fn walk(dir: &Path, act: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), act);
        }
    }
    act(dir);
}

/// A frozen process of a v1 group does not even die.
fn thaw(dir: &Path) {
    walk(dir, &mut |group| {
        for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            let path = group.join(file);
            if path.exists() {
                let _ = fs::write(path, value);
            }
        }
    });
}

fn pids(dir: &Path) -> Vec<i32> {
    let mut found = Vec::new();
    walk(dir, &mut |group| {
        let list = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        found.extend(list.lines().filter_map(|pid| pid.parse::<i32>().ok()).filter(|pid| *pid > 0));
    });
    found
}

fn remove(dir: &Path) -> bool {
    let mut gone = true;
    walk(dir, &mut |group| {
        if let Err(e) = fs::remove_dir(group) {
            gone &= e.kind() == ErrorKind::NotFound;
        }
    });
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_the_cgroup_mounts_that_show_their_root() {
        let mounts = "\
24 1 0:5 / /sys rw - sysfs sysfs rw
25 24 0:6 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:7 / /sys/fs/cgroup/cpu rw shared:1 - cgroup cgroup rw,cpu
27 25 0:8 /docker/x /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
28 25 0:9 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let found = parse_hierarchies(mounts);
        assert_eq!(found, [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]);
    }
}
