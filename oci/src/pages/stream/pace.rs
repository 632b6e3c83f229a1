//! How fast pre-copy may go: a bandwidth in bytes per second, and what CPU time others leave.
//!
//! The container must not notice that it is copied. A raised nice value alone does not give that:
//! across cgroups the kernel shares by group, whatever the nice values inside. So the workers look
//! at how much CPU time of the host is left over, and sleep between slices to use no more than that,
//! within bounds: enough that the migration ends, and not so much that caches and memory are busy.

use std::fs;
use std::time::{Duration, Instant};

/// How often the host's idle time is looked at. The kernel counts it in ticks of 10 ms.
const LOOK: Duration = Duration::from_millis(100);
/// What is left to others of the idle time, CPUs.
const SPARE: f64 = 0.1;
/// Idle time below which somebody is likely waiting for a CPU, CPUs.
const BUSY: f64 = 0.04;
/// What a first round begins with, CPUs, until it is known what is left over.
const FIRST: f64 = 0.25;
/// Shortest sleep: shorter ones are added up.
const NAP: Duration = Duration::from_millis(1);

/// A bandwidth: bytes are paid for after they were written.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// `rate` is in bytes per second.
    pub(super) fn new(rate: u64, now: Instant) -> Self {
        Self { rate: rate.max(1) as f64, tokens: 0.0, filled: now }
    }

    /// Pays for `bytes`. How long to wait before the next ones.
    pub(super) fn pay(&mut self, bytes: usize, now: Instant) -> Duration {
        let gained = now.saturating_duration_since(self.filled).as_secs_f64() * self.rate;
        // What was not used is kept for 50 ms: a stall is caught up, an idle hour is not.
        self.tokens = (self.tokens + gained).min(self.rate * 0.05) - bytes as f64;
        self.filled = now;
        Duration::from_secs_f64((-self.tokens / self.rate).max(0.0))
    }
}

/// How many CPUs pre-copy may use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Restraint {
    /// Used even when others want them all, so that the migration ends.
    pub least: f64,
    /// Never used more than. A copy on the other half of a core, or through the same cache, slows a
    /// container down on an idle host too.
    pub most: f64,
}

/// What part of one CPU each worker uses.
#[derive(Debug)]
pub(super) struct Share {
    restraint: Restraint,
    workers: f64,
    /// CPUs for all workers.
    cpus: f64,
    /// CPU time used since the last look.
    used: Duration,
    looked: Instant,
    idle: Option<f64>,
}

impl Share {
    pub(super) fn new(restraint: Restraint, now: Instant) -> Self {
        let least = restraint.least.max(0.001);
        let restraint = Restraint { least, most: restraint.most.max(least) };
        let cpus = FIRST.clamp(restraint.least, restraint.most);
        Self { restraint, workers: 1.0, cpus, used: Duration::ZERO, looked: now, idle: idle() }
    }

    /// A round begins, with `workers` threads.
    pub(super) fn resume(&mut self, workers: usize, now: Instant) {
        self.workers = workers as f64;
        // Short rounds that follow each other are looked at together.
        if now.saturating_duration_since(self.looked) > 10 * LOOK {
            (self.idle, self.looked, self.used) = (idle(), now, Duration::ZERO);
        }
    }

    /// CPUs that the workers may use now.
    pub(super) fn cpus(&self) -> f64 {
        self.cpus.min(self.workers)
    }

    /// Counts a slice of work. How long the worker is to rest after it.
    pub(super) fn worked(&mut self, work: Duration, now: Instant) -> Duration {
        self.used += work;
        let since = now.saturating_duration_since(self.looked);
        if since >= LOOK {
            let idle = idle();
            if let (Some(before), Some(idle)) = (self.idle, idle) {
                self.adjust((idle - before) / since.as_secs_f64(), since);
            }
            (self.idle, self.looked, self.used) = (idle, now, Duration::ZERO);
        }
        work.mul_f64(self.workers / self.cpus() - 1.0)
    }

    /// `idle` is in CPUs.
    fn adjust(&mut self, idle: f64, since: Duration) {
        let used = self.used.as_secs_f64() / since.as_secs_f64();
        let cpus = if idle < BUSY { self.cpus * 0.6 } else { idle + used - SPARE };
        self.cpus = cpus.clamp(self.restraint.least, self.restraint.most);
    }
}

/// Idle time of all CPUs of this host so far, seconds.
fn idle() -> Option<f64> {
    fs::read_to_string("/proc/uptime").ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Rests that are due, slept in pieces that are worth a timer.
#[derive(Debug, Default)]
pub(super) struct Rest(Duration);

impl Rest {
    /// Adds `rest`, and sleeps if enough has come together.
    pub(super) fn take(&mut self, rest: Duration) {
        self.0 += rest;
        if self.0 >= NAP {
            let begin = Instant::now();
            std::thread::sleep(self.0);
            // Sleeping longer than asked for is no loan.
            self.0 = self.0.saturating_sub(begin.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_kept_over_time_whatever_the_pieces() {
        for piece in [100, 4096, 1 << 20] {
            let start = Instant::now();
            let mut bucket = Bucket::new(10_000_000, start);
            let (mut now, mut bytes) = (start, 0);
            while bytes < 50_000_000 {
                bytes += piece;
                now += bucket.pay(piece, now);
            }
            let took = (now - start).as_secs_f64();
            assert!((bytes as f64 / took / 10_000_000.0 - 1.0).abs() < 0.01, "{piece}: {took} s");
        }
    }

    #[test]
    fn a_long_silence_buys_no_flood() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1_000_000, start);
        let later = start + Duration::from_secs(3600);
        assert!(bucket.pay(1_000_000, later) >= Duration::from_millis(940));
    }

    fn share(workers: usize, least: f64, most: f64) -> Share {
        let mut share = Share::new(Restraint { least, most }, Instant::now());
        share.resume(workers, share.looked);
        share
    }

    #[test]
    fn a_busy_host_leaves_the_least_and_an_idle_one_the_most() {
        let mut share = share(2, 0.1, 1.5);
        for _ in 0..20 {
            share.adjust(0.0, LOOK);
        }
        assert_eq!(share.cpus(), 0.1);
        share.adjust(1.2, LOOK);
        assert!((share.cpus() - 1.1).abs() < 1e-9);
        share.adjust(3.0, LOOK);
        assert_eq!(share.cpus(), 1.5);
    }

    #[test]
    fn what_is_left_over_is_used_up_to_the_spare_and_kept_so() {
        // Others use one of two CPUs.
        let mut share = share(1, 0.1, 2.0);
        for _ in 0..10 {
            share.used = LOOK.mul_f64(share.cpus());
            share.adjust(1.0 - share.cpus(), LOOK);
        }
        assert!((share.cpus() - 0.9).abs() < 0.01, "{}", share.cpus());
    }

    #[test]
    fn rest_is_in_proportion_to_the_share() {
        let mut share = share(2, 0.1, 2.0);
        share.cpus = 0.5;
        let now = share.looked;
        assert_eq!(share.worked(Duration::from_millis(2), now), Duration::from_millis(6));
        share.cpus = 2.0;
        assert_eq!(share.worked(Duration::from_millis(2), now), Duration::ZERO);
    }
}
