//! When to stop copying and freeze: a pure predicate over what the rounds have shown.
//!
//! ```text
//!   scan n                    scan n+1            scan n+2   freeze
//!     ├── copy what was listed ──┤── copy ───────────┤─ copy ──┤─ switch ─┤── last round, beside the dump ──┤
//!     │◀─ interval of n+1 ──────▶│                             │◀─ gap ──▶│
//! ```
//! A round lists the pages that were written in the interval before its scan. Pages that are written
//! again count once, so a shorter interval never lists more: what a round has listed bounds what a
//! freeze would find, if that comes no later after it than its interval was long.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::PAGE;
use super::stream::RoundStats;

/// What a page costs on the wire besides its contents, when it stands alone, bytes.
const OVERHEAD: f64 = 14.0;
/// Rounds of fewer bytes say nothing about the link's rate.
const MEASURED: u64 = 1 << 20;
/// Part of its time that a round has to wait for the link before that is the bottleneck.
const WAITED: f64 = 0.2;
/// How many rounds there are just before the freeze.
const LAST: RangeInclusive<u32> = 2..=20;
/// What the round in the freeze may cost beyond what the dump hides.
const UNHIDDEN: Duration = Duration::from_millis(1);
/// Rounds just before the freeze that take longer will not come down to that.
const SHORT: Duration = Duration::from_secs(1);
/// A round has made progress when it lists less than this part of the best before it.
const PROGRESS: f64 = 0.9;

/// What to do with a container that changes its memory faster than it can be copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDiverge {
    /// Freeze it anyway: the pause gets longer than asked for.
    #[default]
    Stop,
    /// Give it less CPU time, step by step, until it converges.
    Throttle,
    /// Give up; it runs on where it is.
    Fail,
}

impl FromStr for OnDiverge {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stop" => Ok(Self::Stop),
            "throttle" => Ok(Self::Throttle),
            "fail" => Ok(Self::Fail),
            other => Err(format!("{other:?} is none of stop, throttle, fail")),
        }
    }
}

/// When pre-copy ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Pause that is aimed at.
    pub downtime_target: Duration,
    /// Rounds after which no more are made.
    pub max_rounds: u32,
    /// Rounds without progress after which no more is expected.
    pub patience: u32,
    /// The pause without any page: dump, images, restore.
    pub fixed: Duration,
    /// Reading one page inside the freeze.
    pub page: Duration,
    /// How much of the last round hides behind the dump.
    pub beside: Duration,
    /// From the end of a round until no process runs.
    pub switch: Duration,
}

impl Default for Policy {
    /// Measured: 20 ms with 40 MB to 4 GB, 3.5 ms for 1,000 scattered pages from reading to storing, of
    /// which 5.4 ms are hidden behind the dump, 4 ms from the announcement to the freeze.
    fn default() -> Self {
        Self {
            downtime_target: Duration::from_millis(30),
            max_rounds: 30,
            patience: 3,
            fixed: Duration::from_millis(20),
            page: Duration::from_nanos(3500),
            beside: Duration::from_micros(5400),
            switch: Duration::from_millis(4),
        }
    }
}

/// Rate of the link, from what rounds have shown.
///
/// A sender that has written everything is not done: buffers on the way hold megabytes. The link is
/// waited for while writing blocks, and from the last write until the other end has stored it all.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkRate(Option<f64>);

impl LinkRate {
    /// Takes in a round that was sent as `stats` say and answered `drained` after its last write, over a
    /// link that answers in `round_trip`. The rate in bytes per second, as of the last round in which
    /// the link was the bottleneck.
    pub fn after(
        &mut self,
        stats: &RoundStats,
        drained: Duration,
        round_trip: Duration,
    ) -> Option<f64> {
        let waited = (stats.blocked + drained.saturating_sub(round_trip)).as_secs_f64();
        if stats.bytes >= MEASURED && waited > WAITED * (stats.took + drained).as_secs_f64() {
            self.0 = Some(stats.bytes as f64 / waited);
        }
        self.0
    }
}

/// What one round has shown.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Round {
    /// Time since the scan before this one; `None` for the first round, which lists everything.
    pub interval: Option<Duration>,
    /// Pages that it listed as written.
    pub pages: u64,
    /// From its scan until all of it was sent.
    pub took: Duration,
    /// Rate of the link in bytes per second, if it is known.
    pub link: Option<f64>,
}

impl Round {
    /// The round whose scan came `interval` after that before it, and that took `took` with its scan.
    pub fn new(interval: Option<Duration>, took: Duration, stats: &RoundStats) -> Self {
        Self { interval, pages: stats.listed, took, link: stats.link }
    }
}

/// Why it is time to freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Converged {
    /// Hardly anything changes.
    Quiet,
    /// The expected pause is within its target.
    WithinTarget,
}

/// Why more rounds are of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Diverging {
    /// The pages that change do not get fewer.
    NoProgress,
    /// All rounds that are allowed were made.
    TooManyRounds,
    /// The target is shorter than the pause without any page.
    TargetTooShort,
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Make another round, at once.
    Again,
    /// Freeze now.
    Stop(Converged),
    /// It will not get better: [`OnDiverge`] says what then.
    Diverges(Diverging),
}

/// The rounds so far, and what follows from them.
///
/// After each round the criteria are, in this order:
/// 1. The first round lists everything and says nothing about change: again.
/// 2. A freeze now would find at most [`expected_pages`](Self::expected_pages). The pause expected
///    of it ([`Policy::pause`]) is within the target, or no page at all is expected: stop.
/// 3. [`Policy::max_rounds`] were made: diverges.
/// 4. No page would be left and the pause still above the target: diverges.
/// 5. None of the last [`Policy::patience`] rounds listed less than 90 % of the best before them:
///    diverges. A round after a longer interval than the best one's is measured by its rate.
/// 6. Otherwise: again.
#[derive(Debug, Clone)]
pub struct Rounds {
    policy: Policy,
    made: u32,
    recent: VecDeque<Round>,
    /// Fewest pages, and at the lowest rate, that a round has listed.
    best: Option<(u64, f64)>,
    stalled: u32,
}

