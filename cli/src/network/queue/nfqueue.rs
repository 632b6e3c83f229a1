//! A queue of the kernel: packets that a rule sends there wait for a verdict from its reader.
//!
//! The kernel drops what waits when the reader's socket is closed, so also when its process dies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use ferry_oci::quarantine::netlink::{Answer, Message, Socket, answers, attributes};
use nix::errno::Errno;

/// Queues among the netfilter subsystems.
const SUBSYSTEM: u16 = 3;
const PACKET: u16 = SUBSYSTEM << 8;
const CONFIG: u16 = SUBSYSTEM << 8 | 2;
const VERDICT_BATCH: u16 = SUBSYSTEM << 8 | 3;

const CONFIG_COMMAND: u16 = 1;
const CONFIG_COPY: u16 = 2;
const CONFIG_LENGTH: u16 = 3;
const CONFIG_MASK: u16 = 4;
const CONFIG_FLAGS: u16 = 5;
const COMMAND_BIND: u8 = 1;
/// The reader gets what is known of a packet, not its bytes.
const COPY_META: u8 = 1;
/// Let packets pass that the queue has no room for: never set.
const FAIL_OPEN: u32 = 1;
/// Large packets wait whole instead of being cut up.
const GSO: u32 = 4;

const PACKET_HEADER: u16 = 1;
const VERDICT_HEADER: u16 = 2;

/// Most packets that wait. At 10 Gbit/s more come in only after some 40 ms of full-sized ones, and
/// a client's window is full long before.
const LENGTH: u32 = 1 << 15;
/// Room for the messages about them, in bytes: one takes less than 1 KB.
const BUFFER: usize = (LENGTH as usize) << 10;

/// Numbers that are tried, far from those people choose by hand.
const NUMBERS: std::ops::Range<u16> = 20_000..60_000;
const TRIES: u16 = 1000;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Drop,
}

/// A queue that this process reads.
#[derive(Debug)]
pub(super) struct Queue {
    socket: Socket,
    number: u16,
}

impl Queue {
    /// Takes a queue that nobody reads, in this thread's network namespace. `seed` says where to
    /// begin to look, so that two that start at once rarely meet.
    ///
    /// # Errors
    /// When the kernel has no queues, or without CAP_NET_ADMIN.
    pub(super) fn take(seed: u16) -> io::Result<Self> {
        let socket = Socket::open()?;
        let count = NUMBERS.end - NUMBERS.start;
        for n in 0..TRIES {
            let number = NUMBERS.start + (seed % count + n) % count;
            match socket.call(bind(number)) {
                // Somebody else's: the kernel says EPERM or EBUSY.
                Err(e) if [Errno::EPERM, Errno::EBUSY].contains(&errno(&e)) => {}
                Err(e) => return Err(e),
                Ok(()) => {
                    let queue = Self { socket, number };
                    queue.configure()?;
                    return Ok(queue);
                }
            }
        }
        Err(Errno::EBUSY.into())
    }

    fn configure(&self) -> io::Result<()> {
        self.socket.receive_buffer(BUFFER)?;
        let copy = [0, 0, 0, 0, COPY_META];
        let message = config(self.number)
            .bytes(CONFIG_COPY, &copy)
            .number(CONFIG_LENGTH, LENGTH)
            .number(CONFIG_MASK, GSO | FAIL_OPEN)
            .number(CONFIG_FLAGS, GSO);
        self.socket.call(message)
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }

    /// The packets that have come since the last call; waits for none. The kernel numbers them in
    /// their order.
    ///
    /// # Errors
    /// When the socket fails.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<Packets>> {
        let bytes = match self.socket.try_receive(buffer) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            // Messages were lost, and with them the packets they spoke of.
            Err(e) if errno(&e) == Errno::ENOBUFS => return Ok(Some(Packets::default())),
            Err(e) => return Err(e),
        };
        Ok(Some(Packets::in_bytes(bytes)))
    }

    /// Decides on all packets up to number `last`, in their order; those that are accepted have
    /// gone on when this returns.
    ///
    /// # Errors
    /// When the socket fails.
    pub(super) fn decide(&self, verdict: Verdict, last: u32) -> io::Result<()> {
        let code: u32 = if verdict == Verdict::Accept { 1 } else { 0 };
        let header = [code.to_be_bytes(), last.to_be_bytes()].concat();
        let message = Message::new(VERDICT_BATCH, 0, 0, self.number);
        self.socket.send(message.bytes(VERDICT_HEADER, &header))
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Some packets.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packets {
    pub(super) count: u64,
    /// Number of the last one.
    pub(super) last: Option<u32>,
}

impl Packets {
    fn in_bytes(bytes: &[u8]) -> Self {
        let mut packets = Self::default();
        for answer in answers(bytes) {
            // Others are refusals: of a verdict on packets that have had one.
            let Answer::Message { kind: PACKET, attributes: about, .. } = answer else { continue };
            let header = attributes(about).find(|(kind, _)| *kind == PACKET_HEADER);
            let number = header.and_then(|(_, data)| data.get(..4)?.try_into().ok());
            packets.count += 1;
            packets.last = number.map(u32::from_be_bytes).or(packets.last);
        }
        packets
    }
}

fn config(number: u16) -> Message {
    Message::new(CONFIG, 0, 0, number)
}

fn bind(number: u16) -> Message {
    config(number).bytes(CONFIG_COMMAND, &[COMMAND_BIND, 0, 0, 0])
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
