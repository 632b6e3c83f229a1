//! Facts of the place a container is to go to.

use std::io;
use std::path::Path;

use ferry_oci::paths;
use ferry_oci::sockets::{self, InetSocket};
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
}

/// What the destination has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RoomFacts {
    /// A container of that id exists in the namespace.
    pub(crate) id_taken: bool,
    /// Every listening socket of the host's network.
    pub(crate) listeners: Vec<InetSocket>,
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
        let mut listeners = sockets::in_netns_of(std::process::id())?;
        listeners.retain(|s| s.listening);
        let (address_on, device) = match &request.ip {
            Some(cidr) => (address::device_with(cidr.ip)?, address::device_for(cidr)?),
            None => (None, None),
        };
        let absent = |p: &&String| !Path::new(p.as_str()).exists();
        Ok(Self {
            id_taken,
            listeners,
            address_on,
            device,
            missing_paths: request.paths.iter().filter(absent).cloned().collect(),
            memory_available: memory_available(&std::fs::read_to_string("/proc/meminfo")?),
            images_free: images_free(),
        })
    }
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
    fn available_memory_is_read_in_bytes() {
        assert_eq!(memory_available("MemTotal: 9 kB\nMemAvailable:   42 kB\n"), 42 * 1024);
        assert_eq!(memory_available(""), 0);
    }
}
