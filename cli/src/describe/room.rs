//! Facts of the place a container is to go to.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use ferry_oci::netns::Netns;
use ferry_oci::paths;
use ferry_oci::sockets::{self, InetSocket};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use serde::{Deserialize, Serialize};

use crate::network::address::{self, Cidr};

/// What the source asks about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RoomRequest {
    /// Container id.
    pub(crate) id: String,
    /// The address that moves.
    pub(crate) ip: Option<Cidr>,
    /// Host paths that the container binds and that this host must have.
    pub(crate) paths: Vec<String>,
    /// Path of the network namespace that it is to be in.
    pub(crate) netns: Option<String>,
}

/// What the destination has at the path of a network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NetnsFacts {
    /// Nothing.
    Missing,
    /// Something else: a file that `ip netns` has left from before a restart, for example.
    NoNamespace,
    /// The host's own.
    Hosts,
    /// A network namespace; the addresses of its devices that are up.
    There(Vec<IpAddr>),
}

/// What the destination has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RoomFacts {
    /// A container of that id exists in the namespace.
    pub(crate) id_taken: bool,
    /// Every listening socket of the network that the container is to be in.
    pub(crate) listeners: Vec<InetSocket>,
    /// What is at the path of the network namespace, if the request names one.
    pub(crate) netns: Option<NetnsFacts>,
    /// Interface that has the address already.
    pub(crate) address_on: Option<String>,
    /// Interface whose network the address belongs to.
    pub(crate) device: Option<String>,
    /// Paths of the request that are not there.
    pub(crate) missing_paths: Vec<String>,
    /// Memory that can be had without swapping, bytes.
    pub(crate) memory_available: u64,
    /// Free space where images are received (a tmpfs), bytes.
    pub(crate) images_free: u64,
}

impl RoomFacts {
    /// Gathers the facts that `request` asks for.
    ///
    /// # Errors
    /// When sockets or interfaces cannot be read.
    pub(crate) fn gather(request: &RoomRequest, id_taken: bool) -> io::Result<Self> {
        let (netns, mut listeners) = match &request.netns {
            Some(path) => {
                let (netns, sockets) = netns(Path::new(path))?;
                (Some(netns), sockets)
            }
            None => (None, sockets::in_netns_of(std::process::id())?),
        };
        listeners.retain(|s| s.listening);
        let (address_on, device) = match &request.ip {
            Some(cidr) => (address::device_with(cidr.ip)?, address::device_for(cidr)?),
            None => (None, None),
        };
        let absent = |p: &&String| !Path::new(p.as_str()).exists();
        Ok(Self {
            id_taken,
            listeners,
            netns,
            address_on,
            device,
            missing_paths: request.paths.iter().filter(absent).cloned().collect(),
            memory_available: memory_available(&std::fs::read_to_string("/proc/meminfo")?),
            images_free: images_free(),
        })
    }
}

/// What is at `path`, and the sockets in there.
fn netns(path: &Path) -> io::Result<(NetnsFacts, Vec<InetSocket>)> {
    let netns = match Netns::open(path) {
        Ok(netns) => netns,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok((NetnsFacts::Missing, Vec::new()));
        }
        Err(error) => return Err(error),
    };
    if netns.is_own()? {
        return Ok((NetnsFacts::Hosts, Vec::new()));
    }
    let look = || {
        let addresses = addresses_that_are_up()?;
        // This thread, and not its process, is in there.
        let sockets = sockets::in_netns_of(nix::unistd::gettid().as_raw().cast_unsigned())?;
        io::Result::Ok((NetnsFacts::There(addresses), sockets))
    };
    match netns.run(look) {
        Ok(facts) => facts,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Ok((NetnsFacts::NoNamespace, Vec::new()))
        }
        Err(error) => Err(error),
    }
}

fn addresses_that_are_up() -> io::Result<Vec<IpAddr>> {
    let up = getifaddrs()?.filter(|i| i.flags.contains(InterfaceFlags::IFF_UP));
    Ok(up
        .filter_map(|i| {
            let address = i.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .collect())
}

fn memory_available(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse().ok())
        .map_or(0, |kb: u64| kb * 1024)
}

fn images_free() -> u64 {
    // The folder may not be there yet; it will lie on the same file system as its parent.
    [paths::IMAGES, paths::RUN, "/run"]
        .iter()
        .find_map(|path| nix::sys::statvfs::statvfs(*path).ok())
        .map_or(0, |s| s.blocks_available() * s.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_without_a_network_namespace_is_told_from_one_with() {
        let at = |path: &str| netns(Path::new(path)).unwrap().0;
        assert_eq!(at("/run/netns/there-is-no-such-name"), NetnsFacts::Missing);
        assert_eq!(at("/proc/version"), NetnsFacts::NoNamespace);
        assert_eq!(at("/proc/self/ns/uts"), NetnsFacts::NoNamespace);
        assert_eq!(at("/proc/self/ns/net"), NetnsFacts::Hosts);
        let mut other = std::process::Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up; echo; read _"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let there = at(&format!("/proc/{}/ns/net", other.id()));
        drop(other.stdin.take());
        other.wait().unwrap();
        let NetnsFacts::There(addresses) = there else { panic!("{there:?}") };
        assert!(addresses.contains(&IpAddr::from([127, 0, 0, 1])), "{addresses:?}");
        assert!(addresses.iter().all(IpAddr::is_loopback), "{addresses:?}");
    }

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(memory_available("MemTotal: 9 kB\nMemAvailable:   42 kB\n"), 42 * 1024);
        assert_eq!(memory_available(""), 0);
    }
}
