//! Addresses of this host: who has one, adding and removing one.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ferry_oci::announce;
use futures_util::TryStreamExt;
use nix::ifaddrs::getifaddrs;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, CacheInfo};

pub(crate) use super::cidr::Cidr;

/// A lifetime without end, seconds.
const FOREVER: u32 = u32::MAX;
/// How long the kernel may take to answer.
const KERNEL: Duration = Duration::from_secs(15);

/// The interface that has `ip`.
///
/// # Errors
/// When the interfaces cannot be read.
pub(crate) fn device_with(ip: IpAddr) -> io::Result<Option<String>> {
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
        .find(|(_, address)| {
            is_of_a_network(*address) && *address != cidr.ip && cidr.holds(*address)
        })
        .map(|(name, _)| name))
}

fn is_of_a_network(address: IpAddr) -> bool {
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !address.is_loopback() && !link_local
}

/// Addresses of the same network and device that the kernel would remove along with `cidr`: those
/// that were added after it. None when the device promotes them instead, and none of IPv6.
///
/// # Errors
/// When the interfaces cannot be read.
pub(crate) fn goes_along(cidr: &Cidr, device: &str) -> io::Result<Vec<IpAddr>> {
    let promotes = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/promote_secondaries"))
            .is_ok_and(|text| text.trim() == "1")
    };
    if cidr.ip.is_ipv6() || promotes(device) || promotes("all") {
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

fn own_addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    Ok(getifaddrs()?.filter_map(|i| Some((i.interface_name, ip(i.address?)?))).collect())
}

/// Whether this host may choose `ip`, one of its own, for connections that it opens itself. Never
/// said of IPv4: of a network's addresses the kernel chooses the one that was added first.
///
/// # Errors
/// When the addresses cannot be read.
pub(crate) fn is_preferred(ip: IpAddr) -> io::Result<bool> {
    let IpAddr::V6(v6) = ip else { return Ok(false) };
    Ok(flags_of(v6, &std::fs::read_to_string("/proc/thread-self/net/if_inet6")?)
        .is_some_and(|flags| !flags.contains(AddressFlags::Deprecated)))
}

/// The flags of an address in `/proc/net/if_inet6`: address, index, prefix, scope, flags, device.
fn flags_of(ip: Ipv6Addr, if_inet6: &str) -> Option<AddressFlags> {
    let wanted = format!("{:032x}", ip.to_bits());
    let line = if_inet6.lines().find(|line| line.starts_with(&wanted))?;
    let flags = u32::from_str_radix(line.split_whitespace().nth(4)?, 16).ok()?;
    Some(AddressFlags::from_bits_retain(flags))
}

/// Gives `device` the address, for whoever binds to it: the host does not choose it for connections
/// that it opens itself, which would not be answered while it is silent. No error when the device
/// has it. IPv6 may be used at once: nobody is asked whether it is taken, as it is, by the source.
///
/// # Errors
/// When the device is not there or the kernel refuses.
pub(crate) async fn add(cidr: Cidr, device: &str) -> Result<()> {
    within(add_now(cidr, device, false)).await
}

/// Lets this host choose the IPv6 address, which `device` has, for connections of its own.
///
/// # Errors
/// As [`add`].
pub(crate) async fn prefer(cidr: Cidr, device: &str) -> Result<()> {
    within(add_now(cidr, device, true)).await
}

async fn within<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(KERNEL, work).await.context("the kernel does not answer rtnetlink")?
}

async fn add_now(cidr: Cidr, device: &str, preferred: bool) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open rtnetlink")?;
    let task = tokio::spawn(connection);
    let result = async {
        let index = index_of(&handle, device).await?;
        let mut request = handle.address().add(index, cidr.ip, cidr.prefix).replace();
        if cidr.ip.is_ipv6() {
            let mut times = CacheInfo::default();
            (times.ifa_preferred, times.ifa_valid) = (if preferred { FOREVER } else { 0 }, FOREVER);
            request.message_mut().attributes.extend([
                AddressAttribute::Flags(AddressFlags::Nodad),
                AddressAttribute::CacheInfo(times),
            ]);
        }
        request.execute().await.with_context(|| format!("add {cidr} to {device}"))
    }
    .await;
    task.abort();
    result
}

