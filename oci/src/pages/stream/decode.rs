//! Reading the page stream: bytes go in as they come, whole and verified records come out.
//!
//! Nothing of a record is seen before its check was found right. What is kept is bounded: one
//! chunk, and less than one record besides.

use std::ops::Range;

use zstd::bulk::Decompressor;

use super::body::{Body, le32, le64, name};
use super::codec::{
    self, BATCH, FORMAT, GONE, HASHES, HEAD, HEADER, MAGIC, MAX_BODY, PAGES, RAW, ROUND_END, Run,
    SAME, SPACE_GONE, SameRun, Tally, ZSTD,
};
use super::error::DecodeError;
use crate::pages::PAGE;

/// Most bytes that [`Decoder::push`] takes at once: one data frame of the link.
pub const MAX_CHUNK: usize = 1 << 20;

/// One record.
#[derive(Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Contents of pages: `data` holds those of all `runs`, in order.
    Pages {
        /// Process: its pid inside the container.
        space: u32,
        /// Where.
        runs: &'a [Run],
        /// Contents.
        data: &'a [u8],
    },
    /// Pages with contents that the receiver has. To be copied page by page in this order.
    Same {
        /// Process.
        space: u32,
        /// Where to and from.
        runs: &'a [SameRun],
    },
    /// What these ranges held is gone: they read as zeros.
    Gone {
        /// Process.
        space: u32,
        /// Addresses.
        ranges: &'a [Range<u64>],
    },
    /// The process is gone, or all that it held.
    SpaceGone {
        /// Process.
        space: u32,
    },
    /// Everything of a round has come, and was verified.
    RoundEnd {
        /// Number of the round, from 1.
        round: u32,
        /// Pages and repeated pages in it.
        pages: u64,
    },
    /// What the receiver holds: `hashes` are those of all pages of `runs`, in order.
    Hashes {
        /// Process.
        space: u32,
        /// Where.
        runs: &'a [Run],
        /// xxh3-128 of each page.
        hashes: &'a [u128],
    },
}

