//! One who writes: the first thread of a process, with memory of every kind, or another one.

use std::cell::Cell;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::area::Area;
use crate::kinds::{Kind, MOST_CHANGING, make};
use crate::pattern::{Mark, PAGE, Random};
use crate::sys::{self, Memory};
use crate::turn::{Board, Place, Turn};

/// How often it looks whose turn it is.
const TICK: Duration = Duration::from_millis(1);
/// Pages of a thread's stack that are written.
const STACK: usize = 16;
/// Processes that live for a moment have numbers from here.
const SHORT_LIVED: u16 = 0x8000;
/// What a process that lives for a moment writes, in pages, and how long it lives.
const SHORT_PAGES: usize = 32;
const SHORT_LIFE: Duration = Duration::from_millis(100);
/// How often the kernel may refuse to move memory before that is a failure.
const REFUSALS: usize = 1000;

thread_local! {
    /// Must stay what it was set to.
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// Part of a stack.
#[repr(C, align(4096))]
struct Frame([u8; STACK * PAGE]);

pub(crate) struct Worker {
    board: &'static Board,
    place: &'static Place,
    number: usize,
    process: u16,
    generation: u64,
    random: Random,
    areas: Vec<Area>,
    next_area: u32,
    /// A process that lives for a moment.
    child: Option<i32>,
    failed: Option<String>,
}

impl Worker {
    /// One with place `number` on the board, in process `process`, and with areas that it inherited.
    pub(crate) fn new(
        board: &'static Board,
        number: usize,
        process: u16,
        areas: Vec<Area>,
    ) -> Self {
        Self {
            board,
            place: board.place(number),
            number,
            process,
            generation: 0,
            random: Random::new(number as u64),
            areas,
            next_area: (number as u32) << 20,
            child: None,
            failed: None,
        }
    }

    /// Makes and fills an area. A kind that is not to be had is noted on the board.
    pub(crate) fn make(&mut self, kind: Kind, pages: usize) {
        match self.try_make(kind, pages) {
            Ok(area) => self.areas.push(area),
            Err(error) => {
                self.board.missing.fetch_or(1 << kind as u64, Ordering::Relaxed);
                eprintln!("no {kind:?}: {error}");
            }
        }
    }

    fn try_make(&mut self, kind: Kind, pages: usize) -> io::Result<Area> {
        self.next_area += 1;
        let mut area = make(kind, self.next_area, pages)?;
        for page in (0..area.pages()).step_by(kind.stride()) {
            if kind == Kind::Guarded && page % 4 == 3 {
                area.toggle_guard(page)?;
            } else {
                let mark = self.next_mark();
                area.write(page, mark)?;
            }
        }
        Ok(area)
    }

    pub(crate) fn areas(&mut self) -> &mut Vec<Area> {
        &mut self.areas
    }

    fn next_mark(&mut self) -> Mark {
        self.generation += 1;
        Mark::new(self.process, self.generation)
    }

    /// Writes until all end, with part of its stack as one more area.
    pub(crate) fn run(mut self, writes: u64, events: u64) {
        let mut frame = Frame([0; STACK * PAGE]);
        self.next_area += 1;
        let memory = Memory::borrowed(&mut frame.0);
        let stack = Area::new(self.next_area, Kind::Stack, memory, STACK);
        self.areas.push(stack.expect("map the marks of the stack"));
        OWN.set(self.number as u64 + 1);
        let (mut writes, mut events) = (Pace::new(writes), Pace::new(events));
        while !self.board.quitting() && !sys::stopped() {
            let (turn, number) = self.board.turn();
            if turn == Turn::Look && !self.place.has_seen(number) {
                let result = self.verify(|_| true);
                self.place.report(&result);
            }
            self.place.seen(number);
            if turn == Turn::Run {
                self.work(writes.due(), events.due());
            }
            sleep(TICK);
        }
        while self.child.is_some_and(|pid| sys::ended(pid).is_none()) {
            sleep(TICK);
        }
        std::hint::black_box(&mut frame);
    }

    fn work(&mut self, writes: u64, events: u64) {
        let done = (0..writes)
            .try_for_each(|_| self.write_one())
            .and_then(|()| (0..events).try_for_each(|_| self.event()));
        if let Err(error) = done {
            self.fail(format!("the kernel refuses: {error}"));
        }
        self.place.writes.store(self.generation, Ordering::Relaxed);
        self.place.events.fetch_add(events, Ordering::Relaxed);
        if let Some(pid) = self.child
            && let Some(well) = sys::ended(pid)
        {
            self.child = None;
            if !well {
                let wrong = std::fs::read_to_string(self.last_words()).unwrap_or_default();
                self.fail(format!("a process that lived for a moment saw wrong memory: {wrong}"));
            }
        }
    }

    /// Where a process that lives for a moment says what it found.
    fn last_words(&self) -> PathBuf {
        std::env::temp_dir().join(format!("ferry-memory-wrong-{}", self.number))
    }

    fn fail(&mut self, text: String) {
        self.failed.get_or_insert(text);
    }

    /// Writes one page somewhere.
    fn write_one(&mut self) -> io::Result<()> {
        let n = self.random.below(self.areas.len());
        if self.areas[n].is_view() {
            return Ok(());
        }
        let stride = self.areas[n].kind().stride();
        let page = self.random.below(self.areas[n].pages().div_ceil(stride)) * stride;
        let mark = self.next_mark();
        self.areas[n].write(page, mark)
    }

    fn event(&mut self) -> io::Result<()> {
        let (name, done) = match self.random.below(5) {
            0 => ("free", self.free()),
            1 => ("replace", self.with(Kind::Changing, Self::replace)),
            2 => ("move", self.with(Kind::Changing, Self::relocate)),
            3 if self.board.guards_stay.load(Ordering::Relaxed) != 0 => ("", Ok(())),
            3 => (
                "guard",
                self.with(Kind::Guarded, |worker, n| {
                    let page = worker.random.below(worker.areas[n].pages());
                    worker.areas[n].toggle_guard(page)
                }),
            ),
            _ => ("fork", self.fork()),
        };
        done.map_err(|error| io::Error::other(format!("{name}: {error}")))
    }

    fn replace(&mut self, n: usize) -> io::Result<()> {
        let pages = 1 + self.random.below(MOST_CHANGING);
        // The old one goes first: the kernel may take its place for the new one.
        drop(self.areas.swap_remove(n));
        let area = self.try_make(Kind::Changing, pages)?;
        self.areas.push(area);
        Ok(())
    }

    /// Moves an area. Memory of which the kernel notes the writes in one part and not in another
    /// cannot be moved; a tracker must not make it so. It is counted, and tried again.
    fn relocate(&mut self, n: usize) -> io::Result<()> {
        let pages = 1 + self.random.below(MOST_CHANGING);
        for _ in 0..REFUSALS {
            match self.areas[n].remap(pages) {
                Err(error) if error.raw_os_error() == Some(sys::EFAULT) => {
                    self.board.refused.fetch_add(1, Ordering::Relaxed);
                    sleep(TICK);
                }
                done => return done,
            }
        }
        self.areas[n].remap(pages)
    }

    /// Does something with the first area of a kind, if there is one.
    fn with(
        &mut self,
        kind: Kind,
        what: impl FnOnce(&mut Self, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.areas.iter().position(|area| area.kind() == kind) {
            Some(n) => what(self, n),
            None => Ok(()),
        }
    }

    fn free(&mut self) -> io::Result<()> {
        let n = self.random.below(self.areas.len());
        if !self.areas[n].kind().can_be_freed() {
            return Ok(());
        }
        let pages = self.areas[n].pages();
        let start = self.random.below(pages);
        let end = (start + 1 + self.random.below(8)).min(pages);
        self.areas[n].free(start..end)
    }

    /// A process that shares all memory copy-on-write for a moment, writes some of it, and looks
    /// whether it has what it must have.
    fn fork(&mut self) -> io::Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        let child = sys::spawn(|| {
            self.process |= SHORT_LIVED;
            self.areas = self.areas.drain(..).filter_map(Area::in_child).collect();
            let start = Instant::now();
            for _ in 0..SHORT_PAGES {
                if self.write_one().is_err() {
                    return 2;
                }
                sleep(SHORT_LIFE / SHORT_PAGES as u32);
            }
            while self.board.turn().0 != Turn::Run && start.elapsed() < SHORT_LIFE * 10 {
                sleep(TICK);
            }
            // What is shared with its parent, that one may be writing.
            match self.verify(|area| !area.is_view()) {
                Ok(_) => 0,
                Err(wrong) => {
                    let _ = std::fs::write(self.last_words(), wrong);
                    1
                }
            }
        })?;
        self.child = Some(child);
        Ok(())
    }

    /// Compares areas; how many pages, or what is wrong.
    fn verify(&self, which: impl Fn(&Area) -> bool) -> Result<u64, String> {
        if let Some(text) = &self.failed {
            return Err(text.clone());
        }
        if OWN.get() != self.number as u64 + 1 {
            return Err(format!("a variable of its own is {} for a thread", OWN.get()));
        }
        self.areas.iter().filter(|area| which(area)).map(Area::verify).sum()
    }
}

/// How much is due by now at a rate.
pub(crate) struct Pace {
    rate: u64,
    last: Instant,
    /// What is due, in millionths.
    due: u64,
}

/// What is not made up for: the time a pause took.
const LONGEST: Duration = Duration::from_millis(50);

impl Pace {
    /// `rate` in units a second.
    pub(crate) fn new(rate: u64) -> Self {
        Self { rate, last: Instant::now(), due: 0 }
    }

    /// Units that are due since the last call.
    pub(crate) fn due(&mut self) -> u64 {
        let elapsed = self.last.elapsed();
        self.last += elapsed;
        self.add(elapsed)
    }

    fn add(&mut self, elapsed: Duration) -> u64 {
        let micros = elapsed.min(LONGEST).as_micros() as u64;
        self.due += micros * self.rate;
        let units = self.due / 1_000_000;
        self.due %= 1_000_000;
        units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_loses_no_fraction_and_does_not_make_up_for_a_pause() {
        let mut pace = Pace::new(1500);
        let total: u64 = (0..1000).map(|_| pace.add(Duration::from_micros(700))).sum();
        assert_eq!(total, 1050);
        assert_eq!(pace.add(Duration::from_secs(5)), 75);
    }
}