/// Takes the address from the interface that has it; no error when none has.
///
/// # Errors
/// When the kernel refuses.
pub(crate) async fn remove(ip: IpAddr) -> Result<()> {
    within(remove_now(ip)).await
}

async fn remove_now(ip: IpAddr) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open rtnetlink")?;
    let task = tokio::spawn(connection);
    let result = async {
        let mut found = handle.address().get().set_address_filter(ip).execute();
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
    use std::net::{TcpListener, UdpSocket};
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn loopback_is_found_by_its_address() {
        assert_eq!(device_with([127, 0, 0, 1].into()).unwrap().as_deref(), Some("lo"));
    }

    #[test]
    fn flags_of_an_address_are_read_as_the_kernel_writes_them() {
        let text = "fd770000000000000000000000000002 02 40 00 80     eth0\n\
                    fd770000000000000000000000000100 02 40 00 a2     eth0\n";
        let flags = |ip: &str| flags_of(ip.parse().unwrap(), text);
        assert_eq!(flags("fd77::2"), Some(AddressFlags::Permanent));
        assert!(flags("fd77::100").unwrap().contains(AddressFlags::Deprecated));
        assert_eq!(flags("fd77::1"), None);
    }

    /// Runs `test` in a network namespace of its own, with an interface `s` that has `addresses`.
    fn with_interface(addresses: &[&str], test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace, as root");
                let ip = |words: String| {
                    let done = Command::new("ip").args(words.split(' ')).status().unwrap();
                    assert!(done.success(), "ip {words}");
                };
                ip("link add s type veth peer name c".to_owned());
                for address in addresses {
                    let nodad = if address.contains(':') { " nodad" } else { "" };
                    ip(format!("address add {address} dev s{nodad}"));
                }
                ip("link set s up".to_owned());
                ip("link set c up".to_owned());
                test();
            });
            if let Err(panic) = inside.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn wait<T>(work: impl Future<Output = Result<T>>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work).unwrap()
    }

    #[test]
    fn an_ipv6_address_is_there_at_once_and_not_chosen_before_it_is_preferred() {
        if !std::path::Path::new("/proc/sys/net/ipv6").exists() {
            eprintln!("\nskipped: {}: no IPv6", std::thread::current().name().unwrap_or_default());
            return;
        }
        with_interface(&["fd09::1/64"], || {
            let cidr: Cidr = "fd09::5/64".parse().unwrap();
            assert_eq!(device_for(&cidr).unwrap().as_deref(), Some("s"));
            let chosen = || {
                let socket = UdpSocket::bind("[::]:0").unwrap();
                socket.connect("[fd09::9]:9").unwrap();
                socket.local_addr().unwrap().ip()
            };
            let own: IpAddr = "fd09::1".parse().unwrap();
            for _ in 0..2 {
                wait(add(cidr, "s"));
                TcpListener::bind((cidr.ip, 0)).unwrap();
                assert_eq!((chosen(), is_preferred(cidr.ip).unwrap()), (own, false));
            }
            wait(prefer(cidr, "s"));
            assert_eq!((chosen(), is_preferred(cidr.ip).unwrap()), (cidr.ip, true));
            assert!(goes_along(&cidr, "s").unwrap().is_empty());
            wait(remove(cidr.ip));
            wait(remove(cidr.ip));
            assert_eq!((chosen(), device_with(cidr.ip).unwrap()), (own, None));
            // Its network is still there.
            assert_eq!(device_for(&cidr).unwrap().as_deref(), Some("s"));
        });
    }

    #[test]
    fn an_address_of_one_family_gives_no_network_of_the_other() {
        with_interface(&["10.9.0.1/24"], || {
            let device = |cidr: &str| device_for(&cidr.parse().unwrap()).unwrap();
            assert_eq!(device("10.9.0.5/24").as_deref(), Some("s"));
            assert_eq!(device("fd09::5/64"), None);
            // Every interface has a link-local address, which no network follows from.
            assert_eq!(device("8000::5/1"), None);
        });
    }
}
