//! Addresses of this host: who has one, adding and removing one.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ferry_oci::announce;
use futures_util::TryStreamExt;
use nix::ifaddrs::getifaddrs;
use serde::{Deserialize, Serialize};

/// How long the kernel may take to answer.
const KERNEL: Duration = Duration::from_secs(15);

/// An IPv4 address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct Cidr {
    /// The address.
    pub(crate) ip: Ipv4Addr,
    /// Length of the prefix in bits, 1 to 32.
    pub(crate) prefix: u8,
}

impl Cidr {
    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0)
    }

    /// Whether `other` is in the same network.
    fn holds(self, other: Ipv4Addr) -> bool {
        (u32::from(self.ip) ^ u32::from(other)) & self.mask() == 0
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (ip, prefix) = text
            .split_once('/')
            .ok_or_else(|| format!("{text} has no prefix length: write {text}/24 for example"))?;
        if ip.contains(':') {
            return Err(format!("{ip} is IPv6: only IPv4 addresses can be handed over"));
        }
        let ip: Ipv4Addr = ip.parse().map_err(|_| format!("{ip} is no IPv4 address"))?;
        let prefix: u8 = prefix.parse().unwrap_or(0);
        if !(1..=32).contains(&prefix) {
            return Err("the prefix length of an IPv4 address is 1 to 32".to_owned());
        }
        if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() {
            return Err(format!("{ip} cannot be handed over: it is no host's address"));
        }
        Ok(Self { ip, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl TryFrom<String> for Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// The interface that has `ip`.
///
/// # Errors
/// When the interfaces cannot be read.
pub(crate) fn device_with(ip: Ipv4Addr) -> io::Result<Option<String>> {
    Ok(own_addresses()?.into_iter().find(|(_, address)| *address == ip).map(|(name, _)| name))
}

/// The Ethernet interface of this host whose network `cidr` belongs to; on others an address cannot
/// be announced.
///
/// # Errors
/// When the interfaces cannot be read.
pub(crate) fn device_for(cidr: &Cidr) -> io::Result<Option<String>> {
    Ok(own_addresses()?
        .into_iter()
        .filter(|(name, _)| announce::is_ethernet(name))
        .find(|(_, address)| !address.is_loopback() && *address != cidr.ip && cidr.holds(*address))
        .map(|(name, _)| name))
}

/// Addresses of the same network and device that the kernel would remove along with `cidr`: those
/// that were added after it. None when the device promotes them instead.
///
/// # Errors
/// When the interfaces cannot be read.
pub(crate) fn goes_along(cidr: &Cidr, device: &str) -> io::Result<Vec<Ipv4Addr>> {
    let promotes = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/promote_secondaries"))
            .is_ok_and(|text| text.trim() == "1")
    };
    if promotes(device) || promotes("all") {
        return Ok(Vec::new());
    }
    // The kernel lists the addresses of a network in the order in which they were added.
    let mut same = own_addresses()?
        .into_iter()
        .filter(|(name, address)| name == device && cidr.holds(*address))
        .map(|(_, address)| address);
    match same.next() {
        Some(first) if first == cidr.ip => Ok(same.collect()),
        _ => Ok(Vec::new()),
    }
}

fn own_addresses() -> io::Result<Vec<(String, Ipv4Addr)>> {
    Ok(getifaddrs()?
        .filter_map(|i| Some((i.interface_name, i.address?.as_sockaddr_in()?.ip())))
        .collect())
}

/// Gives `device` the address; no error when it has it.
///
/// # Errors
/// When the device is not there or the kernel refuses.
pub(crate) async fn add(cidr: Cidr, device: &str) -> Result<()> {
    within(add_now(cidr, device)).await
}

async fn within<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(KERNEL, work).await.context("the kernel does not answer rtnetlink")?
}

async fn add_now(cidr: Cidr, device: &str) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open rtnetlink")?;
    let task = tokio::spawn(connection);
    let result = async {
        let index = index_of(&handle, device).await?;
        handle
            .address()
            .add(index, IpAddr::V4(cidr.ip), cidr.prefix)
            .replace()
            .execute()
            .await
            .with_context(|| format!("add {cidr} to {device}"))
    }
    .await;
    task.abort();
    result
}

/// Takes the address from the interface that has it; no error when none has.
///
/// # Errors
/// When the kernel refuses.
pub(crate) async fn remove(ip: Ipv4Addr) -> Result<()> {
    within(remove_now(ip)).await
}

async fn remove_now(ip: Ipv4Addr) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open rtnetlink")?;
    let task = tokio::spawn(connection);
    let result = async {
        let mut found = handle.address().get().set_address_filter(IpAddr::V4(ip)).execute();
        while let Some(message) = found.try_next().await.context("list addresses")? {
            handle
                .address()
                .del(message)
                .execute()
                .await
                .with_context(|| format!("remove {ip}"))?;
        }
        Ok(())
    }
    .await;
    task.abort();
    result
}

async fn index_of(handle: &rtnetlink::Handle, device: &str) -> Result<u32> {
    let mut links = handle.link().get().match_name(device.to_owned()).execute();
    match links.try_next().await.with_context(|| format!("find interface {device}"))? {
        Some(link) => Ok(link.header.index),
        None => bail!("this host has no interface {device}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_addresses_are_refused_with_the_cure() {
        for (text, part) in [
            ("10.0.0.1", "10.0.0.1/24"),
            ("fd00::1/64", "only IPv4"),
            ("10.0.0/24", "no IPv4 address"),
            ("10.0.0.1/0", "1 to 32"),
            ("10.0.0.1/33", "1 to 32"),
            ("127.0.0.1/8", "cannot be handed over"),
        ] {
            let error = text.parse::<Cidr>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_network_holds_its_own_addresses_only() {
        let cidr: Cidr = "10.77.0.100/24".parse().unwrap();
        assert!(cidr.holds(Ipv4Addr::new(10, 77, 0, 2)));
        assert!(!cidr.holds(Ipv4Addr::new(10, 78, 0, 2)));
        let host: Cidr = "10.77.0.100/32".parse().unwrap();
        assert!(!host.holds(Ipv4Addr::new(10, 77, 0, 101)));
    }

    #[test]
    fn loopback_is_found_by_its_address() {
        assert_eq!(device_with(Ipv4Addr::LOCALHOST).unwrap().as_deref(), Some("lo"));
    }
}