impl Policy {
    /// The pause to expect when `pages` are left and the link carries `link` bytes per second.
    pub fn pause(&self, pages: u64, link: Option<f64>) -> Duration {
        let wire = link.map_or(0.0, |link| pages as f64 * (PAGE as f64 + OVERHEAD) / link.max(1.0));
        let last = self.page.as_secs_f64() * pages as f64 + wire;
        let beyond = (last - self.beside.as_secs_f64()).max(0.0);
        self.fixed + Duration::try_from_secs_f64(beyond).unwrap_or(Duration::MAX / 2)
    }
}

impl Rounds {
    /// No round was made yet.
    pub fn new(policy: Policy) -> Self {
        Self { policy, made: 0, recent: VecDeque::new(), best: None, stalled: 0 }
    }

    /// Takes in a round and says what to do.
    pub fn after(&mut self, round: Round) -> Verdict {
        self.made += 1;
        self.recent.push_back(round);
        if self.recent.len() > 4 {
            self.recent.pop_front();
        }
        let Some(pages) = self.expected_pages() else {
            return Verdict::Again;
        };
        if pages == 0 {
            return Verdict::Stop(Converged::Quiet);
        }
        if self.policy.pause(pages, round.link) <= self.policy.downtime_target {
            return Verdict::Stop(Converged::WithinTarget);
        }
        if self.made >= self.policy.max_rounds {
            return Verdict::Diverges(Diverging::TooManyRounds);
        }
        if self.policy.pause(0, round.link) > self.policy.downtime_target {
            return Verdict::Diverges(Diverging::TargetTooShort);
        }
        self.judge_progress(&round);
        if self.stalled >= self.policy.patience {
            return Verdict::Diverges(Diverging::NoProgress);
        }
        Verdict::Again
    }

    fn judge_progress(&mut self, round: &Round) {
        let now = (round.pages, rate(round));
        let Some(best) = self.best else {
            self.best = Some(now);
            return;
        };
        let better = |now: f64, best: f64| now < best * PROGRESS;
        let progress = better(now.0 as f64, best.0 as f64) || better(now.1, best.1);
        self.stalled = if progress { 0 } else { self.stalled + 1 };
        self.best = Some((best.0.min(now.0), best.1.min(now.1)));
    }

    /// The container was made slower: what was seen before says little now.
    pub fn throttled(&mut self) {
        (self.best, self.stalled) = (None, 0);
    }

    /// Rounds so far.
    pub fn made(&self) -> u32 {
        self.made
    }

    /// Pages written per second, as the last round has seen it. A longer interval sees fewer, since
    /// a page that is written twice counts once.
    pub fn dirty_rate(&self) -> Option<f64> {
        self.recent.back().filter(|round| round.interval.is_some()).map(rate)
    }

    /// Most pages that a freeze would find if it came now, right after the last round.
    pub fn expected_pages(&self) -> Option<u64> {
        let round = self.recent.back()?;
        let gap = round.took + self.policy.switch;
        Some(match round.interval? {
            interval if gap <= interval => round.pages,
            _ => (rate(round) * gap.as_secs_f64()).ceil() as u64,
        })
    }

    /// Pause to expect if the freeze came now.
    pub fn expected_pause(&self) -> Option<Duration> {
        let link = self.recent.back()?.link;
        Some(self.policy.pause(self.expected_pages()?, link))
    }
}

/// Short rounds just before the freeze: each lists what the one before it took to send. They go on
/// until the dump hides what is left, as long as they come closer to that.
#[derive(Debug, Clone)]
pub struct LastRounds(Rounds);

impl LastRounds {
    /// For a pause that is aimed at.
    pub fn new(downtime_target: Duration) -> Self {
        let policy = Policy::default();
        Self(Rounds::new(Policy {
            downtime_target: downtime_target.min(policy.fixed + UNHIDDEN),
            max_rounds: *LAST.end(),
            patience: 2,
            ..policy
        }))
    }

    /// Takes in a round. Whether it is time to freeze.
    pub fn enough(&mut self, round: Round) -> bool {
        let stop = self.0.after(round) != Verdict::Again || round.took > SHORT;
        stop && self.0.made() >= *LAST.start()
    }
}

/// Pages per second that a round has seen written.
fn rate(round: &Round) -> f64 {
    let interval = round.interval.unwrap_or(Duration::MAX).as_secs_f64();
    round.pages as f64 / interval.max(1e-6)
}

/// Less and less CPU time for a container that diverges.
///
/// Steps are parts of what it used by itself before the first one.
#[derive(Debug, Clone, PartialEq)]
pub struct Throttle {
    own: f64,
    steps: VecDeque<f64>,
}

impl Throttle {
    /// For a container that uses `own` CPUs: 80, 60, 40 and 20 % of that.
    pub fn new(own: f64) -> Self {
        Self { own, steps: [0.8, 0.6, 0.4, 0.2].into() }
    }

    /// CPUs that it may use from now on, or `None` when it has no step left. Follow it by
    /// [`Rounds::throttled`].
    pub fn next_step(&mut self) -> Option<f64> {
        self.steps.pop_front().map(|step| self.own * step)
    }
}

#[cfg(test)]
#[path = "rounds_tests.rs"]
mod tests;
