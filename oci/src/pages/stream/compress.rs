//! Whether compression pays: decided by measuring, not by a guess about the network.
//!
//! ```text
//!   raw    1 byte takes   max(1 / link,     1 / read)             the slower of link and CPU decides
//!   zstd   1 byte takes   max(ratio / link, 1 / read + 1 / zstd)
//! ```
//! The link's rate is what was written over the time that writing blocked, and is believed only when
//! writing blocked for a good part of the time. Looked at again every 64 MB; the first windows are
//! shorter. Switching on needs a gain of a quarter, switching off its loss.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Compression level: 1 is what a fast network still gains from.
pub(super) const LEVEL: i32 = 1;
/// Plain bytes between two decisions: from the first to the largest.
const WINDOWS: (u64, u64) = (4 << 20, 64 << 20);
/// Part of the time that writing has to block for before the link is the bottleneck.
const BLOCKED: f64 = 0.2;
/// While raw, one batch of this many is compressed to see.
const SAMPLE: u64 = 16;
/// Gain at which compression begins, and below which it ends.
const GAIN: (f64, f64) = (1.25, 1.05);
/// Windows with compression and without blocking after which the link is measured again.
const AGAIN: u32 = 8;

/// Whether pages are compressed on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// When it makes the whole faster.
    #[default]
    Auto,
    /// Never.
    Never,
    /// Whenever a batch gets smaller.
    Always,
}

/// What was measured since the last time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured {
    /// Plain bytes of batches.
    pub(super) plain: u64,
    /// Bytes written.
    pub(super) wire: u64,
    /// Time spent in writing.
    pub(super) writing: Duration,
    /// CPU time spent in reading and hashing.
    pub(super) reading: Duration,
    /// Bytes that were compressed, and what became of them.
    pub(super) packed: (u64, u64),
    /// CPU time spent in compressing.
    pub(super) packing: Duration,
}

impl Measured {
    pub(super) fn add(&mut self, other: &Self) {
        self.plain += other.plain;
        self.wire += other.wire;
        self.writing += other.writing;
        self.reading += other.reading;
        self.packed = (self.packed.0 + other.packed.0, self.packed.1 + other.packed.1);
        self.packing += other.packing;
    }
}

/// Decides, batch by batch.
#[derive(Debug)]
pub(super) struct Chooser {
    mode: Compression,
    /// CPUs that may work.
    cpus: f64,
    on: bool,
    blocked: bool,
    link: Option<f64>,
    window: Measured,
    length: u64,
    since: Option<Duration>,
    batches: u64,
    unblocked: u32,
}

impl Chooser {
    pub(super) fn new(mode: Compression, cpus: f64) -> Self {
        Self {
            mode,
            cpus,
            on: false,
            blocked: false,
            link: None,
            window: Measured::default(),
            length: WINDOWS.0,
            since: None,
            batches: 0,
            unblocked: 0,
        }
    }

    /// Whether to compress the next batch. `now` is the time since the stream began, `cpus` how many
    /// may work for it.
    pub(super) fn next(&mut self, last: &Measured, now: Duration, cpus: f64) -> bool {
        self.cpus = cpus;
        let since = *self.since.get_or_insert(now);
        self.window.add(last);
        self.batches += 1;
        if self.window.plain >= self.length {
            self.decide(now.saturating_sub(since).as_secs_f64());
            self.since = Some(now);
            self.window = Measured::default();
            self.length = (self.length * 2).min(WINDOWS.1);
        }
        match self.mode {
            Compression::Never => false,
            Compression::Always => true,
            Compression::Auto => self.on || (self.blocked && self.batches.is_multiple_of(SAMPLE)),
        }
    }

    /// A round has begun after a pause that is no measure of anything.
    pub(super) fn resume(&mut self) {
        self.since = None;
        self.window = Measured::default();
    }

