//! The rules in the kernel's own form: tables, chains and what is in them.
//!
//! A migration has a table in the family `inet` and one in `arp`, each with chains for what
//! comes in and for what goes out. Chains are hooked when they are made, rules only change them:
//! hooking takes longer, and **taking a hook away drops every packet that waits in any queue of the
//! network namespace**, so a table with chains goes last.

use std::net::IpAddr;

use super::netlink::{APPEND, Batch, CREATE, Message};

/// nf_tables among the netfilter subsystems.
pub(super) const SUBSYSTEM: u16 = 10;
pub(super) const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
pub(super) const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const DELETE_RULE: u16 = SUBSYSTEM << 8 | 8;

/// Table name in a table message.
const TABLE_NAME: u16 = 1;

/// Before every ordinary filter and before connections are tracked: a packet that waits must not
/// have an entry there that the next one of its connection would clash with.
pub(super) const PRIORITY: i32 = -300;
pub(super) const INET: u8 = 1;
const ARP: u8 = 3;
/// Numbers of the protocols within `inet`, as the key `nfproto` gives them.
pub(super) const IPV4: u8 = 2;
pub(super) const IPV6: u8 = 10;
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REGISTER: u32 = 1;
pub(super) const META_PROTOCOL: u32 = 15;
pub(super) const META_TRANSPORT: u32 = 16;
pub(super) const NETWORK_HEADER: u32 = 1;
pub(super) const TRANSPORT_HEADER: u32 = 2;

/// A chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Packets for the addresses, and ARP about them.
    In,
    /// Packets from the addresses, and ARP about them.
    Out,
    /// IPv6 neighbours that ask for the addresses: by multicast, so that `In` does not see it.
    Asked,
}

impl Way {
    /// Those of a family.
    fn all(family: u8) -> &'static [Self] {
        if family == ARP { &[Self::In, Self::Out] } else { &[Self::In, Self::Out, Self::Asked] }
    }

    fn chain(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Asked => "asked",
        }
    }

    /// The hook: before routing, as packets may be for a container of this host, and local output;
    /// ARP has its own two.
    fn hook(self, family: u8) -> u32 {
        match (self, family) {
            (Self::In | Self::Asked, _) => 0,
            (Self::Out, ARP) => 1,
            (Self::Out, _) => 3,
        }
    }
}

/// What becomes of a packet that a rule fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Drop,
    /// To this queue, by nf_tables' own means.
    Queue(u16),
    /// The same by the target that iptables uses, where the kernel has only that.
    Target(u16),
}

/// Rules about one migration's addresses, collected into one transaction.
pub(super) struct Script<'a> {
    table: &'a str,
    batch: Batch,
}

impl<'a> Script<'a> {
    pub(super) fn new(table: &'a str) -> Self {
        Self { table, batch: Batch::new(SUBSYSTEM) }
    }

    pub(super) fn seal(self) -> Vec<u8> {
        self.batch.seal()
    }

    fn families(addresses: &[IpAddr]) -> &'static [u8] {
        if addresses.iter().any(IpAddr::is_ipv4) { &[INET, ARP] } else { &[INET] }
    }

    /// Both tables go, with all in them; no error when they are not there.
    pub(super) fn delete(mut self) -> Self {
        for family in [INET, ARP] {
            delete_table(&mut self.batch, self.table, family);
        }
        self
    }

    /// Tables and hooked chains without rules: everything passes.
    pub(super) fn create(mut self, addresses: &[IpAddr]) -> Self {
        for &family in Self::families(addresses) {
            self.table(NEW_TABLE, CREATE, family);
            for way in Way::all(family) {
                let priority = if family == INET { PRIORITY } else { 0 };
                let (name, hook) = (way.chain(), way.hook(family));
                self.batch.push(chain(family, self.table, name, hook, priority));
            }
        }
        self
    }

    /// Nothing comes in for the addresses but what `verdict` says, and nothing goes out from them.
    pub(super) fn silence(mut self, addresses: &[IpAddr], verdict: Verdict) -> Self {
        for address in addresses {
            if address.is_ipv6() {
                for (way, kind) in
                    [(Way::Asked, NEIGHBOUR_SOLICITATION), (Way::Out, NEIGHBOUR_ADVERTISEMENT)]
                {
                    self.rule(INET, way, Verdict::Drop, |e| neighbour(e, kind, address));
                }
            }
            self.rule(INET, Way::In, verdict, |e| packet(e, Way::In, address));
            self.rule(INET, Way::Out, Verdict::Drop, |e| packet(e, Way::Out, address));
            if let IpAddr::V4(v4) = address {
                for (way, offset) in [(Way::In, 24), (Way::Out, 14)] {
                    self.rule(ARP, way, Verdict::Drop, |e| {
                        load_and_compare(e, NETWORK_HEADER, offset, &v4.octets())
                    });
                }
            }
        }
        self
    }

    /// No packet comes in and none goes out.
    pub(super) fn silence_all(mut self) -> Self {
        for way in [Way::In, Way::Out] {
            self.rule(INET, way, Verdict::Drop, |every| every);
        }
        self
    }

    /// Everything passes but packets for the addresses. Their rule is not touched: the kernel takes
    /// 10 ms to make one with a target again.
    pub(super) fn open(mut self, addresses: &[IpAddr]) -> Self {
        for &family in Self::families(addresses) {
            for way in Way::all(family) {
                if (family, *way) != (INET, Way::In) {
                    self.empty(family, *way);
                }
            }
        }
        self
    }

    /// Everything passes; the chains stay.
    pub(super) fn pass(mut self, addresses: &[IpAddr]) -> Self {
        for &family in Self::families(addresses) {
            Way::all(family).iter().for_each(|way| self.empty(family, *way));
        }
        self
    }

    fn empty(&mut self, family: u8, way: Way) {
        let message = Message::new(DELETE_RULE, 0, family, 0);
        self.batch.push(message.text(1, self.table).text(2, way.chain()));
    }

    fn table(&mut self, kind: u16, flags: u16, family: u8) {
        self.batch.push(table_message(kind, flags, family, self.table));
    }

    fn rule(
        &mut self,
        family: u8,
        way: Way,
        verdict: Verdict,
        fits: impl FnOnce(Message) -> Message,
    ) {
        let message = Message::new(NEW_RULE, CREATE | APPEND, family, 0)
            .text(1, self.table)
            .text(2, way.chain())
            .nest(4, |expressions| end(fits(expressions), verdict));
        self.batch.push(message);
    }
}

