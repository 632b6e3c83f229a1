//! The files in the folder that [`FOLDER_ENV`] names. The writer of the orders and the reader of
//! the report include this file too, so both ends always agree.
//!
//! Every file is a row of little-endian 64-bit words.
//!
//! ```text
//! ranges   magic, version, tasks, ranges, checksum of all other words
//!          per task:   pid in CRIU's /proc, task flags, length of its smaps copy, its ranges
//!          per range:  start | range flags, end          (of task after task, ascending)
//! report   magic, version, one word per counter          (shared memory while CRIU runs)
//! smaps-PID                                              (text, in the form of /proc/PID/smaps)
//! ```

/// Environment variable that names the folder.
pub(crate) const FOLDER_ENV: &str = "FERRY_HIDE";
/// The library's file name.
pub(crate) const LIBRARY: &str = "libferry_hide.so";
/// Program that the library acts in.
pub(crate) const PROGRAM: &str = "criu";

/// The orders' file.
pub(crate) const ORDERS: &str = "ranges";
/// First word of the orders, `ferryhid`.
pub(crate) const ORDERS_MAGIC: u64 = u64::from_le_bytes(*b"ferryhid");
/// Version of the orders.
pub(crate) const ORDERS_VERSION: u64 = 1;
/// Words before the tasks.
pub(crate) const HEADER_WORDS: usize = 5;
/// The header's word that holds the checksum.
pub(crate) const CHECKSUM_WORD: usize = 4;
/// Words of a task.
pub(crate) const TASK_WORDS: usize = 4;
/// Words of a range.
pub(crate) const RANGE_WORDS: usize = 2;
/// Larger files of orders are none, bytes.
pub(crate) const ORDERS_MAX: usize = 16 << 20;
/// Task flag: `smaps-PID` says what the real one would.
pub(crate) const TASK_SMAPS: u64 = 1;
/// Range flag: guard pages may lie in it, so scans for them are let through.
pub(crate) const RANGE_GUARDS: u64 = 1;
/// Ranges begin and end at multiples of this, bytes.
pub(crate) const ALIGN: u64 = 4096;

/// The copies of smaps are called this and the pid.
pub(crate) const SMAPS_PREFIX: &str = "smaps-";

/// The report's file.
pub(crate) const REPORT: &str = "report";
/// First word of a report, `ferryrep`.
pub(crate) const REPORT_MAGIC: u64 = u64::from_le_bytes(*b"ferryrep");
/// Version of the report.
pub(crate) const REPORT_VERSION: u64 = 1;
/// Words of a report: magic, version, counters.
pub(crate) const REPORT_WORDS: usize = 2 + COUNTERS;
/// How many counters there are.
pub(crate) const COUNTERS: usize = 9;

/// CRIU processes that loaded the library.
pub(crate) const LOADED: usize = 0;
/// Orders that were read and taken.
pub(crate) const ORDERS_READ: usize = 1;
/// Scans for pages of other processes.
pub(crate) const SCANS: usize = 2;
/// Scans for pages from which something was hidden.
pub(crate) const SCANS_HIDDEN: usize = 3;
/// Scans for guard pages that skipped something.
pub(crate) const GUARD_SCANS_HIDDEN: usize = 4;
/// Bytes of address space skipped in scans for pages; a range scanned twice counts twice.
pub(crate) const BYTES_HIDDEN: usize = 5;
/// Copies of smaps handed out.
pub(crate) const SMAPS_GIVEN: usize = 6;
/// Opened smaps for which no copy was handed out.
pub(crate) const SMAPS_REAL: usize = 7;
/// Unusable orders or copies, and failed system calls; the real thing was done instead.
pub(crate) const ERRORS: usize = 8;

/// The checksum of a file of orders: FNV-1a by words, without the word that holds it.
pub(crate) fn checksum(words: impl Iterator<Item = u64>) -> u64 {
    let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x0100_0000_01b3);
    let others = words.enumerate().filter(|(at, _)| *at != CHECKSUM_WORD);
    others.fold(0xcbf2_9ce4_8422_2325, |sum, (_, word)| mix(sum, word))
}
