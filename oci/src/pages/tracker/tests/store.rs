//! A store as a reader of the rounds keeps it, and the comparison with the memory itself, which uses
//! nothing that the tracker uses: the words of the pagemap, the flags of the page frames, and
//! `/proc/PID/mem`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use super::super::Round;
use crate::pages::PAGE;
use crate::pages::areas::Layout;
use crate::pages::reader::read_pages;
use crate::pages::scan::Entry;

/// `KPF_ZERO_PAGE`: the frame is the zero page, or the huge one.
const ZERO_PAGE: u64 = 1 << 24;

/// Pages by process and address.
#[derive(Default)]
pub(super) struct Store(HashMap<u32, BTreeMap<u64, Vec<u8>>>);

impl Store {
    /// Does what a round says. Gives the pages that could not be read, by process.
    pub(super) fn apply(&mut self, round: &Round) -> Vec<(i32, Vec<Range<u64>>)> {
        let mut missing = Vec::new();
        for changes in &round.processes {
            let pages = self.0.entry(changes.space).or_default();
            for range in &changes.absent {
                for page in range.clone().step_by(PAGE as usize) {
                    pages.remove(&page);
                }
            }
            if changes.exited {
                self.0.remove(&changes.space);
                continue;
            }
            let read = Mutex::new(Vec::new());
            let done = read_pages(changes.pid, &changes.written, 2, |range, bytes| {
                read.lock().unwrap().push((range.start, bytes.to_vec()));
                Ok(())
            });
            for (start, bytes) in read.into_inner().unwrap() {
                for (at, page) in bytes.chunks(PAGE as usize).enumerate() {
                    pages.insert(start + at as u64 * PAGE, page.to_vec());
                }
            }
            let done = done.unwrap();
            if !done.missing.is_empty() {
                missing.push((changes.pid, done.missing));
            }
        }
        missing
    }

    /// Compares every page of the processes, which stand still. Gives how many are stored.
    pub(super) fn assert_equal(&self, pids: &[i32]) -> u64 {
        let mut total = 0;
        let spaces: Vec<u32> = pids.iter().map(|pid| pid.unsigned_abs()).collect();
        for space in self.0.keys() {
            assert!(spaces.contains(space), "the store has pages of {space}, which is gone");
        }
        for pid in pids {
            let empty = BTreeMap::new();
            let stored = self.0.get(&pid.unsigned_abs()).unwrap_or(&empty);
            let mut seen = 0;
            for range in Layout::read(*pid).unwrap().hideable() {
                seen += compare(*pid, range, stored);
            }
            // A page outside of all hideable ranges would be one too many.
            assert_eq!(seen, stored.len() as u64, "{pid}: pages that are stored and do not exist");
            total += seen;
        }
        total
    }
}

/// Compares one range; gives how many pages of it are stored.
fn compare(pid: i32, range: Range<u64>, stored: &BTreeMap<u64, Vec<u8>>) -> u64 {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let flags = File::open("/proc/kpageflags").unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut words = vec![0u8; ((range.end - range.start) / PAGE * 8) as usize];
    pagemap.read_exact_at(&mut words, range.start / PAGE * 8).unwrap();
    let mut exist = 0;
    let mut real = vec![0u8; PAGE as usize];
    for (number, word) in words.chunks_exact(8).enumerate() {
        let page = range.start + number as u64 * PAGE;
        let entry = Entry(u64::from_ne_bytes(word.try_into().unwrap()));
        let mut kind = [0u8; 8];
        if let Some(frame) = entry.frame() {
            flags.read_exact_at(&mut kind, frame * 8).unwrap();
        }
        let is_zero = u64::from_ne_bytes(kind) & ZERO_PAGE != 0;
        let copy = stored.get(&page);
        if is_zero && let Some(copy) = copy {
            // A huge page that is split under pressure has the zero page for its pages of zeros.
            assert!(copy.iter().all(|b| *b == 0), "{pid}: {page:x} is zeros ({entry:x?})");
            exist += 1;
            continue;
        }
        if !entry.exists() || entry.guard() || is_zero {
            assert!(copy.is_none(), "{pid}: {page:x} is stored and does not exist ({entry:x?})");
            continue;
        }
        memory.read_exact_at(&mut real, page).unwrap();
        let Some(copy) = copy else {
            // khugepaged fills holes with zeros, of a process that stands still as well.
            let zeros = real.iter().all(|b| *b == 0);
            assert!(zeros, "{pid}: {page:x} is not stored ({entry:x?})");
            continue;
        };
        exist += 1;
        assert!(*copy == real, "{pid}: {page:x} differs ({entry:x?})");
    }
    exist
}
