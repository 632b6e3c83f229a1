//! Messages to and from the kernel's netfilter subsystems, over a netlink socket.
//!
//! A program that does this takes 10 to 15 ms to start, most of a pause. A message of our own takes
//! less than one.
//!
//! ```text
//! nlmsghdr 16 bytes │ nfgenmsg 4 bytes │ attributes: length, type, data, padded to 4
//! ```
//!
//! The kernel works on a message before `send` returns, so its answers can be read at once.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};

/// A message is a request.
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
/// The kernel shall confirm the message.
pub const ACK: u16 = libc::NLM_F_ACK as u16;
/// Create what the message names if it is not there.
pub const CREATE: u16 = libc::NLM_F_CREATE as u16;
/// Put it after those that are there.
pub const APPEND: u16 = libc::NLM_F_APPEND as u16;
/// List all.
pub const DUMP: u16 = libc::NLM_F_DUMP as u16;

/// Bytes of the two headers.
const HEADERS: usize = 20;
/// Longest answer that is read at once, in bytes. The kernel makes none longer than 32 KB.
const ANSWER: usize = 1 << 16;
/// Marks attributes that hold attributes.
const NESTED: u16 = 1 << 15;

/// One message, or an attribute under construction within one.
#[derive(Debug, Clone)]
pub struct Message(Vec<u8>);

impl Message {
    /// A message of type `kind` (subsystem << 8 | command) for the protocol `family`.
    pub fn new(kind: u16, flags: u16, family: u8, resource: u16) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend([0; 4]); // its length, once it is known
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | REQUEST).to_ne_bytes());
        bytes.extend([0; 8]); // sequence number, port
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        Self(bytes)
    }

    /// Adds an attribute.
    #[must_use]
    pub fn bytes(mut self, kind: u16, data: &[u8]) -> Self {
        let length = u16::try_from(4 + data.len()).expect("attributes are short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds a number of 32 bits in network order.
    #[must_use]
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Adds a text, ended by a zero.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Adds an attribute that holds those which `fill` adds.
    #[must_use]
    pub fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        let mut filled = fill(self);
        let length = u16::try_from(filled.0.len() - start).expect("attributes are short");
        filled.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        filled
    }

    /// The message as it is sent, with its length and `flags` added.
    fn seal(mut self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).expect("messages are short");
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        let all = u16::from_ne_bytes([self.0[6], self.0[7]]) | flags;
        self.0[6..8].copy_from_slice(&all.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// What the kernel said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// A message of some type, for a protocol family, with attributes.
    Message {
        /// Subsystem << 8 | command.
        kind: u16,
        /// Protocol family.
        family: u8,
        /// Its attributes; see [`attributes`].
        attributes: &'a [u8],
    },
    /// The request was carried out (`Ok`) or refused.
    Result(Result<(), Errno>),
    /// A list is complete.
    Done,
}

/// The answers in what was received. What is cut off is left out.
pub fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..16)?;
        let length = usize::try_from(u32::from_ne_bytes(header[..4].try_into().ok()?)).ok()?;
        let message = bytes.get(..length)?.get(16..)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        Some(match i32::from(kind) {
            libc::NLMSG_ERROR => {
                let code = i32::from_ne_bytes(message.get(..4)?.try_into().ok()?);
                Answer::Result(if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) })
            }
            libc::NLMSG_DONE => Answer::Done,
            _ => Answer::Message {
                kind,
                family: *message.first()?,
                attributes: message.get(HEADERS - 16..)?,
            },
        })
    })
}

/// The attributes in `bytes`, as type and data.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let data = bytes.get(..length)?.get(4..)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([header[2], header[3]]) & !NESTED, data))
    })
}