/// Turns chunks of bytes into records.
///
/// [`push`](Self::push) one chunk, then pull with [`next`](Self::next) until it gives `None`. After an
/// error every call gives it again.
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are done with.
    at: usize,
    begun: bool,
    failed: Option<DecodeError>,
    round: u32,
    open: bool,
    tally: Tally,
    unpack: Option<Decompressor<'static>>,
    plain: Vec<u8>,
    runs: Vec<Run>,
    same: Vec<SameRun>,
    ranges: Vec<Range<u64>>,
    hashes: Vec<u128>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder of a stream that begins.
    pub fn new() -> Self {
        Self {
            buffer: Vec::new(),
            at: 0,
            begun: false,
            failed: None,
            round: 0,
            open: false,
            tally: Tally::new(),
            unpack: None,
            plain: Vec::new(),
            runs: Vec::new(),
            same: Vec::new(),
            ranges: Vec::new(),
            hashes: Vec::new(),
        }
    }

    /// Takes the next bytes of the stream, at most [`MAX_CHUNK`].
    ///
    /// # Errors
    /// [`DecodeError::TooMuch`] when earlier records were not pulled or the chunk is larger; an
    /// error that [`next`](Self::next) gave before.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.buffer.drain(..self.at);
        self.at = 0;
        let waiting = self.buffer.len() + bytes.len();
        if waiting > MAX_CHUNK + HEAD + MAX_BODY {
            return Err(DecodeError::TooMuch(waiting));
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next record that is complete.
    ///
    /// # Errors
    /// When it is none, was damaged on its way, or records are missing from the round it ends.
    #[allow(clippy::should_implement_trait, reason = "a record borrows from the decoder")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>, DecodeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.parse() {
            Ok(None) => Ok(None),
            Ok(Some(found)) => Ok(Some(self.record(found))),
            Err(error) => {
                self.failed = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Says that no byte will follow.
    ///
    /// # Errors
    /// [`DecodeError::Short`] when a round is not complete.
    pub fn finish(&self) -> Result<(), DecodeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let whole = self.at == self.buffer.len() && !self.open;
        if whole { Ok(()) } else { Err(DecodeError::Short(self.round + 1)) }
    }

    /// Reads one record into the decoder's lists.
    fn parse(&mut self) -> Result<Option<Found>, DecodeError> {
        if !self.begun && !self.header()? {
            return Ok(None);
        }
        let rest = &self.buffer[self.at..];
        let Some((head, rest)) = rest.split_at_checked(HEAD) else {
            // A tag that does not exist is said at once: the length behind it means nothing.
            rest.first().map_or(Ok(""), |tag| name(*tag))?;
            return Ok(None);
        };
        let tag = head[0];
        let record = name(tag)?;
        let length = le32(&head[1..]) as usize;
        if length > MAX_BODY {
            return Err(DecodeError::Length { record, length });
        }
        if rest.len() < length {
            return Ok(None);
        }
        let check = le64(&head[5..]);
        let at = self.at + HEAD;
        self.at = at + length;
        let found =
            if tag == PAGES { self.pages(at, check)? } else { self.others(tag, at, check)? };
        if tag == ROUND_END {
            self.open = false;
        } else {
            self.tally.add(check, found.pages);
            self.open = true;
        }
        Ok(Some(found))
    }

    /// Reads the pages record whose body is at `at`.
    fn pages(&mut self, at: usize, check: u64) -> Result<Found, DecodeError> {
        let mut body = Body::new(PAGES, &self.buffer[at..self.at])?;
        let space = body.take32()?;
        let encoding = body.take8()?;
        let runs = body.take16()?;
        let pages = body.runs(runs, &mut self.runs)?;
        if pages > BATCH as u64 {
            return Err(body.length());
        }
        let bytes = pages as usize * PAGE as usize;
        let contents = self.at - body.bytes.len()..self.at;
        let packed = match encoding {
            RAW if contents.len() == bytes => false,
            RAW => return Err(body.length()),
            ZSTD => true,
            other => return Err(DecodeError::Encoding(other)),
        };
        let head = &self.buffer[at..contents.start];
        let mut plain = &self.buffer[contents.clone()];
        if packed {
            let damaged = DecodeError::Unpack { space, addr: self.runs[0].addr };
            self.plain.resize(BATCH * PAGE as usize, 0);
            let unpack = match &mut self.unpack {
                Some(unpack) => unpack,
                none => none.insert(Decompressor::new().map_err(|_| damaged.clone())?),
            };
            if unpack.decompress_to_buffer(plain, &mut self.plain[..bytes]).ok() != Some(bytes) {
                return Err(damaged);
            }
            plain = &self.plain[..bytes];
        }
        if codec::check_pages(head, plain) != check {
            return Err(DecodeError::Check("pages"));
        }
        let contents = if packed { 0..bytes } else { contents };
        Ok(Found { tag: PAGES, space, pages, contents, packed })
    }

    /// Reads a record of another kind whose body is at `at`.
    fn others(&mut self, tag: u8, at: usize, check: u64) -> Result<Found, DecodeError> {
        let mut body = Body::new(tag, &self.buffer[at..self.at])?;
        if codec::check(tag, body.bytes) != check {
            return Err(DecodeError::Check(body.record));
        }
        let mut found = Found { tag, space: 0, pages: 0, contents: 0..0, packed: false };
        if tag == ROUND_END {
            let (round, sent, checks) = (body.take32()?, body.take64()?, body.take64()?);
            body.end()?;
            if round != self.round + 1 {
                return Err(DecodeError::Round { found: round, due: self.round + 1 });
            }
            let (received, ours) = self.tally.take();
            if (received, ours) != (sent, checks) {
                return Err(DecodeError::Lost { round, sent, received });
            }
            self.round = round;
            found.pages = received;
            return Ok(found);
        }
        found.space = body.take32()?;
        match tag {
            SAME => found.pages = body.same(&mut self.same)?,
            GONE => body.ranges(&mut self.ranges)?,
            SPACE_GONE => body.end()?,
            _ => found.pages = body.hashes(&mut self.runs, &mut self.hashes)?,
        }
        Ok(found)
    }

    /// Whether the header is complete.
    fn header(&mut self) -> Result<bool, DecodeError> {
        let bytes = &self.buffer[self.at..];
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(DecodeError::Magic);
        }
        if bytes.len() < HEADER {
            return Ok(false);
        }
        let format = u16::from_le_bytes([bytes[8], bytes[9]]);
        if format != FORMAT {
            return Err(DecodeError::Format(format));
        }
        let page = le32(&bytes[10..]);
        if u64::from(page) != PAGE {
            return Err(DecodeError::PageSize(page));
        }
        self.at += HEADER;
        self.begun = true;
        Ok(true)
    }

    fn record(&self, found: Found) -> Record<'_> {
        let Found { tag, space, pages, contents, packed } = found;
        match tag {
            PAGES => {
                let from = if packed { &self.plain } else { &self.buffer };
                Record::Pages { space, runs: &self.runs, data: &from[contents] }
            }
            SAME => Record::Same { space, runs: &self.same },
            GONE => Record::Gone { space, ranges: &self.ranges },
            SPACE_GONE => Record::SpaceGone { space },
            HASHES => Record::Hashes { space, runs: &self.runs, hashes: &self.hashes },
            _ => Record::RoundEnd { round: self.round, pages },
        }
    }
}

/// What was read into the decoder's lists.
struct Found {
    tag: u8,
    space: u32,
    pages: u64,
    contents: Range<usize>,
    packed: bool,
}
