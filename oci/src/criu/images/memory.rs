//! The memory of a process, and its command line in it.

use super::super::decode::{fields, records};
use super::super::pagemap::MM_MAGIC;
use super::super::{ImageError, Pagemap};
use super::Span;
use serde::Serialize;

/// Longest command line that is read, bytes.
const LONGEST: u64 = 32 << 10;

/// How much memory a process has, and where that is. Bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// What it has mapped, used or not.
    pub mapped: u64,
    /// Content in this checkpoint.
    pub present: u64,
    /// Content in an earlier one.
    pub in_parent: u64,
    /// Left to a page daemon.
    pub lazy: u64,
}

/// What an mm image says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mm {
    /// Bytes of all mappings.
    mapped: u64,
    arguments: (u64, u64),
    /// Number of its program among the files.
    pub(super) exe: u32,
}

impl Mm {
    pub(super) fn parse(image: &[u8]) -> Result<Self, ImageError> {
        let mut records = records(image, MM_MAGIC)?;
        let record = records.next().ok_or(ImageError::Format("an empty mm image"))??;
        let mut mm = Self::default();
        for field in fields(record) {
            let field = field?;
            match field.number {
                8 => mm.arguments.0 = field.value,
                9 => mm.arguments.1 = field.value,
                12 => mm.exe = field.number32(),
                14 => mm.mapped = mm.mapped.saturating_add(length(field.message())?),
                _ => {}
            }
        }
        Ok(mm)
    }

    pub(super) fn memory(&self, pagemap: &Pagemap) -> Memory {
        let sum = |fits: fn(&super::super::PageRun) -> bool| {
            let runs = pagemap.runs.iter().filter(|run| fits(run));
            runs.fold(0_u64, |sum, run| sum.saturating_add(run.end - run.start))
        };
        Memory {
            mapped: self.mapped,
            present: sum(|run| run.present),
            in_parent: sum(|run| run.in_parent),
            lazy: sum(|run| run.lazy && !run.present),
        }
    }

    /// Where the command line is in the pages images. Empty if it is not in this checkpoint.
    pub(super) fn command(&self, pagemap: &Pagemap) -> Vec<Span> {
        let (mut at, end) = self.arguments;
        let end = end.min(at.saturating_add(LONGEST));
        let mut spans = Vec::new();
        let mut offset = 0_u64;
        for run in &pagemap.runs {
            if run.present && run.start <= at && at < run.end && at < end {
                let Some(from) = offset.checked_add(at - run.start) else { break };
                let until = end.min(run.end);
                let name = format!("pages-{}.img", pagemap.pages_id);
                let length = (until - at) as usize;
                spans.push(Span { name, offset: from, length });
                at = until;
            }
            if run.present {
                offset = offset.saturating_add(run.end - run.start);
            }
        }
        if at < end { Vec::new() } else { spans }
    }
}

/// Length of a mapping.
fn length(mapping: &[u8]) -> Result<u64, ImageError> {
    let (mut start, mut end) = (0, 0);
    for field in fields(mapping) {
        let field = field?;
        match field.number {
            1 => start = field.value,
            2 => end = field.value,
            _ => {}
        }
    }
    Ok(end.saturating_sub(start))
}

/// The words of a command line, each of which ends with a zero byte.
pub(super) fn words(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    // What a program has written over its command line, as a title, has no zeros but at its end.
    let mut words: Vec<_> = bytes.split(|b| *b == 0).collect();
    while words.last().is_some_and(|word| word.is_empty()) {
        words.pop();
    }
    words.into_iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}
