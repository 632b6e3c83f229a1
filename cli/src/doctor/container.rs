//! Facts of a container's processes, beyond those that a move asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use ferry_oci::api::ferry::Description;
use ferry_oci::netns::Netns;
use ferry_oci::quarantine;
use ferry_oci::sockets::{self, Kind, Outside, Unread};

use super::host::{Host, field};
use super::locks::{self, Lock};
use super::mounts::{Mounts, mount_of, mounts};
use super::{Findings, container_checks, losses};
use crate::containerd::{Containerd, Task, TaskStatus};
use crate::describe::container::{ContainerFacts, FromRecord};
use crate::shim::{self, Shim};
use crate::wire::messages::ContainerdAddress;

/// What the processes of a container have and do.
#[derive(Debug, Clone, Default)]
pub(super) struct Processes {
    /// Open files that are none: the number of their process, and what `/proc` calls them.
    pub(super) anonymous: BTreeSet<(u32, String)>,
    /// Open devices, and their processes.
    pub(super) devices: BTreeSet<(u32, String)>,
    /// Open files of the host's that are no part of the container's file systems.
    pub(super) host_files: BTreeSet<(u32, String)>,
    /// Processes that watch files on the container's overlay.
    pub(super) inotify_on_overlay: BTreeSet<u32>,
    /// Eventfds that are semaphores: process and number.
    pub(super) semaphores: BTreeSet<(u32, String)>,
    /// Periodic timers that have gone off and were not read: process and number.
    pub(super) unread_timers: BTreeSet<(u32, String)>,
    /// UDP sockets with datagrams that were not read.
    pub(super) unread: Vec<Unread>,
    /// Sockets.
    pub(super) sockets: Vec<Kind>,
    /// Unix sockets with their peer outside.
    pub(super) outside: Vec<Outside>,
    /// Who is traced, and by whom.
    pub(super) traced: BTreeMap<u32, u32>,
    /// Users of the processes.
    pub(super) users: BTreeSet<u32>,
    /// Who is stopped by a signal.
    pub(super) stopped: BTreeSet<u32>,
    /// Who has locked files.
    pub(super) locks: BTreeSet<u32>,
    /// Processes with seccomp filters.
    pub(super) seccomp: BTreeSet<u32>,
    /// Profiles of AppArmor or labels of SELinux, without `unconfined`.
    pub(super) profiles: BTreeSet<String>,
    /// Tables that criu has left in the container's own network.
    pub(super) criu_tables: Vec<String>,
    /// Locks of checkpoints in there.
    pub(super) checkpoint_locks: Vec<Lock>,
}

/// Adds what is found of container `id`.
///
/// # Errors
/// When there is no such container, or it has no processes.
pub(super) async fn examine(
    containerd: &Containerd,
    address: &ContainerdAddress,
    id: &str,
    host: &Host,
    found: &mut Findings,
) -> Result<()> {
    let record = containerd.container(id).await?.with_context(|| {
        format!("there is no container {id} in namespace {}", address.namespace)
    })?;
    let task = containerd.task(id).await?;
    let Some(task) = task.filter(|task| task.pid != 0 && task.status != TaskStatus::Stopped) else {
        bail!("{id} has no processes to look at: start it");
    };
    let bundle = shim::bundle(&address.socket, &address.namespace, id);
    let description = match Shim::connect(&bundle, id).await? {
        Some(shim) => shim.describe().await?,
        None => described(id, &address.namespace, &task)?,
    };
    let from = FromRecord::from(&record);
    let facts = ContainerFacts::gather(from, &description)?;
    let (init, pids) = (description.init_pid, description.pids);
    let gather = move || Processes::gather(init, &pids);
    let processes = tokio::task::spawn_blocking(gather).await?;
    container_checks::all(&facts, &processes, host, found);
    Ok(())
}

/// What the shim of ferry's would say of a container of another one's.
fn described(id: &str, namespace: &str, task: &Task) -> Result<Description> {
    let status = match task.status {
        TaskStatus::Running => "running",
        TaskStatus::Created => "created",
        TaskStatus::Paused | TaskStatus::Pausing => "paused",
        TaskStatus::Stopped => "stopped",
        TaskStatus::Unknown => "unknown",
    };
    Ok(Description {
        id: id.to_owned(),
        namespace: namespace.to_owned(),
        status: status.to_owned(),
        init_pid: task.pid,
        pids: below(task.pid)?,
        terminal: task.stdio.terminal,
        ..Default::default()
    })
}

/// `init` and its descendants.
fn below(init: u32) -> Result<Vec<u32>> {
    let mut pids = vec![init];
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        next += 1;
        // Children belong to the thread that has forked them.
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    Ok(pids)
}

impl Processes {
    /// Gathers them. What ends meanwhile is left out.
    pub(super) fn gather(init: u32, pids: &[u32]) -> Self {
        let mut all = Self {
            sockets: sockets::kinds(pids),
            outside: sockets::outside(pids).unwrap_or_default(),
            unread: sockets::unread(pids).unwrap_or_default(),
            locks: file_locks(&read("/proc/locks"), pids),
            ..Self::default()
        };
        let mounts = mounts(&read(&format!("/proc/{init}/mountinfo")));
        for &pid in pids {
            all.look_at(pid, &mounts);
        }
        if let Ok(netns) = Netns::of(init)
            && netns.is_own().is_ok_and(|own| !own)
        {
            let look = || (quarantine::tables().unwrap_or_default(), locks::here());
            let (tables, locked) = netns.run(look).unwrap_or_default();
            all.criu_tables = tables;
            all.criu_tables.retain(|table| table.starts_with("CRIU-"));
            let path = format!("/proc/{init}/ns/net");
            all.checkpoint_locks = locks::within(Some(Path::new(&path)), locked);
        }
        all
    }

