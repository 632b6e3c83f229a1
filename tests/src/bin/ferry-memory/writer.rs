//! Writes a working set at a rate.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Options;
use crate::pattern::{PAGE, Page, Random, WORDS, fill, mix};
use crate::server;
use crate::sys::{self, Memory};
use crate::worker::Pace;

const TICK: Duration = Duration::from_millis(1);

/// What was written so far.
static PAGES: AtomicU64 = AtomicU64::new(0);
/// The longest time between two writes since it was last asked for, in microseconds.
static GAP: AtomicU64 = AtomicU64::new(0);

pub(crate) fn run(options: &Options) -> Result<(), String> {
    let pages = options.megabytes * (1 << 20) / PAGE;
    let memory = Memory::map(pages, sys::READ_WRITE, sys::PRIVATE | sys::ANONYMOUS, -1)
        .map_err(|e| format!("map {} MB: {e}", options.megabytes))?;
    let content = if options.repetitive { repetitive } else { fill };
    (0..pages).for_each(|page| memory.write(page, &content(page as u64)));
    let rate = options.rate * (1 << 20) / PAGE as u64;
    std::thread::spawn(move || write(&memory, rate, content));
    let last = std::sync::Mutex::new((Instant::now(), 0));
    let answer = move |question: &str| {
        if question != "stats" {
            return "say stats".to_owned();
        }
        let Ok(mut last) = last.lock() else { return "broken".to_owned() };
        let (elapsed, written) = (last.0.elapsed(), PAGES.load(Ordering::Relaxed));
        let answer = stats(elapsed, written - last.1, written, GAP.swap(0, Ordering::Relaxed));
        *last = (last.0 + elapsed, written);
        answer
    };
    server::run(options.port, answer, || false)
}

fn write(memory: &Memory, rate: u64, content: fn(u64) -> Page) {
    let (mut pace, mut random) = (Pace::new(rate), Random::new(1));
    let (mut number, mut last) = (memory.pages() as u64, Instant::now());
    loop {
        for _ in 0..pace.due() {
            number += 1;
            memory.write(random.below(memory.pages()), &content(number));
            PAGES.fetch_add(1, Ordering::Relaxed);
        }
        sleep(TICK);
        let gap = last.elapsed();
        last += gap;
        GAP.fetch_max(gap.as_micros() as u64, Ordering::Relaxed);
    }
}

/// A page that a compressor makes small.
fn repetitive(key: u64) -> Page {
    let words = [mix(key), 0, key, 0];
    std::array::from_fn(|n| if n < WORDS / 2 { words[n % 4] } else { 0 })
}

/// `pages` in `elapsed`, since the last answer.
fn stats(elapsed: Duration, pages: u64, total: u64, gap: u64) -> String {
    let megabytes = |pages: u64| (pages * PAGE as u64) as f64 / f64::from(1 << 20);
    format!(
        "{{\"seconds\":{:.3},\"mb_per_s\":{:.1},\"total_mb\":{:.1},\"longest_gap_ms\":{:.1}}}",
        elapsed.as_secs_f64(),
        megabytes(pages) / elapsed.as_secs_f64(),
        megabytes(total),
        gap as f64 / 1000.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_that_since_the_last_answer() {
        let text = stats(Duration::from_secs(2), 25_600, 51_200, 1500);
        assert_eq!(
            text,
            r#"{"seconds":2.000,"mb_per_s":50.0,"total_mb":200.0,"longest_gap_ms":1.5}"#
        );
    }

    #[test]
    fn repetitive_pages_differ_and_repeat_themselves() {
        assert_ne!(repetitive(1), repetitive(2));
        assert_eq!(repetitive(1)[..4], repetitive(1)[4..8]);
    }
}
