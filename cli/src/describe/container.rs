//! Facts of a running container, as its source host sees them.

use std::collections::BTreeMap;
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use ferry_oci::api::ferry::{Description, Phase};
use ferry_oci::cgroups;
use ferry_oci::freezer::Freezer;
use ferry_oci::netns::Netns;
use ferry_oci::sockets::{self, InetSocket};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::containerd::ContainerRecord;

use super::memory::MemoryFacts;

/// The network a container lives in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Network {
    /// The host's own.
    Host,
    /// A namespace of its own with only the loopback device.
    Loopback,
    /// A namespace of its own with these devices: somebody (CNI) put them there.
    Devices(Vec<String>),
    /// A namespace given by its path.
    Path {
        /// The path.
        path: String,
        /// What is there by now.
        names: Names,
    },
}

/// What the path of a network namespace names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Names {
    /// The namespace that the container is in.
    Its,
    /// The same, and it is the host's own.
    Hosts,
    /// Something else, or nothing.
    Other,
}

/// A bind mount of the container's spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bind {
    /// Path on the host.
    pub(crate) source: String,
    /// Path in the container.
    pub(crate) target: String,
}

/// A namespace that a process outside the container is in, too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shared {
    /// `net`, `pid` or `ipc`.
    pub(crate) kind: String,
    /// A process outside the container.
    pub(crate) pid: u32,
}

/// What a container is, as far as a move depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerFacts {
    /// Container id.
    pub(crate) id: String,
    /// containerd namespace.
    pub(crate) namespace: String,
    /// Name of the image.
    pub(crate) image: String,
    /// Name of the runtime.
    pub(crate) runtime: String,
    /// Snapshotter of the root file system.
    pub(crate) snapshotter: String,
    /// Sandbox it belongs to, or empty.
    pub(crate) sandbox: String,
    /// Labels of the container record.
    pub(crate) labels: BTreeMap<String, String>,
    /// Task state: created, running, paused, stopped.
    pub(crate) status: String,
    /// Migration under way, or empty.
    pub(crate) migration: String,
    /// Execs that have not been deleted.
    pub(crate) execs: Vec<String>,
    /// Whether its init has a terminal.
    pub(crate) terminal: bool,
    /// Its network.
    pub(crate) network: Network,
    /// Inet sockets of its processes.
    pub(crate) sockets: Vec<InetSocket>,
    /// Bind mounts.
    pub(crate) binds: Vec<Bind>,
    /// pid or ipc namespaces that the spec names by path.
    pub(crate) joined: Vec<String>,
    /// Namespaces it shares with processes outside.
    pub(crate) shared: Vec<Shared>,
    /// Whether it has a user namespace.
    pub(crate) user_namespace: bool,
    /// Names of OCI hooks.
    pub(crate) hooks: Vec<String>,
    /// A process that is stopped by a signal, and cannot be dumped here then.
    pub(crate) stopped: Option<u32>,
    /// Processes that use io_uring.
    pub(crate) io_uring: Vec<u32>,
    /// Memory that is resident, summed over the processes, bytes.
    pub(crate) resident: u64,
    /// Its memory, by what becomes of it in a move.
    pub(crate) memory: MemoryFacts,
    /// Processes.
    pub(crate) processes: usize,
    /// Cgroups that were made inside the container.
    pub(crate) own_cgroups: Vec<String>,
}

/// What the container's record says: the parts of it that facts are made from.
pub(crate) struct FromRecord<'a> {
    pub(crate) image: &'a str,
    pub(crate) runtime: &'a str,
    pub(crate) snapshotter: &'a str,
    pub(crate) sandbox: &'a str,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) spec: &'a [u8],
}

impl<'a> From<&'a ContainerRecord> for FromRecord<'a> {
    fn from(record: &'a ContainerRecord) -> Self {
        Self {
            image: &record.image,
            runtime: &record.runtime,
            snapshotter: &record.snapshotter,
            sandbox: &record.sandbox,
            labels: record.labels.clone(),
            spec: &record.spec.value,
        }
    }
}

