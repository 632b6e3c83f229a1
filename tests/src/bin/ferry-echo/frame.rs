//! The messages: a header with sequence number and checksum, then the payload.

use std::io;

/// Bytes of a header: magic, length, sequence, count, digest, checksum.
pub(crate) const HEADER: usize = 40;
/// The longest payload.
pub(crate) const MOST: usize = 60_000;
const MAGIC: u32 = u32::from_le_bytes(*b"FRRY");

/// One message. `count` and `digest` are the server's, and 0 in a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Frame {
    pub(crate) sequence: u64,
    pub(crate) count: u64,
    pub(crate) digest: u64,
    pub(crate) payload: Vec<u8>,
}

/// What the header says.
pub(crate) struct Header {
    pub(crate) length: usize,
    sequence: u64,
    count: u64,
    digest: u64,
    checksum: u64,
}

impl Frame {
    /// Request number `sequence`: its payload follows from the numbers.
    pub(crate) fn request(connection: u32, sequence: u64, size: usize) -> Self {
        let mut state = hash(hash(START, &connection.to_le_bytes()), &sequence.to_le_bytes());
        let length = 1 + (state >> 8) as usize % size;
        let payload = (0..length)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect();
        Self { sequence, count: 0, digest: 0, payload }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend((self.payload.len() as u32).to_le_bytes());
        for field in [self.sequence, self.count, self.digest] {
            bytes.extend(field.to_le_bytes());
        }
        let checksum = hash(hash(START, &bytes), &self.payload);
        bytes.extend(checksum.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// A whole message, as a datagram holds it.
    pub(crate) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(wrong("a message is too short"));
        };
        Header::decode(header)?.with(header, payload.to_vec())
    }
}

impl Header {
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> io::Result<Self> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let start = word(0);
        let length = (start >> 32) as usize;
        if start as u32 != MAGIC {
            return Err(wrong("a message does not begin where it should"));
        }
        if length > MOST {
            return Err(wrong("a message is too long"));
        }
        Ok(Self {
            length,
            sequence: word(8),
            count: word(16),
            digest: word(24),
            checksum: word(32),
        })
    }

    /// The message, if the checksum is right.
    pub(crate) fn with(self, bytes: &[u8; HEADER], payload: Vec<u8>) -> io::Result<Frame> {
        if payload.len() != self.length {
            return Err(wrong("a message has another length than it says"));
        }
        if hash(hash(START, &bytes[..HEADER - 8]), &payload) != self.checksum {
            return Err(wrong("a message has a wrong checksum"));
        }
        let Self { sequence, count, digest, .. } = self;
        Ok(Frame { sequence, count, digest, payload })
    }
}

/// What a server has seen of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Seen {
    pub(crate) count: u64,
    pub(crate) digest: u64,
}

impl Seen {
    pub(crate) fn add(&mut self, frame: &Frame) {
        self.count += 1;
        self.digest = hash(hash(self.digest, &frame.sequence.to_le_bytes()), &frame.payload);
    }
}

const START: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, continued from `state`.
fn hash(state: u64, bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(state, |state, byte| (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// An error that says what is wrong with a message.
pub(crate) fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        let mut frame = Frame::request(3, 17, 500);
        frame.count = 17;
        frame.digest = 4711;
        assert_eq!(Frame::decode(&frame.encode()).unwrap(), frame);
    }

    #[test]
    fn a_changed_byte_is_seen_wherever_it_is() {
        let bytes = Frame::request(1, 1, 50).encode();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Frame::decode(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn short_and_long_messages_are_refused() {
        let mut bytes = Frame::request(1, 1, 50).encode();
        assert!(Frame::decode(&bytes[..HEADER - 1]).is_err());
        assert!(Frame::decode(&bytes[..bytes.len() - 1]).is_err());
        bytes.push(0);
        assert!(Frame::decode(&bytes).is_err());
        assert!(Frame::decode(&[]).is_err());
    }

    #[test]
    fn the_digest_depends_on_order() {
        let (one, two) = (Frame::request(1, 1, 50), Frame::request(1, 2, 50));
        let (mut a, mut b) = (Seen::default(), Seen::default());
        a.add(&one);
        a.add(&two);
        b.add(&two);
        b.add(&one);
        assert_ne!(a, b);
    }
}
