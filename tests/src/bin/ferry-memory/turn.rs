//! Whose turn it is: all write, or all stand still and look.
//!
//! ```text
//! run ─▶ pause: nobody writes ─▶ look: everybody compares ─▶ run
//! ```
//!
//! Each step is taken when all have seen the one before, so that memory that several see does not
//! change under one that compares it. The board is shared by all processes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Most that take part.
pub(crate) const MOST: usize = 16 * 17;
/// Longest text about an error, in words of 8 bytes.
const TEXT: usize = 40;
const POLL: Duration = Duration::from_micros(200);

/// What is to be done now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Turn {
    Run,
    Pause,
    Look,
}

/// The place of one who takes part.
pub(crate) struct Place {
    seen: AtomicU64,
    pages: AtomicU64,
    /// Writes so far.
    pub(crate) writes: AtomicU64,
    /// Mappings made, moved and freed, and processes forked.
    pub(crate) events: AtomicU64,
    wrong: AtomicU64,
    text: [AtomicU64; TEXT],
}

/// What all share.
pub(crate) struct Board {
    /// Counts turns.
    turn: AtomicU64,
    quit: AtomicU64,
    /// Kinds of memory that this kernel or container lacks, as bits.
    pub(crate) missing: AtomicU64,
    /// Not 0 while nobody may make guards or take them away.
    pub(crate) guards_stay: AtomicU64,
    /// How often the kernel refused at first to move memory.
    pub(crate) refused: AtomicU64,
    places: [Place; MOST],
}

impl Board {
    pub(crate) fn place(&self, n: usize) -> &Place {
        &self.places[n]
    }

    /// Ends all who take part.
    pub(crate) fn quit(&self) {
        self.quit.store(1, Ordering::Release);
    }

    pub(crate) fn quitting(&self) -> bool {
        self.quit.load(Ordering::Acquire) != 0
    }

    /// The turn, and its number.
    pub(crate) fn turn(&self) -> (Turn, u64) {
        let number = self.turn.load(Ordering::Acquire);
        let turn = match number % 3 {
            0 => Turn::Run,
            1 => Turn::Pause,
            _ => Turn::Look,
        };
        (turn, number)
    }

    /// The next turn, once the first `count` have seen it.
    fn next(&self, count: usize, patience: Duration) -> Result<(), String> {
        let number = self.turn.fetch_add(1, Ordering::AcqRel) + 1;
        let start = Instant::now();
        for n in 0..count {
            while self.places[n].seen.load(Ordering::Acquire) < number {
                if start.elapsed() > patience {
                    return Err(format!("number {n} does not answer"));
                }
                sleep(POLL);
            }
        }
        Ok(())
    }

    /// Has all `count` compare their memory; how many pages that was, or what is wrong.
    pub(crate) fn check(&self, count: usize, patience: Duration) -> Result<u64, String> {
        let mut result = Ok(0);
        for _ in 0..3 {
            let step = self.next(count, patience);
            if result.is_ok() {
                result = step.and(result);
            }
        }
        let pages = self.places[..count].iter().map(|p| p.pages.load(Ordering::Acquire)).sum();
        let wrong: Vec<_> = (0..count).filter_map(|n| self.places[n].wrong(n)).collect();
        result?;
        if wrong.is_empty() { Ok(pages) } else { Err(wrong.join("; ")) }
    }
}

impl Place {
    /// Says that the turn was seen, and done.
    pub(crate) fn seen(&self, number: u64) {
        self.seen.store(number, Ordering::Release);
    }

    /// Whether that was said.
    pub(crate) fn has_seen(&self, number: u64) -> bool {
        self.seen.load(Ordering::Acquire) >= number
    }

    /// How many pages were as they should be, or what was not. The first word on it stays.
    pub(crate) fn report(&self, result: &Result<u64, String>) {
        match result {
            Ok(pages) => self.pages.store(*pages, Ordering::Relaxed),
            Err(text) if self.wrong.load(Ordering::Relaxed) == 0 => {
                let chunks = text.as_bytes().chunks(8).chain(std::iter::repeat(&[][..]));
                for (word, chunk) in self.text.iter().zip(chunks) {
                    let mut bytes = [0; 8];
                    bytes[..chunk.len()].copy_from_slice(chunk);
                    word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
                }
                self.wrong.store(1, Ordering::Release);
            }
            Err(_) => {}
        }
    }

    fn wrong(&self, n: usize) -> Option<String> {
        (self.wrong.load(Ordering::Acquire) != 0).then(|| {
            let words = self.text.iter().map(|word| word.load(Ordering::Relaxed).to_ne_bytes());
            let bytes: Vec<u8> = words.flatten().take_while(|byte| *byte != 0).collect();
            format!("number {n}: {}", String::from_utf8_lossy(&bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{self, Memory};

    fn board() -> &'static Board {
        let pages = size_of::<Board>().div_ceil(crate::pattern::PAGE);
        let flags = sys::PRIVATE | sys::ANONYMOUS;
        Memory::map(pages, sys::READ_WRITE, flags, -1).unwrap().shared()
    }

    /// One who sees every turn and says `result` when it looks.
    fn follow(board: &Board, n: usize, result: &Result<u64, String>) {
        let place = board.place(n);
        while !board.quitting() {
            let (turn, number) = board.turn();
            if turn == Turn::Look && !place.has_seen(number) {
                place.report(result);
            }
            place.seen(number);
            sleep(POLL);
        }
    }

    #[test]
    fn a_check_adds_up_pages_and_names_what_is_wrong() {
        let (patience, text) = (Duration::from_secs(20), "dense page 7 is zero".to_owned());
        for (second, expected) in [
            (Ok(4), Ok(7)),
            (Err(text), Err("number 1: dense page 7 is zero".to_owned())),
            (Err("x".repeat(1000)), Err(format!("number 1: {}", "x".repeat(TEXT * 8)))),
        ] {
            let board = board();
            std::thread::scope(|scope| {
                scope.spawn(|| follow(board, 0, &Ok(3)));
                scope.spawn(|| follow(board, 1, &second));
                let result = board.check(2, patience);
                board.quit();
                assert_eq!(result, expected);
            });
            assert_eq!(board.turn().0, Turn::Run);
        }
    }

    #[test]
    fn one_who_does_not_answer_is_named() {
        let board = board();
        let result = board.check(1, Duration::from_millis(5));
        assert_eq!(result, Err("number 0 does not answer".to_owned()));
        assert_eq!(board.turn().0, Turn::Run);
    }
}
