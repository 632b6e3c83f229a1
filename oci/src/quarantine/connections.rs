//! Keeps single TCP connections silent: those of a container that has been checkpointed and ended. Its
//! host's kernel would answer what their peers send with a reset, and a restore would come too late.
//!
//! ```text
//! table inet ferry_checkpoint_<id>
//!   set v4, v6   peer's address and port, own address and port; each goes by itself after its time
//!   chain in     drops what comes from a peer in a set
//!   chain out    drops what goes to one
//! ```
//!
//! Nobody has to look after it: what is forgotten lets everything pass after its time.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::netlink::{APPEND, Batch, CREATE, Message, Socket, attributes};
use super::rules::{
    INET, META_TRANSPORT, NETWORK_HEADER, NEW_RULE, SUBSYSTEM, TRANSPORT_HEADER, Verdict, chain,
    end, expression, meta, table_message,
};
use super::{Answer, Error, rules};

const NEW_SET: u16 = SUBSYSTEM << 8 | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
const GET_ELEMENTS: u16 = SUBSYSTEM << 8 | 13;
/// Elements of a set may have a time.
const TIMEOUT: u32 = 0x10;
/// The first of the registers of 32 bits, of which a key of several fields takes some in a row.
const REGISTERS: u32 = 8;
const TCP: u8 = 6;
/// How many elements a message may hold: the length of an attribute has 16 bits.
const CHUNK: usize = 500;
/// What the names of all tables here begin with.
const PREFIX: &str = "ferry_checkpoint_";

/// A TCP connection of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Connection {
    /// The container's end.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
}

/// Address family of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn of(connection: &Connection) -> Self {
        if connection.remote.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn set(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }

    /// As the key `nfproto` gives it.
    fn protocol(self) -> u8 {
        match self {
            Self::V4 => rules::IPV4,
            Self::V6 => rules::IPV6,
        }
    }

    /// Bytes of an address.
    fn width(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    /// Where the header has the source's address; the destination's follows.
    fn source(self) -> u32 {
        match self {
            Self::V4 => 12,
            Self::V6 => 8,
        }
    }

    /// Bytes of a key: ports take a register each.
    fn key(self) -> u32 {
        2 * (self.width() + 4)
    }

    /// nft(8)'s number for the type of the key, 6 bits for each field, so that it can list the set.
    fn kind(self) -> u32 {
        let (address, service) = (if self == Self::V4 { 7 } else { 8 }, 13);
        [address, service, address, service].into_iter().fold(0, |all, one| all << 6 | one)
    }
}

/// Name of the table of the checkpoint `id`.
pub fn table(id: &str) -> String {
    format!("{PREFIX}{id}")
}

/// From now on nothing of `connections` passes in the calling thread's network namespace, for `time` at
/// most. Replaces what the checkpoint `id` had before, without a gap.
///
/// # Errors
/// When the kernel refuses; nothing has changed then.
pub fn lock(id: &str, connections: &[Connection], time: Duration) -> Result<(), Error> {
    let table = table(id);
    let mut batch = Batch::new(SUBSYSTEM);
    replace(&mut batch, &table);
    for (number, family) in (1..).zip(Family::ALL) {
        let these: Vec<_> = connections.iter().filter(|c| Family::of(c) == family).collect();
        if these.is_empty() {
            continue;
        }
        batch.push(set(&table, family, number));
        for chunk in these.chunks(CHUNK) {
            batch.push(elements(&table, family, chunk, time));
        }
        for incoming in [true, false] {
            batch.push(drops(&table, family, incoming));
        }
    }
    transact(batch, "lock the connections of a checkpoint")
}

/// Lets everything of the checkpoint `id` pass again; no error when nothing is locked.
///
/// # Errors
/// When the kernel refuses.
pub fn unlock(id: &str) -> Result<(), Error> {
    let mut batch = Batch::new(SUBSYSTEM);
    rules::delete_table(&mut batch, &table(id), INET);
    transact(batch, "unlock the connections of a checkpoint")
}

/// Ids of the checkpoints that have a lock in the calling thread's network namespace, sorted.
///
/// # Errors
/// When the kernel refuses.
pub fn locked() -> Result<Vec<String>, Error> {
    let failed = |source| Error { what: "list the locks of checkpoints", source };
    let socket = Socket::open().map_err(failed)?;
    let mut found = Vec::new();
    let see = |answer: Answer<'_>| {
        let Answer::Message { attributes, .. } = answer else { return };
        let id = rules::table_name(attributes).and_then(|name| name.strip_prefix(PREFIX));
        found.extend(id.map(str::to_owned));
    };
    socket.list(rules::list_tables(), see).map_err(failed)?;
    found.sort();
    Ok(found)
}

/// What a lock still keeps silent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Remaining {
    /// How many connections.
    pub connections: usize,
    /// For how long at most, seconds.
    pub seconds: u64,
}

