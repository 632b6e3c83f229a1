//! What can be wrong with a page stream, and with what it is made from.

use std::io;

use super::codec::FORMAT;
use crate::pages::PAGE;

/// Why bytes are no page stream, or not the one that was sent. The container's memory at the
/// receiver is to be given up, or read again by hashes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// It begins with something else.
    #[error("this is no page stream")]
    Magic,
    /// Another version's stream.
    #[error("page stream of format {0}, this ferry reads {FORMAT}")]
    Format(u16),
    /// The other host has other pages.
    #[error("the stream's pages have {0} bytes, ours {PAGE}")]
    PageSize(u32),
    /// A record of a kind that does not exist.
    #[error("a record has the unknown tag {0}")]
    Tag(u8),
    /// A record is longer or shorter than its kind can be.
    #[error("a {record} record has an impossible length of {length} bytes")]
    Length {
        /// Its kind.
        record: &'static str,
        /// Bytes of its body.
        length: usize,
    },
    /// A record speaks of nothing.
    #[error("a {0} record is empty")]
    Empty(&'static str),
    /// Contents are in no known encoding.
    #[error("contents have the unknown encoding {0}")]
    Encoding(u8),
    /// An address is not that of a page, or a range ends before it begins or beyond the last address.
    #[error("a {record} record has the impossible address {addr:#x}")]
    Address {
        /// Its kind.
        record: &'static str,
        /// The address.
        addr: u64,
    },
    /// Compressed contents cannot be unpacked, or to another length.
    #[error("contents for process {space} at {addr:#x} cannot be unpacked")]
    Unpack {
        /// Which process.
        space: u32,
        /// First address.
        addr: u64,
    },
    /// The record changed on its way.
    #[error("the checksum of a {0} record is wrong")]
    Check(&'static str),
    /// A round ended that was not under way.
    #[error("round {found} ended while round {due} was due")]
    Round {
        /// What came.
        found: u32,
        /// What was due.
        due: u32,
    },
    /// Records were lost, doubled or swapped.
    #[error("round {round} was to bring {sent} pages, {received} came, or not in their order")]
    Lost {
        /// Which round.
        round: u32,
        /// Pages that were sent.
        sent: u64,
        /// Pages that came.
        received: u64,
    },
    /// The stream ends inside a round.
    #[error("the page stream ends inside round {0}")]
    Short(u32),
    /// More was pushed than may wait.
    #[error("{0} bytes wait to be decoded")]
    TooMuch(usize),
}

/// Why a round could not be sent. What the receiver holds is not known then: a new
/// [`Sender`](super::Sender) has to begin from its hashes, or from nothing.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The memory of a process could not be read.
    #[error("read memory of process {pid}")]
    Read {
        /// Pid on this host.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// In a frozen round a page has to be there.
    #[error("{pages} pages of frozen process {pid} could not be read")]
    Unread {
        /// Pid on this host.
        pid: i32,
        /// How many.
        pages: u64,
    },
    /// A list of changes has an address that is not that of a page.
    #[error("changes of process {pid} name the impossible range {start:#x} to {end:#x}")]
    Range {
        /// Pid on this host.
        pid: i32,
        /// Its first address.
        start: u64,
        /// Where it ends.
        end: u64,
    },
    /// The stream did not take what was written.
    #[error("write the page stream")]
    Write(#[source] io::Error),
    /// Contents could not be compressed.
    #[error("compress pages")]
    Compress(#[source] io::Error),
    /// An earlier round failed.
    #[error("an earlier round of this page stream has failed")]
    Failed,
}

/// Why a stream could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// It is no good.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The store did not take it.
    #[error("{doing} page {addr:#x} of process {space}")]
    Store {
        /// What was to be done.
        doing: &'static str,
        /// Which process.
        space: u32,
        /// First address.
        addr: u64,
        /// Why not.
        source: io::Error,
    },
    /// A record that belongs to the other direction.
    #[error("the stream carries {0}, which belong to the other direction")]
    Direction(&'static str),
}