    /// `wall` seconds have passed in the window.
    fn decide(&mut self, wall: f64) {
        let window = &self.window;
        let writing = window.writing.as_secs_f64();
        self.blocked = writing > BLOCKED * wall;
        if self.blocked && writing > 0.0 {
            self.link = Some(window.wire as f64 / writing);
            self.unblocked = 0;
        } else if self.on {
            // Compressed, the link may have room: how much only plain pages tell.
            self.unblocked += 1;
            if self.unblocked == AGAIN {
                (self.on, self.unblocked, self.length) = (false, 0, WINDOWS.0);
                return;
            }
        } else {
            self.link = None;
        }
        let (Some(link), true) = (self.link, window.packed.0 > 0) else {
            self.on &= self.link.is_some();
            return;
        };
        let ratio = window.packed.1 as f64 / window.packed.0 as f64;
        let rate =
            |bytes: u64, time: Duration| bytes as f64 * self.cpus / time.as_secs_f64().max(1e-9);
        let read = rate(window.plain, window.reading);
        let pack = rate(window.packed.0, window.packing);
        let gain = gain(link, read, pack, ratio);
        self.on = gain > if self.on { GAIN.1 } else { GAIN.0 };
    }
}

/// How much faster compressed pages go than plain ones. Rates in bytes per second.
fn gain(link: f64, read: f64, pack: f64, ratio: f64) -> f64 {
    let raw = (1.0 / link).max(1.0 / read);
    let packed = (ratio / link).max(1.0 / read + 1.0 / pack);
    raw / packed
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: f64 = 1e6;

    #[test]
    fn a_slow_link_gains_and_a_fast_one_does_not() {
        assert!(gain(12.5 * MB, 2000.0 * MB, 400.0 * MB, 0.4) > 2.0);
        assert!(gain(1250.0 * MB, 2000.0 * MB, 800.0 * MB, 0.4) < 1.0);
        assert!(gain(12.5 * MB, 2000.0 * MB, 400.0 * MB, 1.0) <= 1.0);
    }

    /// Sends `mb` megabytes over a simulated link and gives how much of it was compressed.
    fn simulate(chooser: &mut Chooser, mb: u64, link: f64, ratio: f64) -> f64 {
        let (mut now, mut packed, mut last) = (Duration::ZERO, 0, Measured::default());
        if let Some(since) = chooser.since {
            now = since;
        }
        let batch = 256 << 10;
        for _ in 0..mb * 4 {
            let pack = chooser.next(&last, now, 1.0);
            packed += u64::from(pack);
            let wire = if pack { (batch as f64 * ratio) as u64 } else { batch };
            let seconds = |bytes: u64, rate: f64| Duration::from_secs_f64(bytes as f64 / rate);
            let reading = seconds(batch, 2000.0 * MB);
            let packing = if pack { seconds(batch, 400.0 * MB) } else { Duration::ZERO };
            // What the CPU does the link does not wait for.
            let writing = seconds(wire, link).saturating_sub(reading + packing);
            now += reading + packing + writing;
            let packed = if pack { (batch, wire) } else { (0, 0) };
            last = Measured { plain: batch, wire, writing, reading, packed, packing };
        }
        packed as f64 / (mb * 4) as f64
    }

    #[test]
    fn compression_begins_on_a_slow_link_and_stays() {
        let mut chooser = Chooser::new(Compression::Auto, 1.0);
        simulate(&mut chooser, 64, 50.0 * MB, 0.4);
        assert!(simulate(&mut chooser, 2000, 50.0 * MB, 0.4) > 0.95);
    }

    #[test]
    fn a_fast_link_and_pages_that_do_not_compress_go_plain() {
        let mut chooser = Chooser::new(Compression::Auto, 1.0);
        assert!(simulate(&mut chooser, 2000, 5000.0 * MB, 0.4) < 0.01);
        let mut chooser = Chooser::new(Compression::Auto, 1.0);
        assert!(simulate(&mut chooser, 2000, 50.0 * MB, 1.0) < 0.1);
    }

    #[test]
    fn compression_ends_when_the_link_gets_fast() {
        let mut chooser = Chooser::new(Compression::Auto, 1.0);
        simulate(&mut chooser, 500, 50.0 * MB, 0.4);
        assert!(chooser.on);
        simulate(&mut chooser, 1500, 5000.0 * MB, 0.4);
        assert!(simulate(&mut chooser, 500, 5000.0 * MB, 0.4) < 0.05);
    }

    #[test]
    fn what_was_asked_for_is_done() {
        let mut never = Chooser::new(Compression::Never, 1.0);
        assert_eq!(simulate(&mut never, 100, MB, 0.1), 0.0);
        let mut always = Chooser::new(Compression::Always, 1.0);
        assert_eq!(simulate(&mut always, 100, 5000.0 * MB, 0.9), 1.0);
    }
}
