//! A load on redis that does not wait for it: so many commands every second, whatever becomes of
//! those before.
//!
//! ```text
//!  every ms: the commands that are due, in one piece ─▶ redis ─▶ answers, counted by tenths of a second
//! ```
//!
//! Most commands look up [`KEYS`] random keys each, without so much as noting that they were looked
//! at; one in [`SETS`] writes a value of random content under a random key. That is work for redis
//! and little for its client, which shares the processors, and a steady rate of pages that change.
//!
//! Commands that redis is late with stay due: what it could not do in one second is missing there.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::reporter;

/// Of so many commands one writes.
const SETS: u64 = 20;
/// Keys that the others look up.
const KEYS: usize = 16;
/// Commands that may be without an answer: what waits for redis, or in it, takes memory.
const MOST: u64 = 5000;
/// Bytes of a value.
pub(crate) const VALUE: usize = 1000;
/// Length of what answers are counted by, milliseconds.
const TENTH: u64 = 100;
/// Values, and commands that look up, which are sent again and again: making them takes time.
const POOL: usize = 1024;
/// Between the pieces that are sent.
const TICK: Duration = Duration::from_millis(1);
/// How long answers may stay away before the connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Offer {
    /// Where redis is
    pub(crate) address: String,
    /// How many keys it has
    #[arg(long)]
    pub(crate) keys: u64,
    /// Commands per second; 0 writes every key once and ends
    #[arg(long)]
    pub(crate) rate: u64,
}

/// What redis has done.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Answers in each tenth of a second since 1970 in which there were any.
    pub(crate) tenths: BTreeMap<u64, u64>,
    /// What ended the connection.
    pub(crate) error: Option<String>,
}

impl Done {
    /// Answers per second, second by second, from `start` to `end` by the wall clock; what is left
    /// of a second at the end does not count.
    pub(crate) fn per_second(&self, start: SystemTime, end: SystemTime) -> Vec<u64> {
        // A tenth that began before does not count.
        let (first, last) = (tenth(start) + 1, tenth(end));
        let of = |second: u64| (0..10).map(|n| self.tenths.get(&(second + n)).unwrap_or(&0)).sum();
        (first..last).step_by(10).filter(|second| second + 10 <= last).map(of).collect()
    }
}

/// Tenths of a second since 1970.
fn tenth(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or_default() / TENTH
}

/// Offers the load until the input ends, then prints what was done.
///
/// # Errors
/// When redis cannot be reached, or its memory not be filled.
pub(crate) fn run(offer: &Offer) -> Result<()> {
    let stream = TcpStream::connect(&offer.address)
        .with_context(|| format!("connect to {}", offer.address))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let answers = BufReader::with_capacity(1 << 18, stream.try_clone()?);
    if offer.rate == 0 {
        return fill(stream, answers, offer.keys);
    }
    reporter::say_ready();
    let ended = reporter::input_ended();
    let counts = Counts::default();
    let done = std::thread::scope(|scope| {
        let counter = scope.spawn(|| count(answers, || ended.load(Ordering::Relaxed), &counts));
        let result = send(stream, offer, || ended.load(Ordering::Relaxed), &counts);
        let mut done = counter.join().unwrap_or_default();
        if let (None, Err(e)) = (&done.error, result) {
            done.error = Some(format!("{e:#}"));
        }
        done
    });
    reporter::say(&done)
}

/// Commands so far.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    answered: AtomicU64,
}

/// Writes every key once, each with content of its own.
fn fill(mut stream: TcpStream, mut answers: BufReader<TcpStream>, keys: u64) -> Result<()> {
    let reader = std::thread::spawn(move || (0..keys).try_for_each(|_| answer(&mut answers)));
    let (mut random, mut piece) = (Random(1), Vec::new());
    for key in 0..keys {
        set(&mut piece, key, &random.value());
        if piece.len() > 1 << 16 || key + 1 == keys {
            stream.write_all(&piece).context("fill redis")?;
            piece.clear();
        }
    }
    match reader.join() {
        Ok(result) => result.context("fill redis"),
        Err(_) => bail!("the reader of answers panicked"),
    }
}

