//! What the store holds, told to the source: so that a second attempt sends only what changed.
//!
//! It is a page stream of one round that carries hashes alone.

use std::io::{self, Write};

use super::codec::{self, Run, Tally};
use super::decode::{Decoder, Record};
use super::error::{DecodeError, ReceiveError};
use crate::pages::PAGE;

/// Most hashes in one record.
const MOST: usize = 8192;

/// Writes the hashes of all pages of a store: `(process, address, xxh3-128 little-endian)`, best in
/// the order of their addresses. Gives how many there are.
///
/// # Errors
/// What `out` says.
pub fn send_hashes(
    pages: impl IntoIterator<Item = (u32, u64, [u8; 16])>,
    out: &mut impl Write,
) -> io::Result<u64> {
    let (mut buffer, mut tally) = (Vec::new(), Tally::new());
    let (mut space, mut runs, mut hashes) = (0, Vec::<Run>::new(), Vec::new());
    let mut count = 0;
    codec::put_header(&mut buffer);
    let mut pages = pages.into_iter();
    loop {
        let next = pages.next();
        let full = next.is_none_or(|page| page.0 != space) || hashes.len() == MOST;
        if full && !hashes.is_empty() {
            let check = codec::put_hashes(&mut buffer, space, &runs, &hashes);
            tally.add(check, hashes.len() as u64);
            out.write_all(&buffer)?;
            buffer.clear();
            runs.clear();
            hashes.clear();
        }
        let Some((next, addr, hash)) = next else { break };
        space = next;
        codec::extend_runs(&mut runs, addr);
        hashes.push(u128::from_le_bytes(hash));
        count += 1;
    }
    codec::put_round_end(&mut buffer, 1, tally.take());
    out.write_all(&buffer)?;
    Ok(count)
}

/// Reads what [`send_hashes`] wrote, chunk by chunk.
#[derive(Default)]
pub struct HashReader {
    decoder: Decoder,
    complete: bool,
}

impl HashReader {
    /// A reader of a stream that begins.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes, at most [`MAX_CHUNK`](super::MAX_CHUNK), and calls `each(process, address, hash)` for each page.
    /// Whether that was all.
    ///
    /// # Errors
    /// When the stream is damaged or carries something else.
    pub fn push(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(u32, u64, u128),
    ) -> Result<bool, ReceiveError> {
        self.decoder.push(bytes)?;
        while let Some(record) = self.decoder.next()? {
            match record {
                Record::Hashes { space, runs, hashes } => {
                    let addresses = runs.iter().flat_map(|run| {
                        (0..u64::from(run.pages)).map(move |page| run.addr + page * PAGE)
                    });
                    addresses.zip(hashes).for_each(|(addr, hash)| each(space, addr, *hash));
                }
                Record::RoundEnd { .. } => self.complete = true,
                _ => return Err(ReceiveError::Direction("pages")),
            }
        }
        Ok(self.complete)
    }

    /// Says that no byte will follow.
    ///
    /// # Errors
    /// When hashes are missing.
    pub fn finish(&self) -> Result<(), ReceiveError> {
        self.decoder.finish()?;
        if self.complete { Ok(()) } else { Err(DecodeError::Short(1).into()) }
    }
}
