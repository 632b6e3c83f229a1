//! Images of memory as what has changed since their pages were read.
//!
//! CRIU carries some memory itself: changed pages of private file mappings, locked pages. Most of them
//! stay as they are from one second to the next. They are read and sent while the container runs; when
//! the image is there, it crosses as a list of which of those pages it consists of, with the others in
//! full.
//!
//! ```text
//!   patch   kind u8 · count u32 · start u32   [ · count pages ]      little-endian, until the image is whole
//!           0: `count` known pages from page `start` on     1: `count` pages that follow
//!           2: the last `count` bytes, which follow
//! ```

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use twox_hash::XxHash3_128;

use super::areas::Area;
use super::reader::read_pages;
use super::scan::Pagemap;

const PAGE: usize = super::PAGE as usize;

/// The most that is known, bytes.
pub const MOST: u64 = 16 << 20;

const KNOWN: u8 = 0;
const NEW: u8 = 1;
const TAIL: u8 = 2;
const HEADER: usize = 9;

/// Pages that the other side has too.
#[derive(Debug, Default)]
pub struct Known {
    bytes: Vec<u8>,
    index: HashMap<u128, u32>,
}

impl Known {
    /// Reads what CRIU would carry of the private memory of process `pid`, which runs.
    ///
    /// # Errors
    /// When it cannot be looked into.
    pub fn gather(&mut self, pid: i32, areas: &[Area]) -> io::Result<()> {
        let carried = |area: &&Area| area.private() && !area.hideable() && area.anonymous > 0;
        let mut ranges = Vec::new();
        let pagemap = Pagemap::open(pid)?;
        for area in areas.iter().filter(carried) {
            pagemap.own(area.range(), &mut ranges)?;
        }
        let mut room = MOST.saturating_sub(self.bytes.len() as u64);
        for range in &mut ranges {
            range.end = range.end.min(range.start + room);
            room -= range.end - range.start;
        }
        let pages = std::sync::Mutex::new(self);
        read_pages(pid, &ranges, 1, |_: Range<u64>, bytes| {
            if let Ok(mut known) = pages.lock() {
                bytes.chunks_exact(PAGE).for_each(|page| known.add(page));
            }
            Ok(())
        })?;
        Ok(())
    }

    fn add(&mut self, page: &[u8]) {
        let number = (self.bytes.len() / PAGE) as u32;
        let first = *self.index.entry(XxHash3_128::oneshot(page)).or_insert(number);
        if first == number {
            self.bytes.extend_from_slice(page);
        }
    }

    /// What the other side must have.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How `image` is made of it.
    pub fn patch(&self, image: &[u8]) -> Vec<u8> {
        let mut patch = Vec::new();
        let (pages, tail) = image.as_chunks::<PAGE>();
        let mut at = 0;
        while at < pages.len() {
            let found = self.find(&pages[at]);
            let same = |n: usize| match (found, pages.get(at + n)) {
                (Some(first), Some(page)) => self.page(first + n as u32) == Some(page),
                (None, Some(page)) => self.find(page).is_none(),
                (_, None) => false,
            };
            let count = (1..).take_while(|n| same(*n)).count() + 1;
            match found {
                Some(first) => header(&mut patch, KNOWN, count, first),
                None => {
                    header(&mut patch, NEW, count, 0);
                    patch.extend(pages[at..at + count].as_flattened());
                }
            }
            at += count;
        }
        if !tail.is_empty() {
            header(&mut patch, TAIL, tail.len(), 0);
            patch.extend(tail);
        }
        patch
    }

    fn page(&self, number: u32) -> Option<&[u8; PAGE]> {
        self.bytes.as_chunks::<PAGE>().0.get(number as usize)
    }

    /// Compared, not only looked up: a hash is no proof.
    fn find(&self, page: &[u8; PAGE]) -> Option<u32> {
        let number = *self.index.get(&XxHash3_128::oneshot(page))?;
        (self.page(number) == Some(page)).then_some(number)
    }
}

fn header(patch: &mut Vec<u8>, kind: u8, count: usize, start: u32) {
    patch.push(kind);
    patch.extend((count as u32).to_le_bytes());
    patch.extend(start.to_le_bytes());
}

/// Makes the image of `patch` from what is `known`.
///
/// # Errors
/// `InvalidData` when the patch is damaged or is about other pages; when `out` fails.
pub fn apply(known: &[u8], patch: &[u8], out: &mut impl io::Write) -> io::Result<()> {
    let mut rest = patch;
    while !rest.is_empty() {
        let (kind, length, start);
        (kind, length, start, rest) = record(rest).ok_or_else(damaged)?;
        let from = if kind == KNOWN { known } else { rest };
        let bytes = start.checked_add(length).and_then(|end| from.get(start..end));
        out.write_all(bytes.ok_or_else(damaged)?)?;
        if kind != KNOWN {
            rest = &rest[length..];
        }
    }
    Ok(())
}

