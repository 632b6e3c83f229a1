//! The cgroups of a container, as far as a move depends on them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

/// Where cgroup hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// What `/proc/PID/cgroup` says of process `pid`, up to where its cgroup namespace begins: the cgroups of
/// its container, and not those that it has made inside and gone into, as systemd does. Without a
/// namespace of its own there is no telling them apart.
///
/// # Errors
/// When the process is gone.
pub fn of_container(pid: u32) -> io::Result<String> {
    let file = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&file)?;
    let namespace = File::open(format!("/proc/{pid}/ns/cgroup"))?;
    if namespace.metadata()?.ino() == fs::metadata("/proc/thread-self/ns/cgroup")?.ino() {
        return Ok(text);
    }
    // The kernel names cgroups as the reader's namespace sees them; a thread that has entered one is lost.
    let inside = std::thread::scope(|scope| {
        let read = || {
            setns(&namespace, CloneFlags::CLONE_NEWCGROUP)?;
            fs::read_to_string(&file)
        };
        let thread =
            std::thread::Builder::new().name("cgroups".into()).spawn_scoped(scope, read)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
    })?;
    Ok(text.lines().map(|line| up_to(line, &inside) + "\n").collect())
}

/// A line of `/proc/PID/cgroup` without the part of its path that `inside` has too.
fn up_to(line: &str, inside: &str) -> String {
    let Some((hierarchy, path)) = split(line) else { return line.to_owned() };
    let inner = inside.lines().filter_map(split).find(|(other, _)| *other == hierarchy);
    let inner = inner.map(|(_, path)| path).filter(|path| *path != "/");
    let outer = inner.and_then(|inner| path.strip_suffix(inner)).unwrap_or(path);
    format!("{hierarchy}:{}", if outer.is_empty() { "/" } else { outer })
}

/// Its number and controllers, and its path.
fn split(line: &str) -> Option<(&str, &str)> {
    let colons = line.match_indices(':').nth(1)?.0;
    Some((&line[..colons], &line[colons + 1..]))
}

/// Cgroups that were made inside those of process `pid`. Restoring them is CRIU's work; a container
/// without any can be left to runc, which makes the others.
///
/// # Errors
/// When the process is gone.
pub fn made_inside(pid: u32) -> io::Result<Vec<PathBuf>> {
    let text = of_container(pid)?;
    let mut found: Vec<PathBuf> = folders(Path::new(ROOT), &text)
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// The processes of the container that process `pid` is in, those in cgroups inside it too.
///
/// # Errors
/// When `pid` is gone or in no cgroup of its own.
pub fn processes(pid: u32) -> io::Result<Vec<i32>> {
    let text = of_container(pid)?;
    // Every hierarchy has them; a controller's is surely mounted.
    let all = folders(Path::new(ROOT), &text);
    let folder = all.iter().find(|folder| folder.join("cgroup.procs").is_file());
    let folder = folder.ok_or_else(|| io::Error::other("the process is in no cgroup"))?;
    let mut found = Vec::new();
    collect(folder, &mut found)?;
    Ok(found)
}

/// [`processes`], as most have pids.
///
/// # Errors
/// As [`processes`].
pub fn pids(pid: u32) -> io::Result<Vec<u32>> {
    Ok(processes(pid)?.into_iter().filter_map(|pid| pid.try_into().ok()).collect())
}

fn collect(folder: &Path, found: &mut Vec<i32>) -> io::Result<()> {
    let text = fs::read_to_string(folder.join("cgroup.procs"))?;
    found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), found)?;
        }
    }
    Ok(())
}

/// The cgroups of process `pid`, in every hierarchy; none when it is gone.
pub fn folders_of(pid: u32) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    folders(Path::new(ROOT), &text)
}

/// Whether process `pid` has ended, whoever may still have to hear of it.
pub fn has_ended(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The name may hold anything, also parentheses.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    state.is_none_or(|state| matches!(state, "Z" | "X"))
}

/// Moves process `pid` into the cgroups of process `beside`, in every hierarchy in which that is not
/// in the root.
///
/// # Errors
/// The first hierarchy that refuses; the others have been tried.
pub fn join(pid: u32, beside: u32) -> io::Result<()> {
    let enter = |folder: PathBuf| fs::write(folder.join("cgroup.procs"), pid.to_string());
    let entered: Vec<_> = folders_of(beside).into_iter().map(enter).collect();
    entered.into_iter().collect()
}

/// Moves process `pid` into the cgroup `path`, in every hierarchy that has it.
///
/// # Errors
/// When none has it, or the first hierarchy that refuses.
pub fn enter(path: &Path, pid: u32) -> io::Result<()> {
    let there = cgroups_at(path).into_iter().map(|folder| folder.join("cgroup.procs"));
    let doors: Vec<_> = there.filter(|door| door.exists()).collect();
    if doors.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no such cgroup"));
    }
    doors.into_iter().try_for_each(|door| fs::write(door, pid.to_string()))
}

/// Whether nothing is in the cgroups that a container is to have. `path` is the `cgroupsPath` of its spec.
pub fn are_empty(path: &Path) -> bool {
    let mut found = Vec::new();
    for folder in cgroups_at(path) {
        let _ = collect(&folder, &mut found);
    }
    found.is_empty()
}

