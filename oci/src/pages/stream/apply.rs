//! The receiving end: what the stream says is done to a store of pages.

use std::io;

use super::decode::{Decoder, Record};
use super::error::ReceiveError;
use crate::pages::PAGE;

/// Where pages land: a store on the destination. A page that it does not hold is a page of zeros.
pub trait PageSink {
    /// Puts the contents `pages`, a multiple of 4096 bytes, at `addr` of process `space`.
    ///
    /// # Errors
    /// When there is no room.
    fn write(&mut self, space: u32, addr: u64, pages: &[u8]) -> io::Result<()>;

    /// Gives one page the contents of another: `(process, address)` each.
    ///
    /// # Errors
    /// When there is no room, or no page at `from`.
    fn copy(&mut self, from: (u32, u64), to: (u32, u64)) -> io::Result<()>;

    /// Forgets the pages from `start` up to `end` of process `space`; no error when there are none.
    ///
    /// # Errors
    /// When that is not possible.
    fn remove(&mut self, space: u32, start: u64, end: u64) -> io::Result<()>;

    /// Forgets all pages of process `space`; no error when there are none.
    ///
    /// # Errors
    /// When that is not possible.
    fn remove_space(&mut self, space: u32) -> io::Result<()>;

    /// Learns that the pages from `start` up to `end` of process `space` will be wanted first.
    ///
    /// # Errors
    /// When that is not possible.
    fn hot(&mut self, _space: u32, _start: u64, _end: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Pages of a round that are taken for hot ones.
const HOT: u64 = 512;

/// What a complete round has brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// Number of the round, from 1.
    pub round: u32,
    /// Pages whose contents came.
    pub pages: u64,
    /// Pages copied from others.
    pub same: u64,
    /// Bytes of the stream, as far as they were pushed.
    pub bytes: u64,
}

/// Applies a page stream to a store, chunk by chunk.
#[derive(Default)]
pub struct Receiver {
    decoder: Decoder,
    now: Received,
    /// A round is complete: what comes again is written to, and will be soon after the move.
    again: bool,
}

impl Receiver {
    /// A receiver of a stream that begins.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies the next bytes, at most [`MAX_CHUNK`](super::MAX_CHUNK). Gives the last round that they complete, if
    /// any. Its pages are in the store and verified then: every record when it came, the round as a
    /// whole at its end.
    ///
    /// # Errors
    /// When the stream is damaged or the store takes no more. What was applied before stays; the
    /// receiver is of no use any more.
    pub fn push(
        &mut self,
        bytes: &[u8],
        sink: &mut impl PageSink,
    ) -> Result<Option<Received>, ReceiveError> {
        let mut complete = None;
        self.now.bytes += bytes.len() as u64;
        self.decoder.push(bytes)?;
        while let Some(record) = self.decoder.next()? {
            match record {
                Record::Pages { space, runs, mut data } => {
                    for run in runs {
                        let pages;
                        (pages, data) = data.split_at(usize::from(run.pages) * PAGE as usize);
                        stored("store", space, run.addr, sink.write(space, run.addr, pages))?;
                        self.now.pages += u64::from(run.pages);
                        if self.again && self.now.pages <= HOT {
                            let end = run.addr + u64::from(run.pages) * PAGE;
                            stored("mark", space, run.addr, sink.hot(space, run.addr, end))?;
                        }
                    }
                }
                Record::Same { space, runs } => {
                    for run in runs {
                        for at in (0..u64::from(run.pages)).map(|page| page * PAGE) {
                            let from = (run.from_space, run.from_addr + at);
                            let to = (space, run.addr + at);
                            stored("copy to", space, to.1, sink.copy(from, to))?;
                        }
                        self.now.same += u64::from(run.pages);
                    }
                }
                Record::Gone { space, ranges } => {
                    for range in ranges {
                        let removed = sink.remove(space, range.start, range.end);
                        stored("remove", space, range.start, removed)?;
                    }
                }
                Record::SpaceGone { space } => {
                    stored("remove all from", space, 0, sink.remove_space(space))?;
                }
                Record::RoundEnd { round, .. } => {
                    complete = Some(Received { round, ..self.now });
                    self.now = Received::default();
                    self.again = true;
                }
                Record::Hashes { .. } => return Err(ReceiveError::Direction("hashes")),
            }
        }
        Ok(complete)
    }

    /// Says that no byte will follow.
    ///
    /// # Errors
    /// When a round is not complete: its pages may be missing.
    pub fn finish(&self) -> Result<(), ReceiveError> {
        Ok(self.decoder.finish()?)
    }
}

fn stored(
    doing: &'static str,
    space: u32,
    addr: u64,
    done: io::Result<()>,
) -> Result<(), ReceiveError> {
    done.map_err(|source| ReceiveError::Store { doing, space, addr, source })
}