/// A message about the table `name`.
pub(super) fn table_message(kind: u16, flags: u16, family: u8, name: &str) -> Message {
    Message::new(kind, flags, family, 0).text(TABLE_NAME, name)
}

/// The table goes, with all in it; no error when it is not there.
pub(super) fn delete_table(batch: &mut Batch, name: &str, family: u8) {
    // Deleting one that is not there fails, making one that is there does not.
    batch.push(table_message(NEW_TABLE, CREATE, family, name));
    batch.push(table_message(DELETE_TABLE, 0, family, name));
}

/// A chain that is hooked in and lets pass what no rule of it fits.
pub(super) fn chain(family: u8, table: &str, name: &str, hook: u32, priority: i32) -> Message {
    Message::new(NEW_CHAIN, CREATE, family, 0)
        .text(1, table)
        .text(3, name)
        .nest(4, |at| at.number(1, hook).number(2, priority.cast_unsigned()))
        .number(5, 1) // policy: accept
        .text(7, "filter")
}

/// The request for the names of all tables, and how to read an answer.
pub(super) fn list_tables() -> Message {
    Message::new(GET_TABLE, 0, 0, 0)
}

/// The name in an answer to [`list_tables`].
pub(super) fn table_name(attributes: &[u8]) -> Option<&str> {
    let (_, name) = super::netlink::attributes(attributes).find(|(kind, _)| *kind == TABLE_NAME)?;
    std::str::from_utf8(name.split(|byte| *byte == 0).next()?).ok()
}

/// Fits packets for the address, or from it (`Out`).
fn packet(message: Message, way: Way, address: &IpAddr) -> Message {
    let out = way == Way::Out;
    let (protocol, offset, bytes) = match address {
        IpAddr::V4(v4) => (IPV4, if out { 12 } else { 16 }, v4.octets().to_vec()),
        IpAddr::V6(v6) => (IPV6, if out { 8 } else { 24 }, v6.octets().to_vec()),
    };
    load_and_compare(meta(message, META_PROTOCOL, protocol), NETWORK_HEADER, offset, &bytes)
}

/// Fits neighbour discovery messages about the address.
fn neighbour(message: Message, kind: u8, address: &IpAddr) -> Message {
    let IpAddr::V6(v6) = address else { return message };
    let icmp = meta(meta(message, META_PROTOCOL, IPV6), META_TRANSPORT, ICMPV6);
    let icmp = load_and_compare(icmp, TRANSPORT_HEADER, 0, &[kind]);
    load_and_compare(icmp, TRANSPORT_HEADER, 8, &v6.octets())
}

pub(super) fn expression(
    list: Message,
    name: &str,
    data: impl FnOnce(Message) -> Message,
) -> Message {
    list.nest(1, |element| element.text(1, name).nest(2, data))
}

pub(super) fn meta(list: Message, key: u32, wanted: u8) -> Message {
    let list = expression(list, "meta", |m| m.number(1, REGISTER).number(2, key));
    compare(list, &[wanted])
}

fn load_and_compare(list: Message, header: u32, offset: u32, wanted: &[u8]) -> Message {
    let length = wanted.len() as u32;
    let list = expression(list, "payload", |m| {
        m.number(1, REGISTER).number(2, header).number(3, offset).number(4, length)
    });
    compare(list, wanted)
}

fn compare(list: Message, wanted: &[u8]) -> Message {
    expression(list, "cmp", |m| {
        m.number(1, REGISTER).number(2, 0).nest(3, |value| value.bytes(1, wanted))
    })
}

pub(super) fn end(list: Message, verdict: Verdict) -> Message {
    match verdict {
        Verdict::Drop => expression(list, "immediate", |m| {
            m.number(1, 0).nest(2, |data| data.nest(2, |verdict| verdict.number(1, 0)))
        }),
        Verdict::Queue(number) => expression(list, "queue", |m| {
            m.bytes(1, &number.to_be_bytes()).bytes(2, &1_u16.to_be_bytes())
        }),
        // Its data is a structure of this machine's: the number, and how many queues.
        Verdict::Target(number) => expression(list, "target", |m| {
            let [a, b] = number.to_ne_bytes();
            let [c, d] = 1_u16.to_ne_bytes();
            m.text(1, "NFQUEUE").number(2, 1).bytes(3, &[a, b, c, d])
        }),
    }
}