/// Kind, how many bytes, and from where.
fn record(patch: &[u8]) -> Option<(u8, usize, usize, &[u8])> {
    let (header, rest) = patch.split_first_chunk::<HEADER>()?;
    let number = |at: usize| {
        let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        u32::from_le_bytes(bytes) as usize
    };
    let (count, start) = (number(1), number(5));
    match header[0] {
        KNOWN => Some((KNOWN, count.checked_mul(PAGE)?, start.checked_mul(PAGE)?, rest)),
        NEW => Some((NEW, count.checked_mul(PAGE)?, 0, rest)),
        TAIL if count < PAGE => Some((TAIL, count, 0, rest)),
        _ => None,
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a patch of an image is damaged")
}

#[cfg(test)]
#[allow(unsafe_code)] // maps a file
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn pages(numbers: &[u8]) -> Vec<u8> {
        numbers.iter().flat_map(|n| [*n; PAGE]).collect()
    }

    fn known(numbers: &[u8]) -> Known {
        let mut known = Known::default();
        pages(numbers).chunks_exact(PAGE).for_each(|page| known.add(page));
        known
    }

    fn applied(known: &[u8], patch: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        apply(known, patch, &mut out).map(|()| out)
    }

    #[test]
    fn an_image_comes_out_as_it_was_and_takes_what_is_new() {
        let known = known(&[1, 2, 3, 2, 4]);
        assert_eq!(known.bytes(), pages(&[1, 2, 3, 4]), "equal pages are kept once");
        for (image, records, new) in [
            (pages(&[]), 0, 0),
            (pages(&[1, 2, 3, 4]), 1, 0),
            (pages(&[4, 1, 2, 2]), 3, 0),
            (pages(&[9, 8, 1, 9]), 3, 3),
            ([pages(&[3]), vec![7; 100]].concat(), 2, 0),
            (vec![7; 100], 1, 0),
        ] {
            let patch = known.patch(&image);
            assert_eq!(applied(known.bytes(), &patch).unwrap(), image);
            assert_eq!(patch.len(), records * HEADER + new * PAGE + image.len() % PAGE);
        }
        let nothing = Known::default();
        let image = pages(&[1, 2]);
        assert_eq!(applied(&[], &nothing.patch(&image)).unwrap(), image);
    }

    #[test]
    fn a_page_with_the_hash_of_another_is_sent() {
        let mut known = known(&[1]);
        known.index.insert(XxHash3_128::oneshot(&[5; PAGE]), 0);
        let image = pages(&[5]);
        assert_eq!(applied(known.bytes(), &known.patch(&image)).unwrap(), image);
    }

    #[test]
    fn damaged_patches_are_refused() {
        let known = known(&[1, 2]);
        let patch = known.patch(&[pages(&[1, 2, 3]), vec![1; 9]].concat());
        let good = applied(known.bytes(), &patch).unwrap();
        for cut in 1..patch.len() {
            // A whole number of records is one of a shorter image.
            if let Ok(bytes) = applied(known.bytes(), &patch[..cut]) {
                assert!(good.starts_with(&bytes) && bytes.len() < good.len());
            }
        }
        assert!(applied(&[], &patch).is_err(), "nothing is known");
        for kind in [KNOWN, NEW, TAIL, 3, 255] {
            let mut huge = vec![kind];
            huge.extend([0xff; 8]);
            assert!(applied(known.bytes(), &huge).is_err(), "{kind}");
        }
    }

    #[test]
    fn the_pages_that_criu_would_carry_are_known() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pages(&[1; 8])).unwrap();
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_file().as_raw_fd());
        // SAFETY: the kernel chooses where; the memory is only touched below.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), 8 * PAGE, protection, libc::MAP_PRIVATE, fd, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: eight pages are mapped there, for writing.
        let memory = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), 8 * PAGE) };
        // One only looked at is the file's.
        assert_eq!(memory[0], 1);
        memory[2 * PAGE..3 * PAGE].fill(0xa7);
        memory[5 * PAGE..6 * PAGE].fill(0xa8);
        let pid = std::process::id().cast_signed();
        let areas = super::super::areas::Layout::read(pid).unwrap().areas;
        let start = memory.as_ptr() as u64;
        let area = areas.into_iter().find(|area| area.start == start).unwrap();
        let mut known = Known::default();
        known.gather(pid, &[area]).unwrap();
        assert_eq!(known.bytes(), pages(&[0xa7, 0xa8]));
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(at, 8 * PAGE) };
    }
}