impl ContainerFacts {
    /// Gathers the facts from the record, the shim's description and `/proc`.
    ///
    /// # Errors
    /// When the spec cannot be read or the processes are gone.
    pub(crate) fn gather(record: FromRecord<'_>, shim: &Description) -> Result<Self> {
        let spec: Spec =
            serde_json::from_slice(record.spec).context("read the container's spec")?;
        let network = network(&spec, shim.init_pid)?;
        let migrating = shim.phase.enum_value_or_default() != Phase::PHASE_NONE;
        Ok(Self {
            id: shim.id.clone(),
            namespace: shim.namespace.clone(),
            image: record.image.to_owned(),
            runtime: record.runtime.to_owned(),
            snapshotter: record.snapshotter.to_owned(),
            sandbox: record.sandbox.to_owned(),
            labels: record.labels,
            status: shim.status.clone(),
            migration: if migrating { shim.migration.clone() } else { String::new() },
            execs: shim.execs.clone(),
            terminal: shim.terminal,
            sockets: sockets::of_processes(&shim.pids).context("read the container's sockets")?,
            binds: binds(&spec),
            joined: joined(&spec),
            shared: shared(shim, &network),
            user_namespace: namespaces(&spec).any(|(kind, _)| kind == LinuxNamespaceType::User),
            hooks: hooks(&spec),
            stopped: Freezer::of(shim.init_pid).ok().and_then(|freezer| freezer.stopped()),
            io_uring: shim.pids.iter().copied().filter(|&p| uses_io_uring(p)).collect(),
            resident: shim.pids.iter().map(|&p| resident(p)).sum(),
            memory: MemoryFacts::gather(&spec, shim.init_pid, &shim.pids)?,
            processes: shim.pids.len(),
            own_cgroups: cgroups::made_inside(shim.init_pid)
                .context("read the container's cgroups")?
                .iter()
                .map(|path| path.display().to_string())
                .collect(),
            network,
        })
    }
}

fn namespaces(spec: &Spec) -> impl Iterator<Item = (LinuxNamespaceType, Option<String>)> + '_ {
    spec.linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_ref())
        .into_iter()
        .flatten()
        .map(|n| (n.typ(), n.path().as_ref().map(|p| p.to_string_lossy().into_owned())))
}

fn network(spec: &Spec, pid: u32) -> Result<Network> {
    match namespaces(spec).find(|(kind, _)| *kind == LinuxNamespaceType::Network) {
        None => Ok(Network::Host),
        Some((_, Some(path))) if !path.is_empty() => {
            // A task that has ended is in none: its state is told by another check.
            let names = names(&path, pid).unwrap_or(Names::Its);
            Ok(Network::Path { path, names })
        }
        Some(_) => {
            let text = fs::read_to_string(format!("/proc/{pid}/net/dev"))
                .context("read the container's network devices")?;
            let devices = devices(&text);
            Ok(if devices.is_empty() { Network::Loopback } else { Network::Devices(devices) })
        }
    }
}

fn names(path: &str, pid: u32) -> std::io::Result<Names> {
    let its = Netns::of(pid)?;
    Ok(match Netns::open(Path::new(path)) {
        _ if its.is_own()? => Names::Hosts,
        Ok(netns) if netns.is(&its)? => Names::Its,
        _ => Names::Other,
    })
}

/// Devices but `lo`. Kernels make some templates in every namespace; those are no devices.
fn devices(proc_net_dev: &str) -> Vec<String> {
    const TEMPLATES: [&str; 9] =
        ["lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0"];
    proc_net_dev
        .lines()
        .skip(2)
        .filter_map(|l| Some(l.split_once(':')?.0.trim()))
        .filter(|name| !TEMPLATES.contains(name) && *name != "ip6gre0")
        .map(str::to_owned)
        .collect()
}

fn binds(spec: &Spec) -> Vec<Bind> {
    let is_bind = |m: &&oci_spec::runtime::Mount| {
        m.typ().as_deref() == Some("bind")
            || m.options().iter().flatten().any(|o| o == "bind" || o == "rbind")
    };
    spec.mounts()
        .iter()
        .flatten()
        .filter(is_bind)
        .map(|m| Bind {
            source: m.source().as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
            target: m.destination().display().to_string(),
        })
        .collect()
}

