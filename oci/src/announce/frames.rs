//! The Ethernet frames that announce an address.

use std::net::{Ipv4Addr, Ipv6Addr};

/// A hardware address.
pub(super) type Mac = [u8; 6];

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const BROADCAST: Mac = [0xff; 6];
/// Where ff02::1 is sent to: all nodes.
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// The receiver believes others: they come from no router.
const HOP_LIMIT: u8 = 255;
/// Sent by a router.
const ROUTER: u8 = 0x80;
/// Replaces what the receiver knows.
const OVERRIDE: u8 = 0x20;
/// Option: the hardware address of the target.
const TARGET_MAC: u8 = 2;

/// What an ARP frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Request = 1,
    Reply = 2,
}

/// A gratuitous ARP: `ip` is at `mac`.
pub(super) fn arp(mac: Mac, ip: Ipv4Addr, operation: Operation) -> Vec<u8> {
    let target = if operation == Operation::Reply { BROADCAST } else { [0; 6] };
    let mut frame = ethernet(BROADCAST, mac, ETHERTYPE_ARP);
    frame.extend(1_u16.to_be_bytes()); // Ethernet
    frame.extend(ETHERTYPE_IPV4.to_be_bytes());
    frame.extend([6, 4]); // lengths of the addresses
    frame.extend((operation as u16).to_be_bytes());
    frame.extend(mac);
    frame.extend(ip.octets());
    frame.extend(target);
    frame.extend(ip.octets());
    frame
}

/// An unsolicited Neighbor Advertisement (RFC 4861, 7.2.6): `ip` is at `mac`. `router` says whether
/// this host forwards packets, as in every other advertisement of its.
pub(super) fn advertisement(mac: Mac, ip: Ipv6Addr, router: bool) -> Vec<u8> {
    let flags = OVERRIDE | if router { ROUTER } else { 0 };
    let mut icmp = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    icmp.extend(ip.octets());
    icmp.extend([TARGET_MAC, 1]); // one unit of 8 bytes
    icmp.extend(mac);
    let checksum = checksum(ip, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]); // version 6
    frame.extend((icmp.len() as u16).to_be_bytes());
    frame.extend([ICMPV6, HOP_LIMIT]);
    frame.extend(ip.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(icmp);
    frame
}

fn ethernet(to: Mac, from: Mac, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(86);
    frame.extend(to);
    frame.extend(from);
    frame.extend(kind.to_be_bytes());
    frame
}

/// The checksum of ICMPv6: over the addresses, length and protocol, and the message. Over a message
/// that holds its right checksum it is 0.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let rest = [message.len() as u32, u32::from(ICMPV6)].map(u32::to_be_bytes).concat();
    let parts = [&from.octets()[..], &to.octets(), &rest, message];
    // None of them is of an odd length.
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    #[test]
    fn sender_and_target_of_arp_are_the_announced_address() {
        let ip = Ipv4Addr::new(10, 77, 0, 100);
        let frame = arp(MAC, ip, Operation::Reply);
        assert_eq!(frame.len(), 42);
        assert_eq!(&frame[..6], &BROADCAST);
        assert_eq!(&frame[20..22], &[0, 2]);
        assert_eq!(&frame[28..32], &ip.octets());
        assert_eq!(&frame[38..42], &ip.octets());
    }

    #[test]
    fn an_advertisement_goes_to_all_nodes_overrides_and_is_no_answer() {
        let ip: Ipv6Addr = "fd77::100".parse().unwrap();
        let frame = advertisement(MAC, ip, false);
        assert_eq!(frame.len(), 86);
        assert_eq!(&frame[..14], &[0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd]);
        let (header, icmp) = frame[14..].split_at(40);
        assert_eq!(&header[..8], &[0x60, 0, 0, 0, 0, 32, 58, 255]);
        assert_eq!(&header[8..24], &ip.octets());
        assert_eq!(&header[24..], &"ff02::1".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!((icmp[0], icmp[1], icmp[4]), (136, 0, 0x20));
        assert_eq!(&icmp[8..24], &ip.octets());
        assert_eq!(&icmp[24..], &[2, 1, 2, 0, 0, 0, 0, 1]);
        assert_eq!(checksum(ip, ALL_NODES, icmp), 0);
        assert_eq!(advertisement(MAC, ip, true)[58], 0xa0);
    }
}