/// What the lock of the checkpoint `id` still keeps silent in the calling thread's network namespace.
/// A lock whose time is over keeps nothing, and its table is there still.
///
/// # Errors
/// When the kernel refuses.
pub fn remaining(id: &str) -> Result<Remaining, Error> {
    let failed = |source| Error { what: "look at the lock of a checkpoint", source };
    let socket = Socket::open().map_err(failed)?;
    let mut remaining = Remaining::default();
    for family in Family::ALL {
        let request =
            Message::new(GET_ELEMENTS, 0, INET, 0).text(1, &table(id)).text(2, family.set());
        let see = |answer: Answer<'_>| {
            let Answer::Message { attributes, .. } = answer else { return };
            for millis in times(attributes) {
                remaining.connections += 1;
                remaining.seconds = remaining.seconds.max(millis / 1000);
            }
        };
        match socket.list(request, see) {
            // There is a set only for a family that has connections.
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(failed)?,
        }
    }
    Ok(remaining)
}

/// What time the elements in a list of a set's have left, milliseconds.
fn times(list: &[u8]) -> impl Iterator<Item = u64> {
    const ELEMENTS: u16 = 3;
    const EXPIRATION: u16 = 5;
    let elements = attributes(list).filter(|(kind, _)| *kind == ELEMENTS);
    elements.flat_map(|(_, list)| attributes(list)).filter_map(|(_, element)| {
        let (_, left) = attributes(element).find(|(kind, _)| *kind == EXPIRATION)?;
        left.try_into().ok().map(u64::from_be_bytes)
    })
}

fn transact(batch: Batch, what: &'static str) -> Result<(), Error> {
    let done = || -> io::Result<()> { Socket::open()?.transact(&batch.seal()) };
    done().map_err(|source| Error { what, source })
}

fn replace(batch: &mut Batch, table: &str) {
    rules::delete_table(batch, table, INET);
    batch.push(table_message(rules::NEW_TABLE, CREATE, INET, table));
    for incoming in [true, false] {
        let way = chain_of(incoming);
        batch.push(chain(INET, table, way.0, way.1, rules::PRIORITY));
    }
}

/// Name and hook.
fn chain_of(incoming: bool) -> (&'static str, u32) {
    if incoming { ("in", 0) } else { ("out", 3) }
}

fn set(table: &str, family: Family, number: u32) -> Message {
    Message::new(NEW_SET, CREATE, INET, 0)
        .text(1, table)
        .text(2, family.set())
        .number(3, TIMEOUT)
        .number(4, family.kind())
        .number(5, family.key())
        .number(10, number)
}

fn elements(table: &str, family: Family, these: &[&Connection], time: Duration) -> Message {
    let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).to_be_bytes();
    let message = Message::new(NEW_ELEMENTS, CREATE, INET, 0).text(1, table).text(2, family.set());
    message.nest(3, |list| {
        these.iter().fold(list, |list, connection| {
            let key = key(connection);
            list.nest(1, |e| e.nest(1, |value| value.bytes(1, &key)).bytes(4, &millis))
        })
    })
}

fn key(connection: &Connection) -> Vec<u8> {
    let mut key = Vec::new();
    for end in [connection.remote, connection.local] {
        match end.ip() {
            IpAddr::V4(ip) => key.extend(ip.octets()),
            IpAddr::V6(ip) => key.extend(ip.octets()),
        }
        key.extend(end.port().to_be_bytes());
        key.extend([0; 2]);
    }
    key
}

/// Drops packets from a peer in the set, or to one.
fn drops(table: &str, family: Family, incoming: bool) -> Message {
    let (address, port) = (family.width(), 2);
    // The peer comes first in the key: the source of what comes in.
    let (peer, own) = if incoming { (0, 1) } else { (1, 0) };
    let fields = [
        (NETWORK_HEADER, family.source() + peer * address, address),
        (TRANSPORT_HEADER, peer * port, port),
        (NETWORK_HEADER, family.source() + own * address, address),
        (TRANSPORT_HEADER, own * port, port),
    ];
    Message::new(NEW_RULE, CREATE | APPEND, INET, 0)
        .text(1, table)
        .text(2, chain_of(incoming).0)
        .nest(4, |list| {
            let list = meta(list, rules::META_PROTOCOL, family.protocol());
            let mut list = meta(list, META_TRANSPORT, TCP);
            let mut register = REGISTERS;
            for (header, offset, length) in fields {
                list = expression(list, "payload", |m| {
                    m.number(1, register).number(2, header).number(3, offset).number(4, length)
                });
                register += length.div_ceil(4);
            }
            let list = expression(list, "lookup", |m| m.text(1, family.set()).number(2, REGISTERS));
            end(list, Verdict::Drop)
        })
}