    fn look_at(&mut self, pid: u32, mounts: &Mounts) {
        let status = read(&format!("/proc/{pid}/status"));
        let number = |name| field(&status, name).and_then(|value| value.parse::<u32>().ok());
        if let Some(tracer) = number("TracerPid:").filter(|pid| *pid != 0) {
            self.traced.insert(pid, tracer);
        }
        let user = field(&status, "Uid:");
        self.users.extend(user.and_then(|ids| ids.split('\t').next()?.parse::<u32>().ok()));
        if field(&status, "State:").is_some_and(|state| state.starts_with('T')) {
            self.stopped.insert(pid);
        }
        if number("Seccomp:").is_some_and(|mode| mode != 0) {
            self.seccomp.insert(pid);
        }
        let profile = read(&format!("/proc/{pid}/attr/current"));
        let profile = profile.trim_end_matches(['\0', '\n']);
        if !profile.is_empty() && !profile.starts_with("unconfined") {
            self.profiles.insert(profile.to_owned());
        }
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
        for file in files.flatten() {
            let Ok(link) = fs::read_link(file.path()) else { continue };
            let link = link.to_string_lossy().into_owned();
            let number = file.file_name().to_string_lossy().into_owned();
            let info = read(&format!("/proc/{pid}/fdinfo/{number}"));
            if let Some(name) = link.strip_prefix("anon_inode:") {
                self.anonymous.insert((pid, name.trim_matches(['[', ']']).to_owned()));
                if mounts.watches_overlay(&info) {
                    self.inotify_on_overlay.insert(pid);
                }
                if losses::is_semaphore(&info) {
                    self.semaphores.insert((pid, number));
                } else if losses::is_unread_timer(&info) {
                    self.unread_timers.insert((pid, number));
                }
            } else if let Ok(meta) = fs::metadata(file.path()) {
                self.open_file(pid, &link, &meta, mount_of(&info).is_some_and(|m| mounts.has(m)));
            }
        }
    }

    fn open_file(&mut self, pid: u32, link: &str, meta: &fs::Metadata, is_inside: bool) {
        let kind = meta.file_type();
        if kind.is_char_device() && !is_usual(meta.rdev()) || kind.is_block_device() {
            self.devices.insert((pid, link.to_owned()));
        }
        // Memory that has a name only, too, is in no folder.
        let is_named = link.starts_with('/') && !link.starts_with("/memfd:");
        if kind.is_file() && is_named && !is_inside {
            self.host_files.insert((pid, link.to_owned()));
        }
    }
}

/// Devices that CRIU opens again as they are: memory's (null, zero, random, kmsg, ...), terminals, tun.
fn is_usual(device: u64) -> bool {
    match nix::sys::stat::major(device) {
        1 | 5 | 136..=143 => true,
        10 => nix::sys::stat::minor(device) == 200,
        _ => false,
    }
}

/// Those of `pids` that hold a lock, of `/proc/locks`.
fn file_locks(text: &str, pids: &[u32]) -> BTreeSet<u32> {
    let owner = |line: &str| {
        // `1: POSIX  ADVISORY  WRITE 1234 08:01:77 0 EOF`; one that waits has an arrow.
        if line.contains("->") || line.contains("LEASE") {
            return None;
        }
        line.split_whitespace().nth(4)?.parse::<u32>().ok()
    };
    text.lines().filter_map(owner).filter(|pid| pids.contains(pid)).collect()
}

fn read(path: &str) -> String {
    fs::read(Path::new(path))
        .map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_locks_that_are_held_count() {
        let text = "1: POSIX  ADVISORY  WRITE 7 08:01:77 0 EOF\n1: -> POSIX ADVISORY WRITE 8 08:01:77 0 EOF\n\
                    2: FLOCK  ADVISORY  WRITE 9 08:01:78 0 EOF\n3: LEASE  ACTIVE  READ 10 08:01:79 0 EOF\n";
        assert_eq!(file_locks(text, &[7, 8, 10]), BTreeSet::from([7]));
        assert_eq!(file_locks(text, &[9]), BTreeSet::from([9]));
    }

    #[test]
    fn a_process_of_this_machine_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("open")).unwrap();
        let me = std::process::id();
        let mut all = Processes::gather(me, &[me]);
        assert!(all.traced.is_empty() && all.host_files.is_empty(), "{all:?}");
        all.look_at(me, &Mounts::default());
        assert!(all.host_files.iter().any(|(_, path)| path.ends_with("/open")), "{all:?}");
        drop(file);
        assert!(
            is_usual(nix::sys::stat::makedev(1, 3)) && !is_usual(nix::sys::stat::makedev(10, 229))
        );
    }

    #[test]
    fn descendants_are_found() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pids = below(std::process::id()).unwrap();
        assert!(pids.contains(&child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