/// Sends what is due.
fn send(
    mut stream: TcpStream,
    offer: &Offer,
    ended: impl Fn() -> bool,
    counts: &Counts,
) -> Result<()> {
    let mut random = Random(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos().into());
    let values: Vec<_> = (0..POOL).map(|_| random.value()).collect();
    let lookups: Vec<_> = (0..POOL).map(|_| exists(&mut random, offer.keys)).collect();
    let (begun, mut piece) = (Instant::now(), Vec::new());
    while !ended() {
        let due = (begun.elapsed().as_secs_f64() * offer.rate as f64) as u64;
        let mut number = counts.sent.load(Ordering::Relaxed);
        let may = due.min(counts.answered.load(Ordering::Relaxed) + MOST);
        while number < may {
            number += 1;
            let pick = random.next() as usize % POOL;
            match number % SETS {
                0 => set(&mut piece, random.next() % offer.keys, &values[pick]),
                _ => piece.extend(&lookups[pick]),
            }
        }
        stream.write_all(&piece).context("send commands")?;
        piece.clear();
        counts.sent.store(number, Ordering::Release);
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// Counts answers until all that were sent are there.
fn count(mut answers: BufReader<TcpStream>, ended: impl Fn() -> bool, counts: &Counts) -> Done {
    let (mut done, mut got) = (Done::default(), 0);
    loop {
        let over = ended();
        if got >= counts.sent.load(Ordering::Acquire) {
            if over {
                return done;
            }
            std::thread::sleep(TICK / 4);
            continue;
        }
        if let Err(e) = answer(&mut answers) {
            done.error = Some(format!("{e:#}"));
            return done;
        }
        got += 1;
        counts.answered.store(got, Ordering::Relaxed);
        *done.tenths.entry(tenth(SystemTime::now())).or_default() += 1;
    }
}

fn set(piece: &mut Vec<u8>, key: u64, value: &[u8]) {
    let key = format!("key:{key}");
    piece.extend(format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n", key.len()).bytes());
    piece.extend(format!("${}\r\n", value.len()).bytes());
    piece.extend(value);
    piece.extend(b"\r\n");
}

/// A command that looks up random ones of `keys` keys.
fn exists(random: &mut Random, keys: u64) -> Vec<u8> {
    let mut command = format!("*{}\r\n$6\r\nEXISTS\r\n", KEYS + 1);
    for _ in 0..KEYS {
        let key = format!("key:{}", random.next() % keys);
        command.push_str(&format!("${}\r\n{key}\r\n", key.len()));
    }
    command.into_bytes()
}

/// Reads one answer: a status or a number.
fn answer(answers: &mut impl BufRead) -> Result<()> {
    let mut line = Vec::new();
    let length = answers.read_until(b'\n', &mut line).context("wait for an answer")?;
    ensure!(length > 0, "redis hung up");
    match line[0] {
        b'+' | b':' => Ok(()),
        _ => bail!("the answer was {}", String::from_utf8_lossy(&line).trim()),
    }
}

/// Numbers that are random enough for no compressor to find anything in them (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn value(&mut self) -> Vec<u8> {
        (0..VALUE / 8).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(ms)
    }

    #[test]
    fn only_whole_seconds_inside_the_window_count() {
        let tenths = (0..40).map(|n| (n, 1 + n / 10)).collect();
        let done = Done { tenths, error: None };
        // From 1.0 s, as the tenth at 0.95 s has begun before.
        assert_eq!(done.per_second(at(950), at(3550)), [20, 30]);
        assert_eq!(done.per_second(at(950), at(2950)), [20]);
        assert_eq!(done.per_second(at(950), at(1500)), [0; 0]);
        // Nothing was answered there.
        assert_eq!(done.per_second(at(4950), at(6050)), [0]);
    }

    #[test]
    fn commands_and_answers_are_those_of_redis() {
        let mut piece = Vec::new();
        set(&mut piece, 7, b"ab");
        assert_eq!(piece, b"*3\r\n$3\r\nSET\r\n$5\r\nkey:7\r\n$2\r\nab\r\n");
        let text = String::from_utf8(exists(&mut Random(1), 1)).unwrap();
        assert!(text.starts_with("*17\r\n$6\r\nEXISTS\r\n$5\r\nkey:0\r\n"), "{text}");
        assert_eq!(text.matches("key:0").count(), KEYS);
        let mut answers = &b"+OK\r\n:16\r\n-ERR no\r\n"[..];
        for _ in 0..2 {
            answer(&mut answers).unwrap();
        }
        assert!(answer(&mut answers).unwrap_err().to_string().contains("-ERR no"));
        assert!(answer(&mut answers).unwrap_err().to_string().contains("hung up"));
    }

    #[test]
    fn no_more_is_sent_than_may_be_without_an_answer() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let counts = Counts::default();
        let (begun, full) = (Instant::now(), std::cell::OnceCell::new());
        let ended = || {
            if counts.sent.load(Ordering::Relaxed) >= MOST {
                full.get_or_init(Instant::now);
            }
            // A while longer, for more than may be sent; on a slow machine it takes its time.
            let long = |since: &Instant| since.elapsed() > Duration::from_millis(50);
            full.get().is_some_and(long) || begun.elapsed() > Duration::from_secs(30)
        };
        let offer = Offer { address: String::new(), keys: 9, rate: 100_000_000 };
        // Somebody reads and never answers.
        let (mut server, _) = listener.accept().unwrap();
        let reader = std::thread::spawn(move || std::io::copy(&mut server, &mut std::io::sink()));
        send(stream, &offer, ended, &counts).unwrap();
        assert_eq!(counts.sent.load(Ordering::Relaxed), MOST);
        assert!(reader.join().unwrap().is_ok());
    }

    #[test]
    fn values_have_their_length_and_are_not_the_same() {
        let mut random = Random(1);
        let (first, second) = (random.value(), random.value());
        assert_eq!(first.len(), VALUE);
        assert_ne!(first, second);
    }
}
