//! What stands in the way of a move. Pure: facts in, named blockers with their cures out.

mod memory;
mod netns;

use std::net::{IpAddr, SocketAddr};

use ferry_oci::sockets::{InetSocket, Protocol};
use serde::Serialize;

use super::container::{ContainerFacts, Network};
use super::host::HostFacts;
use super::memory::Way;
use super::room::RoomFacts;
use crate::network::address::Cidr;

/// The runtime that ferry's shim answers for.
pub(crate) const RUNTIME: &str = "io.containerd.ferry.v2";

/// Files that `ctr run --net-host` binds from the host: the destination's own take their place.
const HOST_FILES: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Blocker {
    /// Its name, for scripts.
    pub(crate) name: &'static str,
    /// What is the matter.
    pub(crate) what: String,
    /// What to do about it.
    pub(crate) cure: String,
}

/// Everything that the decision rests on.
pub(crate) struct Facts<'a> {
    pub(crate) source: &'a HostFacts,
    pub(crate) destination: &'a HostFacts,
    pub(crate) container: &'a ContainerFacts,
    pub(crate) room: &'a RoomFacts,
    /// How the memory is to move.
    pub(crate) way: Way,
    pub(crate) ip: Option<Cidr>,
    /// Interface of the source that has `ip`.
    pub(crate) ip_on_source: Option<&'a str>,
    /// Addresses of the source that the kernel would remove along with `ip`.
    pub(crate) goes_along: &'a [IpAddr],
    /// The connection to the destination comes from `ip` itself.
    pub(crate) link_on_ip: bool,
}

/// Host paths that the destination must have for this container.
pub(crate) fn paths_needed(container: &ContainerFacts) -> Vec<String> {
    let sources = container.binds.iter().map(|b| b.source.clone());
    sources.filter(|s| HOST_FILES.contains(&s.as_str())).collect()
}

/// The path of a network namespace that the destination must have for this container.
pub(crate) fn netns_needed(container: &ContainerFacts) -> Option<String> {
    match &container.network {
        Network::Path { path, .. } => Some(path.clone()),
        _ => None,
    }
}

/// What of a container alone stands in the way, wherever it is to go.
pub(crate) fn of_container(container: &ContainerFacts) -> Vec<Blocker> {
    let mut found = Vec::new();
    state(container, &mut found);
    isolation(container, &mut found);
    bound_and_layered(container, &mut found);
    if matches!(container.network, Network::Path { .. }) {
        netns::connections(container, &mut found);
    }
    // As it moves unless the operator says otherwise.
    memory::limit(container, Way::Store { hidden: true }, &mut found);
    found
}

/// Every blocker there is; an empty list means the container can be moved.
pub(crate) fn blockers(facts: &Facts<'_>) -> Vec<Blocker> {
    let mut found = Vec::new();
    hosts(facts, &mut found);
    state(facts.container, &mut found);
    isolation(facts.container, &mut found);
    netns::there(facts, &mut found);
    files(facts, &mut found);
    address(facts, &mut found);
    connections(facts, &mut found);
    room(facts, &mut found);
    found
}

fn block(found: &mut Vec<Blocker>, name: &'static str, what: String, cure: &str) {
    found.push(Blocker { name, what, cure: cure.to_owned() });
}

fn hosts(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    let (source, destination) = (facts.source, facts.destination);
    for (host, side) in [(source, "source"), (destination, "destination")] {
        let name = &host.hostname;
        if host.criu.is_none() {
            let what = format!("criu does not start on the {side} {name}");
            block(found, "criu-missing", what, "install criu 4.2 or newer there");
        }
        if host.runc.is_none() {
            let what = format!("runc does not start on the {side} {name}");
            block(found, "runc-missing", what, "install runc 1.2 or newer there");
        }
        if !host.nf_tables {
            let what = format!("the kernel of the {side} {name} has no nf_tables");
            block(found, "nf-tables", what, "load the module nf_tables there");
        }
        if !host.shim {
            let what = format!("containerd-shim-ferry-v2 is not in the path of {side} {name}");
            block(found, "shim-missing", what, "install it beside ferry there");
        }
    }
    if source.boot_id == destination.boot_id && source.hostname == destination.hostname {
        let what = format!("source and destination are both {}", source.hostname);
        block(found, "same-host", what, "give another host to --to");
    }
    if source.arch != destination.arch {
        let what = format!("the source is {}, the destination {}", source.arch, destination.arch);
        block(found, "architecture", what, "choose a destination of the same architecture");
    }
    let missing: Vec<_> = source.cpu_flags.difference(&destination.cpu_flags).cloned().collect();
    if !missing.is_empty() {
        let what = format!("the destination's processor lacks {}", missing.join(" "));
        block(
            found,
            "cpu",
            what,
            "choose a destination whose processor can do what the source's can",
        );
    }
    if let (Some(from), Some(to)) = (&source.criu, &destination.criu)
        && version(to) < version(from)
    {
        let what = format!("criu {to} on the destination cannot read images of criu {from}");
        block(found, "criu-version", what, "install the source's version of criu or a newer one");
    }
    if source.cgroups != destination.cgroups {
        let what = format!(
            "cgroups are {} on the source and {} on the destination",
            source.cgroups, destination.cgroups
        );
        block(found, "cgroups", what, "start both hosts with the same cgroup layout");
    }
}

