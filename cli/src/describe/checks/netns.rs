//! What stands in the way of a container whose network namespace is given by path. The namespace
//! stays behind with all its devices and addresses; the container goes into the one that has the same
//! path at the destination, of which the move changes nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use super::super::container::{ContainerFacts, Names, Network};
use super::super::room::NetnsFacts;
use super::{Blocker, Facts, block, inside};

/// Whether the path can stand for a namespace on another host too.
pub(super) fn here(id: &str, path: &str, names: Names, found: &mut Vec<Blocker>) {
    let (what, cure) = match names {
        Names::Hosts => (
            format!("the network namespace of {id} ({path}) is the host's own"),
            "start it with --net-host",
        ),
        _ if of_a_process(path) => (
            format!("the network namespace of {id} is given by a process of this host ({path})"),
            "name one on both hosts (ip netns add NAME, or attach NAME PID) and start the container \
             with network:/run/netns/NAME",
        ),
        Names::Other => (
            format!("{path} is no longer the network namespace that {id} is in"),
            "start the container anew",
        ),
        Names::Its => return,
    };
    block(found, "netns-path", what, cure);
}

/// The number of a process means nothing elsewhere.
fn of_a_process(path: &str) -> bool {
    Path::new(path).starts_with("/proc")
}

/// Whether the destination has the namespace, and in it the addresses that sockets of the container
/// are bound to.
pub(super) fn there(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    let path = match &facts.container.network {
        Network::Path { path, names: Names::Its } if !of_a_process(path) => path,
        _ => return,
    };
    let what = match &facts.room.netns {
        Some(NetnsFacts::There(addresses)) => return bound(facts, path, addresses, found),
        Some(NetnsFacts::Hosts) => "is the host's own network namespace",
        Some(NetnsFacts::NoNamespace) => "is no network namespace",
        Some(NetnsFacts::Missing) | None => "is missing",
    };
    let file = Path::new(path);
    let cure = match (file.parent().and_then(Path::file_name), file.file_name()) {
        (Some(folder), Some(name)) if folder == "netns" => {
            format!("ip netns add {}", name.to_string_lossy())
        }
        _ => format!("touch {path}; unshare --net={path} true"),
    };
    let cure = format!("make it there: {cure}; then its devices, lo among them");
    block(found, "netns-missing", format!("{path} {what} on the destination"), &cure);
}

fn bound(facts: &Facts<'_>, path: &str, there: &[IpAddr], found: &mut Vec<Blocker>) {
    let local = facts.container.sockets.iter().map(|socket| socket.local.ip());
    let local = local.filter(|ip| !ip.is_unspecified() && !ip.is_multicast());
    // What connects later needs lo as well.
    let wanted: BTreeSet<_> = local.chain([Ipv4Addr::LOCALHOST.into()]).collect();
    // All of 127.0.0.0/8 comes with its first address.
    let comes_with = |ip: &IpAddr, has: &IpAddr| {
        has == ip || ip.is_ipv4() && ip.is_loopback() && *has == Ipv4Addr::LOCALHOST
    };
    for ip in wanted.iter().filter(|ip| !there.iter().any(|has| comes_with(ip, has))) {
        let what = format!("{path} on the destination does not have {ip}, or its device is down");
        let cure = match ip.is_loopback() {
            true => "link set lo up".to_owned(),
            false => format!("addr add {ip}/PREFIX dev DEVICE"),
        };
        block(found, "netns-address", what, &format!("nsenter --net={path} ip {cure}"));
    }
}

/// Nothing leads the other end of a connection to where the container goes.
pub(super) fn connections(container: &ContainerFacts, found: &mut Vec<Blocker>) {
    for socket in container.sockets.iter().filter(|s| s.connected && !inside(container, s)) {
        let what = format!("connection {} to {} leaves the container", socket.local, socket.remote);
        let cure = "end it: in a network namespace given by path only connections between the \
                    container's own processes can follow";
        block(found, "connection", what, cure);
    }
}
