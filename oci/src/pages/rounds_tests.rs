//! The predicate, on rounds made by hand and on simulated containers.

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn round(interval: u64, pages: u64, took: u64) -> Round {
    Round { interval: Some(ms(interval)), pages, took: ms(took), link: None }
}

fn first(pages: u64, took: u64) -> Round {
    Round { interval: None, pages, took: ms(took), link: None }
}

/// The costs that the figures in these tests were chosen for.
fn measured() -> Policy {
    Policy { page: Duration::from_nanos(900), ..Policy::default() }
}

#[test]
fn the_pause_grows_only_with_what_the_dump_does_not_hide() {
    let policy = measured();
    assert_eq!(policy.pause(0, None), ms(20));
    assert_eq!(policy.pause(6000, None), ms(20));
    assert_eq!(policy.pause(16_000, None), ms(29));
    // 10 Gbit/s: 3.3 ms per 1,000 pages besides.
    let more = policy.pause(7000, Some(1.25e9)) - policy.pause(6000, Some(1.25e9));
    assert!((ms(4)..ms(5)).contains(&more), "{more:?}");
    assert!(policy.pause(u64::MAX, Some(0.0)) > Duration::from_secs(1 << 40));
}

#[test]
fn a_quiet_container_is_frozen_after_two_rounds() {
    let mut rounds = Rounds::new(measured());
    assert_eq!(rounds.after(first(100_000, 200)), Verdict::Again);
    assert_eq!(rounds.after(round(200, 0, 1)), Verdict::Stop(Converged::Quiet));
}

#[test]
fn few_pages_are_left_to_the_freeze() {
    let mut rounds = Rounds::new(measured());
    rounds.after(first(100_000, 200));
    assert_eq!(rounds.after(round(200, 5000, 5)), Verdict::Stop(Converged::WithinTarget));
    assert_eq!(rounds.expected_pages(), Some(5000));
    assert_eq!(rounds.expected_pause(), Some(ms(20)));
}

#[test]
fn a_round_that_took_longer_than_its_interval_expects_more_pages_than_it_listed() {
    let mut rounds = Rounds::new(measured());
    rounds.after(first(1000, 10));
    assert_eq!(rounds.after(round(10, 5000, 96)), Verdict::Again);
    assert_eq!(rounds.expected_pages(), Some(50_000));
}

#[test]
fn pages_that_do_not_get_fewer_diverge_once_patience_is_over() {
    let mut rounds = Rounds::new(measured());
    rounds.after(first(1_000_000, 1000));
    for _ in 0..3 {
        assert_eq!(rounds.after(round(1000, 900_000, 1000)), Verdict::Again);
    }
    let verdict = rounds.after(round(1000, 900_000, 1000));
    assert_eq!(verdict, Verdict::Diverges(Diverging::NoProgress));
    // Half as fast, it is given a new chance.
    rounds.throttled();
    assert_eq!(rounds.after(round(1000, 450_000, 500)), Verdict::Again);
}

#[test]
fn slow_progress_ends_at_the_last_round() {
    let mut rounds = Rounds::new(Policy { max_rounds: 5, ..measured() });
    rounds.after(first(1_000_000, 1000));
    for pages in [900_000, 700_000, 500_000] {
        assert_eq!(rounds.after(round(1000, pages, 1000)), Verdict::Again);
    }
    let verdict = rounds.after(round(1000, 400_000, 1000));
    assert_eq!(verdict, Verdict::Diverges(Diverging::TooManyRounds));
}

#[test]
fn a_target_below_the_fixed_pause_is_told_at_once() {
    let mut rounds = Rounds::new(Policy { downtime_target: ms(10), ..measured() });
    rounds.after(first(1000, 10));
    let verdict = rounds.after(round(10, 100, 1));
    assert_eq!(verdict, Verdict::Diverges(Diverging::TargetTooShort));
}

/// A container that writes `rate` pages a second at random among `set`, copied at `speed` pages a
/// second. Gives the verdict, rounds, expected pages and those that a freeze finds.
fn simulate(policy: Policy, set: f64, rate: f64, speed: f64) -> (Verdict, u32, u64, u64) {
    let dirty = |seconds: f64| set * (1.0 - (-rate * seconds / set).exp());
    let mut rounds = Rounds::new(policy);
    let mut took = set / speed;
    let mut verdict = rounds.after(Round {
        took: Duration::from_secs_f64(took),
        pages: set as u64,
        ..Round::default()
    });
    while verdict == Verdict::Again {
        let interval = took;
        let pages = dirty(interval);
        took = 0.001 + pages / speed;
        verdict = rounds.after(Round {
            interval: Some(Duration::from_secs_f64(interval)),
            pages: pages as u64,
            took: Duration::from_secs_f64(took),
            link: None,
        });
    }
    let found = dirty(took + policy.switch.as_secs_f64()) as u64;
    (verdict, rounds.made(), rounds.expected_pages().unwrap(), found)
}