/// The numbers of a version, for comparing.
pub(crate) fn version(text: &str) -> Vec<u32> {
    text.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect()
}

fn state(container: &ContainerFacts, found: &mut Vec<Blocker>) {
    let id = &container.id;
    if container.runtime != RUNTIME {
        let what = format!("{id} runs with {}", container.runtime);
        block(found, "runtime", what, &format!("start it with --runtime {RUNTIME}"));
    }
    if container.status != "running" {
        let what = format!("{id} is {}", container.status);
        block(found, "status", what, "only a running container can be moved: start or resume it");
    }
    if !container.migration.is_empty() {
        let what = format!("migration {} of {id} is under way", container.migration);
        block(found, "migrating", what, "wait for it");
    }
    if !container.execs.is_empty() {
        let what = format!("{id} has exec sessions: {}", container.execs.join(", "));
        block(found, "exec-open", what, "end them: their terminals and pipes cannot move");
    }
    if container.terminal {
        let what = format!("{id} has a terminal");
        block(found, "terminal", what, "start it without a terminal");
    }
    if !container.sandbox.is_empty() {
        let what = format!("{id} belongs to pod {}", container.sandbox);
        block(found, "pod", what, "containers of a pod cannot be moved one by one");
    }
    if container.labels.contains_key("containerd.io/restart.status") {
        let what = format!("{id} has a restart policy, which could start a second copy");
        block(found, "restart-policy", what, "remove it (nerdctl update --restart=no)");
    }
    if let Some(process) = container.stopped {
        let what = format!(
            "process {process} of {id} is stopped by a signal, and cannot be dumped frozen"
        );
        block(found, "stopped", what, &format!("let it go on: kill -CONT {process}"));
    }
    if !container.io_uring.is_empty() {
        let what = format!("process {} of {id} uses io_uring", container.io_uring[0]);
        block(found, "io-uring", what, "turn io_uring off in the program: criu cannot dump it");
    }
    if container.user_namespace {
        let what = format!("{id} has a user namespace");
        block(found, "user-namespace", what, "start it without one: ferry cannot move it yet");
    }
}

fn isolation(container: &ContainerFacts, found: &mut Vec<Blocker>) {
    let id = &container.id;
    match &container.network {
        Network::Host | Network::Loopback => {}
        Network::Path { path, names } => netns::here(id, path, *names, found),
        Network::Devices(devices) => {
            let what = format!("the network of {id} has {} (CNI)", devices.join(", "));
            let cure = "use the host's network and --ip, or a network namespace given by path";
            block(found, "cni", what, cure);
        }
    }
    for namespace in &container.joined {
        let what = format!("{id} joined a namespace of another container ({namespace})");
        block(found, "namespace-joined", what, "start it with namespaces of its own");
    }
    for shared in &container.shared {
        let what = format!("process {} is in the {} namespace of {id}", shared.pid, shared.kind);
        block(found, "namespace-shared", what, "end it: it would lose the namespace");
    }
}

fn files(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    bound_and_layered(facts.container, found);
    for path in &facts.room.missing_paths {
        let what = format!("the destination has no {path}");
        block(found, "path-missing", what, "create it: the container binds the host's own");
    }
}

fn bound_and_layered(container: &ContainerFacts, found: &mut Vec<Blocker>) {
    for bind in &container.binds {
        if HOST_FILES.contains(&bind.source.as_str()) {
            continue;
        }
        let what = format!("{} is bound from the host ({})", bind.target, bind.source);
        let (name, cure) = if bind.source.contains("/nerdctl/") && bind.source.contains("/volumes/")
        {
            ("volume", "start it without the volume: ferry cannot move volumes yet")
        } else {
            ("bind-mount", "start it without the mount: ferry cannot move host files yet")
        };
        block(found, name, what, cure);
    }
    for hook in &container.hooks {
        let what = format!("{} has an OCI hook ({hook})", container.id);
        block(found, "hook", what, "start it without hooks: they would not run where it goes");
    }
    if container.snapshotter != "overlayfs" {
        let what = format!("the snapshotter of {} is {}", container.id, container.snapshotter);
        block(found, "snapshotter", what, "use overlayfs");
    }
}