fn joined(spec: &Spec) -> Vec<String> {
    namespaces(spec)
        .filter(|(kind, _)| *kind != LinuxNamespaceType::Network)
        .filter_map(|(kind, path)| Some(format!("{kind} {}", path.filter(|p| !p.is_empty())?)))
        .collect()
}

fn hooks(spec: &Spec) -> Vec<String> {
    let Some(hooks) = spec.hooks() else { return Vec::new() };
    let groups = [
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ];
    groups.into_iter().flatten().flatten().map(|h| h.path().display().to_string()).collect()
}

/// Processes outside the container in one of its own namespaces.
fn shared(shim: &Description, network: &Network) -> Vec<Shared> {
    let kinds: &[&str] =
        if *network == Network::Host { &["pid", "ipc"] } else { &["pid", "ipc", "net"] };
    let inode = |pid: u32, kind: &str| {
        fs::metadata(format!("/proc/{pid}/ns/{kind}")).map(|m| m.st_ino()).ok()
    };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let others: Vec<u32> = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| !shim.pids.contains(pid))
        .collect();
    let mut found = Vec::new();
    for kind in kinds {
        let Some(own) = inode(shim.init_pid, kind) else { continue };
        // A namespace of the host itself is no namespace of the container's.
        if inode(std::process::id(), kind) == Some(own) {
            continue;
        }
        // A process that was forked since the shim was asked is the container's own.
        let foreign = |pid: u32| inode(pid, kind) == Some(own) && !descends(pid, shim.init_pid);
        if let Some(&pid) = others.iter().find(|&&pid| foreign(pid)) {
            found.push(Shared { kind: (*kind).to_owned(), pid });
        }
    }
    found
}

/// Whether `pid` has `ancestor` above it, or has ended meanwhile.
fn descends(pid: u32, ancestor: u32) -> bool {
    let mut at = pid;
    while at != ancestor {
        let Ok(stat) = fs::read_to_string(format!("/proc/{at}/stat")) else { return true };
        // After the name, which may hold anything: state and parent.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        match parent.and_then(|p| p.parse().ok()) {
            Some(0) | None => return false,
            Some(parent) => at = parent,
        }
    }
    true
}

fn uses_io_uring(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|entries| {
        entries.flatten().any(|e| {
            fs::read_link(e.path()).is_ok_and(|l| l.to_string_lossy().contains("[io_uring]"))
        })
    })
}

/// Memory of a process, bytes; 0 of one that has ended.
pub(crate) fn resident(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        })
        .map_or(0, |kb| kb * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn binds_are_found_by_type_and_by_option() {
        let spec = spec(
            r#"{"ociVersion":"1.0.0","mounts":[
                {"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/etc/hosts","type":"bind","source":"/etc/hosts"},
                {"destination":"/data","type":"none","source":"/srv","options":["rbind"]}]}"#,
        );
        let targets: Vec<_> = binds(&spec).into_iter().map(|b| b.target).collect();
        assert_eq!(targets, ["/etc/hosts", "/data"]);
    }

    #[test]
    fn a_network_namespace_with_a_path_is_named() {
        let given = |path: &str| {
            spec(&format!(
                r#"{{"ociVersion":"1.0.0","linux":{{"namespaces":[
                {{"type":"network","path":"{path}"}},{{"type":"pid"}},
                {{"type":"ipc","path":"/proc/7/ns/ipc"}}]}}}}"#,
            ))
        };
        let own = format!("/proc/{}/ns/net", std::process::id());
        let path = own.clone();
        let network = network(&given(&own), std::process::id()).unwrap();
        assert_eq!(network, Network::Path { path, names: Names::Hosts });
        assert_eq!(joined(&given(&own)), ["ipc /proc/7/ns/ipc"]);
    }

    #[test]
    fn only_devices_that_somebody_added_count() {
        let text = "Inter-|\n face |\n    lo: 0 0\n  sit0: 0\n  eth0: 0 0\n";
        assert_eq!(devices(text), ["eth0"]);
    }
}
