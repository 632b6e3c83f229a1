//! Gratuitous ARP: tells the neighbours where an address is now.

// sockaddr_ll has no safe constructor in nix, and rustix has no packet sockets.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::ifaddrs::getifaddrs;

const ETHERTYPE_ARP: u16 = 0x0806;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const BROADCAST: [u8; 6] = [0xff; 6];

/// An announcement that is ready to be sent, so that this takes no more than a system call or two.
///
/// It reaches the neighbours while the address is silent: a packet socket passes by the rules that
/// keep the kernel's own ARP back.
#[derive(Debug)]
pub struct Announcement {
    socket: OwnedFd,
    index: u32,
    /// A reply and a request, since some neighbours heed only one kind.
    frames: [Vec<u8>; 2],
}

impl Announcement {
    /// Prepares to announce `ip` from `device`.
    ///
    /// # Errors
    /// When the device is gone or is no Ethernet.
    pub fn prepare(ip: Ipv4Addr, device: &str) -> io::Result<Self> {
        let found = ethernet(device)?;
        let (index, mac) =
            found.ok_or_else(|| io::Error::other(format!("{device} is no Ethernet interface")))?;
        let socket = packet_socket()?;
        Ok(Self { socket, index, frames: [REPLY, REQUEST].map(|kind| frame(mac, ip, kind)) })
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
pub fn gratuitous_arp(ip: Ipv4Addr, device: &str) -> io::Result<()> {
    Announcement::prepare(ip, device)?.send()
}

/// Whether `device` has a hardware address that can be announced.
pub fn is_ethernet(device: &str) -> bool {
    ethernet(device).is_ok_and(|found| found.is_some())
}

/// Index and hardware address of `device` if it is an Ethernet interface of this network namespace.
fn ethernet(device: &str) -> io::Result<Option<(u32, [u8; 6])>> {
    Ok(getifaddrs()?.filter(|interface| interface.interface_name == device).find_map(|interface| {
        let link = *interface.address?.as_link_addr()?;
        let index = u32::try_from(link.ifindex()).ok()?;
        let mac = link.addr()?;
        (link.hatype() == libc::ARPHRD_ETHER).then_some((index, mac))
    }))
}

fn frame(mac: [u8; 6], ip: Ipv4Addr, operation: u16) -> Vec<u8> {
    let target = if operation == REPLY { BROADCAST } else { [0; 6] };
    let mut frame = Vec::with_capacity(42);
    frame.extend(BROADCAST);
    frame.extend(mac);
    frame.extend(ETHERTYPE_ARP.to_be_bytes());
    frame.extend(1_u16.to_be_bytes()); // Ethernet
    frame.extend(0x0800_u16.to_be_bytes()); // IPv4
    frame.extend([6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(ip.octets());
    frame.extend(target);
    frame.extend(ip.octets());
    frame
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
    to.sll_protocol = ETHERTYPE_ARP.to_be();
    to.sll_ifindex = index.cast_signed();
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&BROADCAST);
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

    #[test]
    fn only_ethernet_can_be_announced() {
        assert!(!is_ethernet("lo"));
        let error = Announcement::prepare(Ipv4Addr::LOCALHOST, "no-such").unwrap_err();
        assert_eq!(error.to_string(), "no-such is no Ethernet interface");
    }

    #[test]
    fn sender_and_target_are_the_announced_address() {
        let ip = Ipv4Addr::new(10, 77, 0, 100);
        let frame = frame([2, 0, 0, 0, 0, 1], ip, REPLY);
        assert_eq!(frame.len(), 42);
        assert_eq!(&frame[..6], &BROADCAST);
        assert_eq!(&frame[28..32], &ip.octets());
        assert_eq!(&frame[38..42], &ip.octets());
        assert_eq!(&frame[20..22], &REPLY.to_be_bytes());
    }
}
