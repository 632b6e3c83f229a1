//! Restartable sequences (rseq(2)) of a stopped thread.
//!
//! A thread that is interrupted within such a sequence is sent to its abort handler, but only if the
//! kernel finds it at an address of the sequence when it goes on. After a foreign system call it is
//! elsewhere, the kernel forgets the sequence, and the thread would go on in the middle of it.
#![allow(unsafe_code)] // ptrace(2) has no safe wrapper for this request.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Default)]
struct Configuration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// `PTRACE_GET_RSEQ_CONFIGURATION`.
const GET_RSEQ_CONFIGURATION: super::arch::Request = 0x420f;

/// Offset of the pointer to the running sequence in `struct rseq`.
const RSEQ_CS: u64 = 8;

/// Whether the stopped thread, about to run the instruction at `position`, is within a sequence.
pub(super) fn inside(pid: i32, position: u64) -> bool {
    let mut configuration = Configuration::default();
    // SAFETY: the kernel writes at most as many bytes as is said.
    let size = unsafe {
        libc::ptrace(
            GET_RSEQ_CONFIGURATION,
            pid,
            size_of::<Configuration>(),
            &raw mut configuration,
        )
    };
    if size < 0 || configuration.pointer == 0 {
        return false;
    }
    let Ok(memory) = File::open(format!("/proc/{pid}/mem")) else {
        return false;
    };
    let word = |address: u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, address).ok().map(|()| u64::from_ne_bytes(bytes))
    };
    within(word(configuration.pointer + RSEQ_CS), word, position)
}

/// `struct rseq_cs` holds its first address at 8 and its length at 16.
fn within(sequence: Option<u64>, word: impl Fn(u64) -> Option<u64>, position: u64) -> bool {
    let Some(sequence) = sequence.filter(|s| *s != 0) else {
        return false;
    };
    match (word(sequence + 8), word(sequence + 16)) {
        (Some(start), Some(length)) => position.wrapping_sub(start) < length,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::within;

    #[test]
    fn a_position_is_within_a_sequence_from_its_first_address_to_its_last() {
        let word = |address| match address {
            0x108 => Some(0x4000),
            0x110 => Some(0x20),
            _ => None,
        };
        assert!(within(Some(0x100), word, 0x4000));
        assert!(within(Some(0x100), word, 0x401f));
        assert!(!within(Some(0x100), word, 0x4020));
        assert!(!within(Some(0x100), word, 0x3fff));
    }

    #[test]
    fn a_thread_without_a_sequence_is_in_none() {
        assert!(!within(Some(0), |_| Some(1), 1));
        assert!(!within(None, |_| Some(1), 1));
        assert!(!within(Some(0x100), |_| None, 1));
    }
}
