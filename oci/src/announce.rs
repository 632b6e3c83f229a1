//! Tells the neighbours where an address is now: gratuitous ARP, or an unsolicited Neighbor
//! Advertisement for IPv6.

// sockaddr_ll has no safe constructor in nix, and rustix has no packet sockets.
#![allow(unsafe_code)]

mod frames;

use std::io;
use std::mem::size_of;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use frames::{Mac, Operation, advertisement, arp};
use nix::ifaddrs::getifaddrs;

/// An announcement that is ready to be sent, so that this takes no more than a system call or two.
///
/// It reaches the neighbours while the address is silent: a packet socket passes by the rules that
/// keep the kernel's own ARP and neighbour discovery back.
#[derive(Debug)]
pub struct Announcement {
    socket: OwnedFd,
    index: u32,
    /// Of ARP a reply and a request, since some neighbours heed only one kind.
    frames: Vec<Vec<u8>>,
}

impl Announcement {
    /// Prepares to announce `ip` from `device`.
    ///
    /// # Errors
    /// When the device is gone or is no Ethernet.
    pub fn prepare(ip: IpAddr, device: &str) -> io::Result<Self> {
        let found = ethernet(device)?;
        let (index, mac) =
            found.ok_or_else(|| io::Error::other(format!("{device} is no Ethernet interface")))?;
        let frames = match ip {
            IpAddr::V4(ip) => {
                [Operation::Reply, Operation::Request].map(|kind| arp(mac, ip, kind)).to_vec()
            }
            IpAddr::V6(ip) => vec![advertisement(mac, ip, is_router(device))],
        };
        Ok(Self { socket: packet_socket()?, index, frames })
    }

    /// Sends it; can be repeated.
    ///
    /// # Errors
    /// When the device is gone or down.
    pub fn send(&self) -> io::Result<()> {
        self.frames.iter().try_for_each(|frame| send(&self.socket, self.index, frame))
    }
}

/// Announces `ip` from `device`.
///
/// # Errors
/// When the device is gone, down, or no Ethernet.
pub fn to_neighbours(ip: IpAddr, device: &str) -> io::Result<()> {
    Announcement::prepare(ip, device)?.send()
}

/// Whether `device` has a hardware address that can be announced.
pub fn is_ethernet(device: &str) -> bool {
    ethernet(device).is_ok_and(|found| found.is_some())
}

/// Index and hardware address of `device` if it is an Ethernet interface of this network namespace.
fn ethernet(device: &str) -> io::Result<Option<(u32, Mac)>> {
    Ok(getifaddrs()?.filter(|interface| interface.interface_name == device).find_map(|interface| {
        let link = *interface.address?.as_link_addr()?;
        let index = u32::try_from(link.ifindex()).ok()?;
        let mac = link.addr()?;
        (link.hatype() == libc::ARPHRD_ETHER).then_some((index, mac))
    }))
}

/// Whether the kernel calls itself a router in the advertisements that it sends from `device`.
fn is_router(device: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{device}/forwarding");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}

fn packet_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes plain integers and returns a descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send(socket: &OwnedFd, index: u32, frame: &[u8]) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    // Both as the frame itself says.
    to.sll_protocol = u16::from_ne_bytes([frame[12], frame[13]]);
    to.sll_ifindex = index.cast_signed();
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&frame[..6]);
    // SAFETY: buffer and address are valid for the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn only_ethernet_can_be_announced() {
        assert!(!is_ethernet("lo"));
        let error = Announcement::prepare(Ipv4Addr::LOCALHOST.into(), "no-such").unwrap_err();
        assert_eq!(error.to_string(), "no-such is no Ethernet interface");
    }
}
