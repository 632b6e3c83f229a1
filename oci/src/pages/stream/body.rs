//! The body of one record: taken apart field by field, with every number looked at.

use std::ops::Range;

use super::codec::{GONE, HASHES, PAGES, ROUND_END, Run, SAME, SPACE_GONE, SameRun};
use super::error::DecodeError;
use crate::pages::PAGE;

/// What a kind of record is called in errors.
pub(super) fn name(tag: u8) -> Result<&'static str, DecodeError> {
    Ok(match tag {
        PAGES => "pages",
        SAME => "repeated pages",
        GONE => "gone",
        SPACE_GONE => "process gone",
        ROUND_END => "round end",
        HASHES => "hashes",
        other => return Err(DecodeError::Tag(other)),
    })
}

/// The first four bytes. The caller has seen that they are there.
pub(super) fn le32(bytes: &[u8]) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[..4]);
    u32::from_le_bytes(number)
}

/// The first eight bytes. The caller has seen that they are there.
pub(super) fn le64(bytes: &[u8]) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(number)
}

/// What is left of a body.
pub(super) struct Body<'a> {
    pub(super) record: &'static str,
    pub(super) bytes: &'a [u8],
    whole: usize,
}

impl<'a> Body<'a> {
    pub(super) fn new(tag: u8, bytes: &'a [u8]) -> Result<Self, DecodeError> {
        Ok(Self { record: name(tag)?, bytes, whole: bytes.len() })
    }

    /// The error that says that the record cannot have this length.
    pub(super) fn length(&self) -> DecodeError {
        DecodeError::Length { record: self.record, length: self.whole }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let Some((field, rest)) = self.bytes.split_first_chunk() else {
            return Err(self.length());
        };
        self.bytes = rest;
        Ok(*field)
    }

    pub(super) fn take8(&mut self) -> Result<u8, DecodeError> {
        self.take().map(u8::from_le_bytes)
    }

    pub(super) fn take16(&mut self) -> Result<u16, DecodeError> {
        self.take().map(u16::from_le_bytes)
    }

    pub(super) fn take32(&mut self) -> Result<u32, DecodeError> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn take64(&mut self) -> Result<u64, DecodeError> {
        self.take().map(u64::from_le_bytes)
    }

    /// Nothing may be left.
    pub(super) fn end(&self) -> Result<(), DecodeError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(self.length()) }
    }

    fn run(&mut self) -> Result<Run, DecodeError> {
        let run = Run { addr: self.take64()?, pages: self.take16()? };
        self.span(run.addr, run.pages)?;
        Ok(run)
    }

    /// Whether `pages` pages, at least one, can lie at `addr`.
    fn span(&self, addr: u64, pages: u16) -> Result<(), DecodeError> {
        if pages == 0 {
            return Err(DecodeError::Empty(self.record));
        }
        match addr.checked_add(u64::from(pages) * PAGE) {
            Some(_) if addr.is_multiple_of(PAGE) => Ok(()),
            _ => Err(DecodeError::Address { record: self.record, addr }),
        }
    }

    /// Reads `count` runs and gives how many pages they have.
    pub(super) fn runs(&mut self, count: u16, runs: &mut Vec<Run>) -> Result<u64, DecodeError> {
        runs.clear();
        for _ in 0..count {
            runs.push(self.run()?);
        }
        self.sum(runs.iter().map(|run| run.pages))
    }

    /// Reads repeated pages up to the end and gives how many they are.
    pub(super) fn same(&mut self, runs: &mut Vec<SameRun>) -> Result<u64, DecodeError> {
        runs.clear();
        while !self.bytes.is_empty() {
            let (addr, from_space, from_addr) = (self.take64()?, self.take32()?, self.take64()?);
            let pages = self.take16()?;
            self.span(addr, pages)?;
            self.span(from_addr, pages)?;
            runs.push(SameRun { addr, from_space, from_addr, pages });
        }
        self.sum(runs.iter().map(|run| run.pages))
    }

    /// Reads ranges up to the end.
    pub(super) fn ranges(&mut self, ranges: &mut Vec<Range<u64>>) -> Result<(), DecodeError> {
        ranges.clear();
        while !self.bytes.is_empty() {
            let (start, end) = (self.take64()?, self.take64()?);
            for addr in [start, end] {
                if !addr.is_multiple_of(PAGE) || start >= end {
                    return Err(DecodeError::Address { record: self.record, addr });
                }
            }
            ranges.push(start..end);
        }
        if ranges.is_empty() { Err(DecodeError::Empty(self.record)) } else { Ok(()) }
    }

    /// Reads hashes up to the end and gives how many they are.
    pub(super) fn hashes(
        &mut self,
        runs: &mut Vec<Run>,
        hashes: &mut Vec<u128>,
    ) -> Result<u64, DecodeError> {
        runs.clear();
        hashes.clear();
        while !self.bytes.is_empty() {
            let run = self.run()?;
            for _ in 0..run.pages {
                hashes.push(u128::from_le_bytes(self.take()?));
            }
            runs.push(run);
        }
        self.sum(runs.iter().map(|run| run.pages))
    }

    /// A record that speaks of no page is an error.
    fn sum(&self, pages: impl Iterator<Item = u16>) -> Result<u64, DecodeError> {
        match pages.map(u64::from).sum() {
            0 => Err(DecodeError::Empty(self.record)),
            pages => Ok(pages),
        }
    }
}
