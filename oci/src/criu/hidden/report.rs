//! What the library did.

use super::format as f;
use std::io;
use std::path::Path;

/// The library's counters, over all CRIU processes of one dump (runc starts several).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HideReport {
    /// CRIU processes that loaded it.
    pub loaded: u64,
    /// Processes that read the orders and took them.
    pub orders_read: u64,
    /// Scans for pages of other processes.
    pub scans: u64,
    /// Those from which something was hidden.
    pub scans_hidden: u64,
    /// Scans for guard pages that skipped something.
    pub guard_scans_hidden: u64,
    /// Address space skipped in scans for pages, bytes. Memory that is not there counts too.
    pub bytes_hidden: u64,
    /// Copies of smaps handed out.
    pub smaps_given: u64,
    /// Smaps that CRIU read itself.
    pub smaps_real: u64,
    /// Unusable orders or copies; nothing was hidden then, or the real smaps read.
    pub errors: u64,
}

impl HideReport {
    /// Reads the report in the file `path`; `None` if there is none.
    pub(super) fn read(path: &Path) -> io::Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        let words = bytes.chunks_exact(8).map(|word| word.try_into().map(u64::from_le_bytes));
        let words: Vec<u64> = words.map_while(Result::ok).collect();
        if words.len() < f::REPORT_WORDS || words[..2] != [f::REPORT_MAGIC, f::REPORT_VERSION] {
            let what = "the report of the hidden memory is of another kind";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let counter = |at: usize| words[2 + at];
        Ok(Some(Self {
            loaded: counter(f::LOADED),
            orders_read: counter(f::ORDERS_READ),
            scans: counter(f::SCANS),
            scans_hidden: counter(f::SCANS_HIDDEN),
            guard_scans_hidden: counter(f::GUARD_SCANS_HIDDEN),
            bytes_hidden: counter(f::BYTES_HIDDEN),
            smaps_given: counter(f::SMAPS_GIVEN),
            smaps_real: counter(f::SMAPS_REAL),
            errors: counter(f::ERRORS),
        }))
    }
}