fn address(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    let Some(cidr) = facts.ip else { return };
    if facts.container.network != Network::Host {
        let what = format!("{} does not use the host's network", facts.container.id);
        block(found, "ip-unused", what, "leave --ip out");
    }
    if facts.ip_on_source.is_none() {
        let what = format!("{} is on no interface of the source", cidr.ip);
        block(found, "address-missing", what, "give --ip the address that the clients use");
    }
    if !facts.goes_along.is_empty() {
        let others: Vec<_> = facts.goes_along.iter().map(ToString::to_string).collect();
        let what = format!("removing {} would take {} along", cidr.ip, others.join(", "));
        let cure = "sysctl -w net.ipv4.conf.all.promote_secondaries=1, or add it last";
        block(found, "address-primary", what, cure);
    }
    if facts.link_on_ip {
        let what = format!("the connection to the destination comes from {} itself", cidr.ip);
        let device = facts.ip_on_source.unwrap_or("DEVICE");
        let cure = format!(
            "let this host choose another address: ip addr change {cidr} dev {device} \
             preferred_lft 0"
        );
        block(found, "address-own", what, &cure);
    }
    if let Some(device) = &facts.room.address_on {
        let what = format!("the destination has {} already, on {device}", cidr.ip);
        block(
            found,
            "address-taken",
            what,
            &format!("remove it there: ip addr del {cidr} dev {device}"),
        );
    }
    if facts.room.device.is_none() {
        let what = format!("no interface of the destination is in the network of {cidr}");
        let cure = "choose a destination that has an address of its own in the same network";
        block(found, "address-network", what, cure);
    }
}

fn connections(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    match facts.container.network {
        Network::Host => on_the_hosts_network(facts, found),
        Network::Path { .. } => netns::connections(facts.container, found),
        // Nobody else is in there.
        Network::Loopback | Network::Devices(_) => return,
    }
    ports(facts, found);
}

/// Only what is on the moved address can follow it.
fn on_the_hosts_network(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    let container = facts.container;
    let moved = facts.ip.map(|c| c.ip);
    for socket in &container.sockets {
        let (local, remote) = (socket.local, socket.remote);
        // A peer that is on the moved address itself is a process of the source host.
        let stays = Some(remote.ip()) == moved;
        let follows = Some(local.ip()) == moved && !stays || inside(container, socket);
        let everywhere = local.ip().is_unspecified();
        if socket.connected && !follows {
            let cure = if remote.ip().is_loopback() || stays {
                "its peer stays behind: connect over the moved address, or end it"
            } else {
                "only connections on the address given to --ip can follow: end it"
            };
            let what = format!("connection {local} to {remote} is not on the moved address");
            block(found, "connection", what, cure);
        }
        if socket.listening && !everywhere && Some(local.ip()) != moved && !local.ip().is_loopback()
        {
            let what = format!("{} listens on {local}, which stays behind", container.id);
            block(found, "listener-address", what, "listen on 0.0.0.0, [::] or the moved address");
        }
        if socket.protocol == Protocol::Raw {
            let what = format!("{} has a raw socket", container.id);
            block(found, "raw-socket", what, "end it: it sees packets of the whole host");
        }
    }
}

/// What listens at the destination where the container would.
fn ports(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    let container = facts.container;
    for socket in container.sockets.iter().filter(|s| s.listening) {
        if let Some(other) = facts.room.listeners.iter().find(|other| clash(socket, other)) {
            let protocol = if socket.protocol == Protocol::Udp { "udp" } else { "tcp" };
            let what = format!(
                "{protocol} port {} is taken on the destination ({})",
                socket.local.port(),
                other.local
            );
            block(found, "port-taken", what, "end what listens there");
        }
    }
}

/// Whether both ends of a connection are in the container.
fn inside(container: &ContainerFacts, socket: &InetSocket) -> bool {
    let mirrored = |other: &InetSocket| {
        other.protocol == socket.protocol
            && other.local == socket.remote
            && other.remote == socket.local
    };
    socket.connected && container.sockets.iter().any(mirrored)
}

fn clash(wanted: &InetSocket, there: &InetSocket) -> bool {
    let covers = |a: SocketAddr, dual: bool, b: SocketAddr| {
        a.ip().is_unspecified() && (dual || a.is_ipv4() == b.is_ipv4())
    };
    wanted.protocol == there.protocol
        && wanted.protocol != Protocol::Raw
        && wanted.local.port() == there.local.port()
        && (wanted.local.ip() == there.local.ip()
            || covers(wanted.local, wanted.dual_stack, there.local)
            || covers(there.local, there.dual_stack, wanted.local))
}

fn room(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    let (container, room) = (facts.container, facts.room);
    if room.id_taken {
        let what = format!("the destination has a container {}", container.id);
        block(
            found,
            "id-taken",
            what,
            &format!("remove it there: ctr container rm {}", container.id),
        );
    }
    memory::check(facts, found);
}

#[cfg(test)]
#[path = "checks_tests.rs"]
mod tests;