/// Kills what is in the cgroups of a container that never ran: tasks of a CRIU that was killed before it
/// could end them. `path` is the `cgroupsPath` of its spec.
pub fn kill_members(path: &Path) {
    let mut found = Vec::new();
    for folder in cgroups_at(path) {
        // Not every hierarchy has it.
        let _ = collect(&folder, &mut found);
    }
    found.sort_unstable();
    found.dedup();
    for pid in found.into_iter().filter(|pid| *pid > 0) {
        // It may have ended meanwhile.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Removes the empty cgroups of a container that never ran, where runc was killed before it could.
/// `path` is the `cgroupsPath` of its spec; those that systemd makes are systemd's to remove. Whether
/// none is left.
pub fn remove_empty(path: &Path) -> bool {
    remove(&cgroups_at(path))
}

fn remove(folders: &[PathBuf]) -> bool {
    // The kernel refuses those in which something runs.
    let mut gone = true;
    folders.iter().for_each(|folder| gone &= fs::remove_dir(folder).is_ok() || !folder.exists());
    gone
}

/// The cgroups of a `cgroupsPath`. Where a hierarchy is not mounted there may be folders of the same name
/// that are nothing: of one with files in it crun makes a cgroup in its own mind.
fn cgroups_at(path: &Path) -> Vec<PathBuf> {
    let is_cgroup = |folder: &PathBuf| {
        statfs(folder.as_path()).is_ok_and(|of| {
            [CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&of.filesystem_type())
        })
    };
    below(Path::new(ROOT), path).into_iter().filter(is_cgroup).collect()
}

/// The folders of a `cgroupsPath` in every hierarchy. None for one that is no plain path of its own.
fn below(root: &Path, path: &Path) -> Vec<PathBuf> {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || path == Path::new("/") || !path.components().all(plain) {
        return Vec::new();
    }
    let relative = path.strip_prefix("/").unwrap_or(path);
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    hierarchies.chain([root.to_owned()]).map(|folder| folder.join(relative)).collect()
}

/// The parent of process `pid`; `None` when it is gone. That of a container's init is its shim.
pub fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
}

/// The folders that `/proc/PID/cgroup` speaks of. Of a process in the root of a hierarchy, none: its
/// children there are not the container's.
fn folders(root: &Path, text: &str) -> Vec<PathBuf> {
    let folder = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        if path.is_empty() || path.split('/').any(|part| part == "..") {
            return None;
        }
        let hierarchy = match controllers.strip_prefix("name=").unwrap_or(controllers) {
            // Either of pure v2, or of the unified part of a hybrid host.
            "" if root.join("unified").is_dir() => root.join("unified"),
            "" => root.to_owned(),
            controllers => root.join(controllers),
        };
        Some(hierarchy.join(path))
    };
    text.lines().filter_map(folder).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_of_the_container_ends_where_its_namespace_begins() {
        let inside = "7:cpu,cpuacct:/\n5:freezer:/init.scope\n1:name=systemd:/a:b/c\n0::/../x\n";
        for (line, expected) in [
            ("7:cpu,cpuacct:/default/t", "7:cpu,cpuacct:/default/t"),
            ("5:freezer:/default/t/init.scope", "5:freezer:/default/t"),
            ("1:name=systemd:/default/t/a:b/c", "1:name=systemd:/default/t"),
            // It was moved out of its namespace.
            ("0::/default/x", "0::/default/x"),
            ("4:pids:/default/t/deep", "4:pids:/default/t/deep"),
        ] {
            assert_eq!(up_to(line, inside), expected);
        }
        assert_eq!(up_to("0::/init", "0::/init\n"), "0::/");
    }

    #[test]
    fn folders_of_v1_of_v2_and_of_both() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let text = "7:cpu,cpuacct:/default/x\n1:name=systemd:/default/x\n0::/default/x\n";
        let v1 = [root.join("cpu,cpuacct/default/x"), root.join("systemd/default/x")];
        assert_eq!(folders(root, text)[..2], v1);
        assert_eq!(folders(root, text)[2], root.join("default/x"));
        fs::create_dir(root.join("unified")).unwrap();
        assert_eq!(folders(root, text)[2], root.join("unified/default/x"));
    }

    #[test]
    fn a_process_in_the_root_has_no_cgroups_of_its_own() {
        assert!(folders(Path::new("/nowhere"), "4:memory:/\n0::/\n3:cpu:/../x\n").is_empty());
    }

    #[test]
    fn only_empty_cgroups_of_that_path_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str| root.path().join(name);
        for name in ["cpu/default/x", "memory/default/x/inner", "default/x", "cpu/other/x"] {
            fs::create_dir_all(folder(name)).unwrap();
        }
        for refused in ["default/x", "/", "/../x", "a:b:c"] {
            remove(&below(&folder("cpu"), Path::new(refused)));
        }
        assert!(folder("cpu/default/x").exists());
        assert!(!remove(&below(root.path(), Path::new("/default/x"))), "one has something in it");
        assert!(!folder("cpu/default/x").exists() && !folder("default/x").exists());
        assert!(folder("memory/default/x/inner").exists() && folder("cpu/other/x").exists());
    }

    #[test]
    fn the_parent_of_a_process_is_known() {
        assert_eq!(parent(std::process::id()), Some(std::os::unix::process::parent_id()));
        assert_eq!(parent(u32::MAX), None);
    }

    #[test]
    fn a_process_nobody_has_waited_for_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!has_ended(child.id()) && has_ended(u32::MAX));
        child.kill().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !has_ended(child.id()) {
            assert!(std::time::Instant::now() < end);
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        assert!(made_inside(u32::MAX).is_err());
    }
}
