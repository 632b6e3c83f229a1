//! Where the cgroups of a process are mounted, with the controllers that each of them has.
//!
//! `/proc/PID/cgroup` names cgroups relative to the reader's cgroup namespace, and a mount may show
//! no more than a part of its hierarchy: both are taken from the kernel, nothing is guessed from the
//! names of folders.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// One cgroup of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The controllers of its hierarchy; none for v2, and for v1 hierarchies without any.
    pub controllers: Vec<String>,
    /// Its folder.
    pub folder: PathBuf,
    /// Where its hierarchy is mounted.
    pub mounted: PathBuf,
    /// Whether it is of the unified hierarchy, v2.
    pub unified: bool,
}

impl Member {
    /// Whether it is the v1 cgroup of `controller`.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

/// The cgroups of process `pid`, as far as their hierarchies are mounted.
///
/// # Errors
/// When the process is gone.
pub fn of(pid: u32) -> io::Result<Vec<Member>> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(members(&mounts, &cgroups))
}

/// Where in the cgroups of `members` a folder lies that another process has named by its own: the one of
/// theirs in the same hierarchy, of v1. `None` for what is in no hierarchy.
pub fn of_same_hierarchy(members: &[Member], folder: &Path) -> Option<PathBuf> {
    let v1 = members.iter().filter(|member| !member.unified);
    let same = v1.filter(|member| folder.starts_with(&member.mounted));
    same.max_by_key(|member| member.mounted.as_os_str().len()).map(|member| member.folder.clone())
}

/// A mounted hierarchy.
struct Mount<'a> {
    /// Of v1, its controllers among other options.
    options: &'a str,
    unified: bool,
    /// The part of the hierarchy that it shows.
    root: &'a str,
    point: PathBuf,
}

fn members(mountinfo: &str, cgroups: &str) -> Vec<Member> {
    let mounts: Vec<_> = mountinfo.lines().filter_map(mount).collect();
    cgroups.lines().filter_map(|line| member(&mounts, line)).collect()
}

fn mount(line: &str) -> Option<Mount<'_>> {
    let (mount, system) = line.split_once(" - ")?;
    let mut system = system.split(' ');
    let unified = match system.next()? {
        "cgroup" => false,
        "cgroup2" => true,
        _ => return None,
    };
    let options = system.nth(1)?;
    let mut mount = mount.split(' ').skip(3);
    Some(Mount { options, unified, root: mount.next()?, point: mount.next()?.into() })
}

fn member(mounts: &[Mount<'_>], line: &str) -> Option<Member> {
    let mut fields = line.splitn(3, ':');
    let (number, names, path) = (fields.next()?, fields.next()?, fields.next()?);
    let unified = number == "0" && names.is_empty();
    let of_line = |mount: &&Mount<'_>| match unified {
        true => mount.unified,
        false => {
            !mount.unified
                && names.split(',').all(|name| mount.options.split(',').any(|o| o == name))
        }
    };
    // Of a cgroup that is in none of the parts that are mounted nothing can be read.
    if path.split('/').any(|part| part == "..") {
        return None;
    }
    mounts.iter().filter(of_line).find_map(|mount| {
        let relative = Path::new(path).strip_prefix(mount.root).ok()?;
        let controllers = names.split(',').filter(|name| !name.is_empty() && !name.contains('='));
        Some(Member {
            controllers: controllers.map(str::to_owned).collect(),
            folder: mount.point.join(relative),
            mounted: mount.point.clone(),
            unified,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
24 1 0:5 / /sys rw - sysfs sysfs rw
26 25 0:7 / /sys/fs/cgroup/cpuacct,cpu rw shared:1 - cgroup cgroup rw,cpu,cpuacct
27 25 0:8 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
28 25 0:9 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
29 25 0:10 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";

    fn folder(members: &[Member], controller: &str) -> Option<PathBuf> {
        let member = members.iter().find(|member| member.has(controller));
        member.map(|member| member.folder.clone())
    }

    #[test]
    fn v1_controllers_are_found_wherever_they_are_mounted() {
        let cgroups = "\
7:cpu,cpuacct:/default/t
5:memory:/docker/x/default/t
4:pids:/default/t
1:name=systemd:/default/t
0::/default/t
";
        let members = members(HYBRID, cgroups);
        let cpu = Some("/sys/fs/cgroup/cpuacct,cpu/default/t".into());
        assert_eq!(folder(&members, "cpu"), cpu);
        assert_eq!(folder(&members, "cpuacct"), cpu);
        // Only a part of this hierarchy is mounted.
        assert_eq!(folder(&members, "memory"), Some("/sys/fs/cgroup/memory/default/t".into()));
        assert_eq!(folder(&members, "pids"), None, "it is not mounted");
        let unified: Vec<_> = members.iter().filter(|member| member.unified).collect();
        assert_eq!(unified[0].folder, Path::new("/sys/fs/cgroup/unified/default/t"));
        assert!(members.iter().any(|m| m.controllers.is_empty() && !m.unified), "systemd's");
    }

    #[test]
    fn a_folder_of_another_process_is_that_of_ours_in_its_hierarchy() {
        let ours = members(HYBRID, "7:cpu,cpuacct:/default/t\n0::/default/t\n");
        let of = |folder: &str| of_same_hierarchy(&ours, Path::new(folder));
        let expected = Some("/sys/fs/cgroup/cpuacct,cpu/default/t".into());
        assert_eq!(of("/sys/fs/cgroup/cpuacct,cpu"), expected);
        assert_eq!(of("/sys/fs/cgroup/cpuacct,cpu/shim"), expected);
        assert_eq!(of("/sys/fs/cgroup/memory"), None, "we are in none");
        assert_eq!(of("/sys/fs/cgroup/unified/shim"), None, "v2");
        assert_eq!(of("/etc/hosts"), None);
    }

    #[test]
    fn the_unified_hierarchy_has_no_controllers_of_its_own() {
        let mounts = "25 24 0:6 / /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n";
        let found = members(mounts, "0::/system.slice/t.scope\n");
        let folder = "/sys/fs/cgroup/system.slice/t.scope".into();
        let mounted = "/sys/fs/cgroup".into();
        assert_eq!(found, [Member { controllers: vec![], folder, mounted, unified: true }]);
    }

    #[test]
    fn a_cgroup_outside_of_what_is_mounted_is_left_out() {
        assert!(members(HYBRID, "5:memory:/elsewhere/t\n0::/../t\n").is_empty());
        assert!(members("", "0::/t\n").is_empty());
        assert!(of(u32::MAX).is_err());
    }

    #[test]
    fn the_cgroups_of_this_process_are_there() {
        let found = of(std::process::id()).unwrap();
        assert!(found.iter().all(|member| member.folder.is_dir()), "{found:?}");
    }
}
