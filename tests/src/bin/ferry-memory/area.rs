//! A piece of memory, and what every page of it must hold.

use std::io;
use std::ops::Range;

use crate::kinds::Kind;
use crate::pattern::{Mark, PAGE, Page, WORDS, ZERO};
use crate::sys::{self, Memory};

/// Who writes the file of [`Kind::File`].
const FILE: u16 = u16::MAX - 1;

/// One mapping.
pub(crate) struct Area {
    id: u32,
    kind: Kind,
    memory: Memory,
    /// The mark of every page, in a mapping of its own.
    marks: Memory,
    /// Made of all marks, to notice it when they were set back together with the pages.
    sum: u64,
    /// Another process's, seen here: it alone writes and knows the sum.
    view: bool,
}

impl Area {
    /// `most` is the largest number of pages it will ever have.
    pub(crate) fn new(id: u32, kind: Kind, memory: Memory, most: usize) -> io::Result<Self> {
        let sharing = if kind.is_shared() { sys::SHARED } else { sys::PRIVATE };
        let pages = (most * 8).div_ceil(PAGE);
        let marks = Memory::map(pages, sys::READ_WRITE, sharing | sys::ANONYMOUS, -1)?;
        Ok(Self { id, kind, memory, marks, sum: 0, view: false })
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn pages(&self) -> usize {
        self.memory.pages()
    }

    pub(crate) fn is_view(&self) -> bool {
        self.view
    }

    /// What is left of it in a child: none if it was not inherited.
    pub(crate) fn in_child(mut self) -> Option<Self> {
        if self.kind.is_inherited() {
            self.view |= self.kind.is_shared();
            return Some(self);
        }
        self.memory.forget();
        None
    }

    pub(crate) fn mark(&self, page: usize) -> Mark {
        Mark::from_word(self.marks.get(page))
    }

    /// Says what `page` holds from now on.
    pub(crate) fn set_mark(&mut self, page: usize, mark: Mark) {
        let old = self.mark(page);
        self.sum ^= old.part(self.id, page) ^ mark.part(self.id, page);
        self.marks.set(page, mark.word());
    }

    /// Writes `page`, unless it is a guard.
    pub(crate) fn write(&mut self, page: usize, mark: Mark) -> io::Result<()> {
        if self.mark(page) == Mark::GUARD {
            return Ok(());
        }
        let protection = self.kind.protection(page, self.pages());
        let closed = protection != sys::READ_WRITE;
        if closed {
            self.memory.protect(page..page + 1, sys::READ_WRITE)?;
        }
        self.memory.write(page, &mark.fill(self.id, page));
        if closed {
            self.memory.protect(page..page + 1, protection)?;
        }
        self.set_mark(page, mark);
        Ok(())
    }

    /// Gives the pages back: they are as if nobody had written them.
    pub(crate) fn free(&mut self, range: Range<usize>) -> io::Result<()> {
        self.memory.advise(range.clone(), sys::DONTNEED)?;
        range.for_each(|page| self.set_mark(page, Mark::NONE));
        Ok(())
    }

    /// Makes `page` a guard, or an empty page again.
    pub(crate) fn toggle_guard(&mut self, page: usize) -> io::Result<()> {
        let (advice, mark) = match self.mark(page) {
            Mark::GUARD => (sys::GUARD_REMOVE, Mark::NONE),
            _ => (sys::GUARD_INSTALL, Mark::GUARD),
        };
        self.memory.advise(page..page + 1, advice)?;
        self.set_mark(page, mark);
        Ok(())
    }

    /// Moves it, with another size.
    pub(crate) fn remap(&mut self, pages: usize) -> io::Result<()> {
        let before = self.pages();
        self.memory.remap(pages)?;
        for page in pages..before {
            self.set_mark(page, Mark::NONE);
        }
        Ok(())
    }

    /// Compares every page; how many there were, or the first that is wrong.
    pub(crate) fn verify(&self) -> Result<u64, String> {
        let closed = self.kind == Kind::NoAccess;
        if closed {
            if self.memory.accessible(0) {
                return Err(self.about(0, "can be read"));
            }
            self.memory.protect(0..self.pages(), sys::READ).map_err(|e| e.to_string())?;
        }
        let result = self.verify_pages();
        if closed {
            self.memory.protect(0..self.pages(), sys::NONE).map_err(|e| e.to_string())?;
        }
        result
    }

    fn verify_pages(&self) -> Result<u64, String> {
        let mut sum = 0;
        for page in 0..self.pages() {
            let mark = self.mark(page);
            sum ^= mark.part(self.id, page);
            if self.kind == Kind::Guarded && self.memory.accessible(page) == (mark == Mark::GUARD) {
                return Err(self.about(page, "is a guard or is none, against its mark"));
            }
            if mark == Mark::GUARD {
                continue;
            }
            let found = self.memory.read(page);
            let wanted = match (mark, self.kind) {
                (Mark::NONE, Kind::File) => file_page(page),
                (Mark::NONE, _) => ZERO,
                _ => mark.fill(self.id, page),
            };
            if found != wanted {
                return Err(self.about(page, &difference(&found, &wanted)));
            }
        }
        if sum != self.sum && !self.view {
            return Err(self.about(0, "and others have marks that were set back"));
        }
        Ok(self.pages() as u64)
    }

    fn about(&self, page: usize, what: &str) -> String {
        let word = self.mark(page).word();
        format!("{:?} area {} page {page} (mark {word:x}) {what}", self.kind, self.id)
    }
}

/// What the file of [`Kind::File`] holds.
pub(crate) fn file_page(page: usize) -> Page {
    Mark::new(FILE, page as u64 + 1).fill(0, page)
}

fn difference(found: &Page, wanted: &Page) -> String {
    let words = (0..WORDS).filter(|n| found[*n] != wanted[*n]);
    let first = words.clone().next().unwrap_or(0);
    match *found == ZERO {
        true => "is zero".to_owned(),
        false => format!("differs in {} words from word {first} on", words.count()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{make, remove_files};

    #[test]
    fn every_kind_holds_what_its_marks_say_and_notices_a_changed_byte() {
        for kind in Kind::ALL {
            let mut area = match make(kind, 3, 32) {
                Ok(area) => area,
                Err(e) => {
                    println!("skipped: every_kind_holds_what_its_marks_say: {kind:?}: {e}");
                    continue;
                }
            };
            for page in 0..area.pages() {
                area.write(page, Mark::new(1, page as u64 + 1)).unwrap();
            }
            assert_eq!(area.verify(), Ok(area.pages() as u64), "{kind:?}");
            let page = area.pages() - 1;
            area.memory.protect(0..area.pages(), sys::READ_WRITE).unwrap();
            let mut changed = area.memory.read(page);
            changed[WORDS - 1] ^= 1 << 63;
            area.memory.write(page, &changed);
            let wrong = area.verify_pages().unwrap_err();
            assert!(wrong.contains("differs in 1 words from word 511"), "{wrong}");
        }
        remove_files(std::process::id());
    }

    #[test]
    fn marks_that_were_set_back_with_their_pages_are_noticed() {
        let mut area = make(Kind::Dense, 1, 4).unwrap();
        area.write(0, Mark::new(1, 1)).unwrap();
        let (old_page, old_mark) = (area.memory.read(0), area.marks.get(0));
        area.write(0, Mark::new(1, 2)).unwrap();
        area.memory.write(0, &old_page);
        area.marks.set(0, old_mark);
        assert!(area.verify().unwrap_err().contains("set back"));
    }

    #[test]
    fn freed_moved_and_guarded_pages_are_as_their_marks_say() {
        let mut area = make(Kind::Changing, 1, 16).unwrap();
        for page in 0..16 {
            area.write(page, Mark::new(1, 1)).unwrap();
        }
        area.free(2..5).unwrap();
        assert_eq!((area.memory.read(3), area.verify()), (ZERO, Ok(16)));
        area.remap(40).unwrap();
        assert_eq!(area.verify(), Ok(40));
        area.remap(3).unwrap();
        assert_eq!(area.verify(), Ok(3));
        let Ok(mut guarded) = make(Kind::Guarded, 2, 8) else {
            println!("skipped: freed_moved_and_guarded_pages: the kernel has no guard pages");
            return;
        };
        guarded.toggle_guard(1).unwrap();
        assert_eq!(guarded.verify(), Ok(8));
        guarded.memory.advise(1..2, sys::GUARD_REMOVE).unwrap();
        assert!(guarded.verify().unwrap_err().contains("page 1 "));
    }
}
