//! Gratuitous ARP: tells the neighbours where an address is now.

// sockaddr_ll has no safe constructor in nix, and rustix has no packet sockets.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

const ETHERTYPE_ARP: u16 = 0x0806;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Announces `ip` from `device`: a request and a reply, since some neighbours heed only one kind.
///
/// # Errors
/// When the device is gone or is no Ethernet.
pub(crate) fn gratuitous_arp(ip: Ipv4Addr, device: &str) -> Result<()> {
    let mac = hardware_address(device)?;
    let index = nix::net::if_::if_nametoindex(device)
        .with_context(|| format!("find interface {device}"))?;
    let socket = packet_socket().context("open a packet socket")?;
    for operation in [REPLY, REQUEST] {
        send(&socket, index, &frame(mac, ip, operation))
            .with_context(|| format!("announce {ip} on {device}"))?;
    }
    Ok(())
}

/// Whether `device` has a hardware address that can be announced.
pub(crate) fn is_ethernet(device: &str) -> bool {
    hardware_address(device).is_ok()
}

fn hardware_address(device: &str) -> Result<[u8; 6]> {
    let path = format!("/sys/class/net/{device}/address");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let bytes: Vec<u8> =
        text.trim().split(':').filter_map(|b| u8::from_str_radix(b, 16).ok()).collect();
    <[u8; 6]>::try_from(bytes).ok().with_context(|| format!("{device} is no Ethernet interface"))
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