#[test]
fn a_freeze_finds_no_more_than_was_expected() {
    let mut converged = 0;
    for set in [1000.0, 30_000.0, 1e6] {
        for rate in [0.0, 1000.0, 12_500.0, 100_000.0, 1e6] {
            for speed in [25_000.0, 250_000.0, 500_000.0] {
                let (verdict, rounds, expected, found) = simulate(measured(), set, rate, speed);
                // The simulation's pages are fractions.
                let context = format!("set {set}, rate {rate}, speed {speed}: {verdict:?}");
                assert!(found <= expected + 20, "{context}: {found} found, {expected} expected");
                if let Verdict::Stop(_) = verdict {
                    converged += 1;
                    let pause = measured().pause(found, None);
                    assert!(pause <= ms(31), "{context}: pause {pause:?}");
                }
                assert!(rounds <= 30, "{context}: {rounds} rounds");
            }
        }
    }
    assert!(converged >= 25, "only {converged} of 45 converged");
}

#[test]
fn a_container_that_writes_a_tenth_of_what_is_copied_converges_in_a_few_rounds() {
    let (verdict, rounds, _, found) = simulate(measured(), 1e6, 25_000.0, 250_000.0);
    assert_eq!(verdict, Verdict::Stop(Converged::WithinTarget));
    assert!(rounds <= 5 && found < 17_000, "{rounds} rounds, {found} pages");
}

/// A container that writes `rate` of its `set` pages a second, sent at `speed` pages a second after
/// everything was made ready for 0.2 s: rounds, and pages that a freeze finds.
fn simulate_last(set: f64, rate: f64, speed: f64) -> (u32, u64) {
    let dirty = |seconds: f64| set * (1.0 - (-rate * seconds / set).exp());
    let (mut rounds, mut interval) = (LastRounds::new(ms(30)), 0.2);
    loop {
        let pages = dirty(interval);
        let took = 0.002 + pages / speed;
        let enough = rounds.enough(Round {
            interval: Some(Duration::from_secs_f64(interval)),
            pages: pages as u64,
            took: Duration::from_secs_f64(took),
            link: Some(speed * 4096.0),
        });
        interval = took;
        if enough {
            return (rounds.0.made(), dirty(took) as u64);
        }
    }
}

#[test]
fn the_last_rounds_go_on_until_the_dump_hides_what_is_left() {
    // 100 MB/s over 1 Gbit/s.
    let (rounds, pages) = simulate_last(16_400.0, 25_000.0, 30_500.0);
    assert!((5..=20).contains(&rounds) && pages < 600, "{rounds} rounds, {pages} pages");
    assert_eq!(simulate_last(16_400.0, 0.0, 30_500.0).0, 2, "nothing to wait for");
    let (rounds, _) = simulate_last(16_400.0, 100_000.0, 30_500.0);
    assert!((3..=5).contains(&rounds), "{rounds} rounds that bring nothing");
    assert_eq!(simulate_last(1e6, 250_000.0, 30_500.0).0, 2, "rounds that take seconds");
}

#[test]
fn throttling_goes_down_in_steps_of_its_own_use_and_ends() {
    let mut throttle = Throttle::new(1.5);
    let steps: Vec<_> = std::iter::from_fn(|| throttle.next_step()).collect();
    assert_eq!(steps.len(), 4);
    for (step, part) in steps.iter().zip([0.8, 0.6, 0.4, 0.2]) {
        assert!((step - 1.5 * part).abs() < 1e-9);
    }
}

#[test]
fn what_to_do_is_named_in_lower_case() {
    for (text, value) in
        [("stop", OnDiverge::Stop), ("throttle", OnDiverge::Throttle), ("fail", OnDiverge::Fail)]
    {
        assert_eq!(text.parse(), Ok(value));
        assert_eq!(serde_json::to_string(&value).unwrap(), format!("{text:?}"));
    }
    assert!("Stop".parse::<OnDiverge>().unwrap_err().contains("none of"));
}

/// A round of `bytes` that blocked for so long, and was answered so long after its last write, ms.
fn seen(link: &mut LinkRate, bytes: u64, took: u64, blocked: u64, drained: u64) -> Option<u64> {
    let stats = RoundStats { bytes, took: ms(took), blocked: ms(blocked), ..RoundStats::default() };
    link.after(&stats, ms(drained), ms(1)).map(|rate| (rate / 1e6).round() as u64)
}

#[test]
fn what_buffers_on_the_way_hold_is_not_yet_sent() {
    let mut link = LinkRate::default();
    // The processor, and not the link, is what such a round waits for.
    assert_eq!(seen(&mut link, 50_000_000, 500, 20, 2), None);
    assert_eq!(seen(&mut link, 67_000_000, 540, 500, 41), Some(124));
    // All of it fits into the buffers.
    assert_eq!(seen(&mut link, 6_000_000, 10, 0, 51), Some(120));
    // Too few bytes to tell, and a round that the link does not hold up: as before.
    assert_eq!(seen(&mut link, 40_000, 1, 0, 4), Some(120));
    assert_eq!(seen(&mut link, 50_000_000, 500, 20, 2), Some(120));
}