/// A netlink socket to the netfilter subsystems of the network namespace of the thread that opens
/// it. It can be used from any thread then.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens one.
    ///
    /// # Errors
    /// When the kernel has no netfilter.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Lets `bytes` wait to be read, beyond the limit for ordinary users.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN.
    pub fn receive_buffer(&self, bytes: usize) -> io::Result<()> {
        Ok(setsockopt(&self.0, sockopt::RcvBufForce, &bytes)?)
    }

    /// Sends `message` and expects no answer.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn send(&self, message: Message) -> io::Result<()> {
        self.send_bytes(&message.seal(0, 0))
    }

    /// Sends `message` and waits until the kernel has carried it out.
    ///
    /// # Errors
    /// What the kernel answers. Messages of other types that wait to be read are lost.
    pub fn call(&self, message: Message) -> io::Result<()> {
        self.transact(&message.seal(ACK, 1))
    }

    /// Sends what [`Batch::seal`] made and waits until the kernel has carried it out.
    ///
    /// # Errors
    /// The kernel's reason why it did nothing of it.
    pub fn transact(&self, sealed: &[u8]) -> io::Result<()> {
        self.send_bytes(sealed)?;
        // All answers are there: a refusal for each message that was refused, and the confirmation.
        let mut confirmed = Err(io::Error::other("the kernel did not confirm a transaction"));
        let mut buffer = vec![0; ANSWER];
        let mut refused = None;
        while let Some(bytes) = self.try_receive(&mut buffer)? {
            for answer in answers(bytes) {
                match answer {
                    Answer::Result(Ok(())) => confirmed = Ok(()),
                    Answer::Result(Err(errno)) => _ = refused.get_or_insert(errno),
                    _ => {}
                }
            }
        }
        match refused {
            Some(errno) => Err(errno.into()),
            None => confirmed,
        }
    }

    /// Sends `message`, a request for a list, and gives each of its entries to `see`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn list(&self, message: Message, mut see: impl FnMut(Answer<'_>)) -> io::Result<()> {
        self.send_bytes(&message.seal(DUMP, 1))?;
        let mut buffer = vec![0; ANSWER];
        loop {
            for answer in answers(self.receive(&mut buffer)?) {
                match answer {
                    Answer::Done | Answer::Result(Ok(())) => return Ok(()),
                    Answer::Result(Err(errno)) => return Err(errno.into()),
                    message => see(message),
                }
            }
        }
    }

    /// Waits for messages.
    ///
    /// # Errors
    /// `ENOBUFS` when some were lost because they were not read in time.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let length = recv(self.0.as_raw_fd(), buffer, MsgFlags::empty())?;
        Ok(&buffer[..length])
    }

    /// The messages that wait, if any.
    ///
    /// # Errors
    /// As [`Socket::receive`].
    pub fn try_receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(&buffer[..length])),
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        send(self.0.as_raw_fd(), bytes, MsgFlags::empty())?;
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Messages of one subsystem that the kernel carries out all together or not at all.
#[derive(Debug)]
pub struct Batch {
    subsystem: u16,
    messages: Vec<Message>,
}

impl Batch {
    /// An empty one.
    pub fn new(subsystem: u16) -> Self {
        Self { subsystem, messages: Vec::new() }
    }

    /// Adds a message.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// The bytes to give to [`Socket::transact`].
    pub fn seal(self) -> Vec<u8> {
        let edge = |kind| Message::new(kind, 0, 0, self.subsystem).seal(0, 0);
        let mut bytes = edge(libc::NFNL_MSG_BATCH_BEGIN as u16);
        let last = self.messages.len().saturating_sub(1);
        for (n, message) in self.messages.into_iter().enumerate() {
            // One confirmation is enough: it comes after the last one was carried out.
            bytes.extend(message.seal(if n == last { ACK } else { 0 }, 1));
        }
        bytes.extend(edge(libc::NFNL_MSG_BATCH_END as u16));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_nested_and_found_again() {
        let message = Message::new(0x0a00, CREATE, 1, 0)
            .text(1, "abcd")
            .nest(2, |m| m.number(1, 7).bytes(2, &[9]))
            .seal(ACK, 5);
        assert_eq!(message.len() % 4, 0);
        let mut found = answers(&message);
        let Some(Answer::Message { kind, family, attributes: inner }) = found.next() else {
            panic!("no message");
        };
        assert_eq!((kind, family), (0x0a00, 1));
        let outer: Vec<_> = attributes(inner).collect();
        assert_eq!(outer[0], (1, &b"abcd\0"[..]));
        assert_eq!(outer[1].0, 2);
        let nested: Vec<_> = attributes(outer[1].1).collect();
        assert_eq!(nested, [(1, &[0, 0, 0, 7][..]), (2, &[9][..])]);
        assert!(found.next().is_none());
    }

    #[test]
    fn what_is_cut_off_or_lies_about_its_length_ends_the_search() {
        let message = Message::new(0x0a00, 0, 1, 0).text(1, "abcd").seal(0, 0);
        assert_eq!(answers(&message[..message.len() - 1]).count(), 0);
        assert_eq!(answers(&message[..7]).count(), 0);
        assert_eq!(answers(&[0; 32]).count(), 0);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0, 5]).count(), 0);
    }
}
