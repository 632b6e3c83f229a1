//! How fast it is: to be looked at, not passed. Each reads the memory of a real process.
//!
//! `cargo test --release -p ferry-oci measure -- --ignored --nocapture --test-threads 1`

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, IoSliceMut, Write};
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::testing::Random;
use super::worker::lock;
use super::*;
use crate::pages::PAGE;

const CHILD: &str = "FERRY_MEASURE_CHILD";

/// What a child does: `MEGABYTES CONTENTS WRITERS`. It tells the address of its memory, and then ten
/// times a second how many pages it has written.
#[test]
#[ignore = "the other process of the measurements"]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    if let Ok(cgroup) = std::env::var("FERRY_MEASURE_CGROUP") {
        std::fs::write(cgroup + "/cgroup.procs", std::process::id().to_string()).unwrap();
    }
    let mut words = task.split(' ');
    let megabytes: usize = words.next().unwrap().parse().unwrap();
    let contents = words.next().unwrap();
    let writers: usize = words.next().unwrap().parse().unwrap();
    let mut memory = vec![0_u64; (megabytes << 17) + 512];
    let skip = memory.as_ptr().align_offset(PAGE as usize);
    let memory = &mut memory[skip..skip + (megabytes << 17)];
    let mut random = Random(1);
    for (at, word) in memory.iter_mut().enumerate() {
        *word = match contents {
            "random" | "mixed" => random.next(),
            // Halves of bytes, a quarter of them zero: about 2.5 to 1.
            "text" => random.next() & 0x0707_0707_0707_0707,
            "same" => at as u64 % 512 + 1,
            _ => 0,
        };
    }
    println!("\naddress {}", memory.as_ptr() as u64);
    let wrote = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for (seed, part) in memory.chunks_mut((megabytes << 17) / writers.max(1)).enumerate() {
            if writers == 0 {
                break;
            }
            let wrote = &wrote;
            scope.spawn(move || {
                let mut random = Random(seed as u64);
                // What programs do besides writing, 4 us of it for each page.
                let work = if contents == "mixed" { 1500 } else { 0 };
                loop {
                    for _ in 0..64 {
                        let mut busy = random.next();
                        (0..work)
                            .for_each(|_| busy = std::hint::black_box(busy.rotate_left(5) ^ 3));
                        let page = random.below(part.len() as u64 / 512) as usize * 512;
                        part[page..page + 512].fill(random.next());
                    }
                    wrote.fetch_add(64, Relaxed);
                }
            });
        }
        loop {
            std::thread::sleep(Duration::from_millis(100));
            println!("wrote {}", wrote.load(Relaxed));
        }
    });
}

/// Another process with memory.
struct Target {
    child: Child,
    range: Range<u64>,
    output: BufReader<std::process::ChildStdout>,
}

impl Target {
    fn start(megabytes: u64, contents: &str, writers: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pages::stream::measure::child", "--ignored", "--nocapture"])
            .env(CHILD, format!("{megabytes} {contents} {writers}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        let start = loop {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "the child has ended");
            if let Some(address) = line.strip_prefix("address ") {
                break address.trim().parse().unwrap();
            }
        };
        Self { child, range: start..start + (megabytes << 20), output }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Pages written per second, over the next `lines` tenths of a second.
    fn speed(&mut self, lines: u32) -> f64 {
        let mut count = || {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            line.strip_prefix("wrote ").unwrap().trim().parse::<u64>().unwrap()
        };
        let (first, begin) = (count(), Instant::now());
        for _ in 1..lines {
            count();
        }
        (count() - first) as f64 / begin.elapsed().as_secs_f64()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads by process_vm_readv, into buffers that stay.
#[derive(Default)]
struct Reader(Mutex<Vec<Vec<u8>>>);

impl PageSource for Reader {
    fn read(
        &self,
        pid: i32,
        ranges: &[Range<u64>],
        each: &mut (dyn FnMut(u64, &[u8]) + Send),
    ) -> io::Result<()> {
        let length: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let mut buffer = lock(&self.0).pop().unwrap_or_default();
        buffer.resize(length as usize, 0);
        let remote: Vec<_> = ranges
            .iter()
            .map(|range| RemoteIoVec {
                base: range.start as usize,
                len: (range.end - range.start) as usize,
            })
            .collect();
        let local = &mut [IoSliceMut::new(&mut buffer)];
        let got = process_vm_readv(Pid::from_raw(pid), local, &remote)?;
        assert_eq!(got as u64, length);
        let mut rest = &buffer[..];
        for range in ranges {
            let (bytes, more) = rest.split_at((range.end - range.start) as usize);
            each(range.start, bytes);
            rest = more;
        }
        lock(&self.0).push(buffer);
        Ok(())
    }
}

/// Takes bytes as a link's chunk writer does, and forgets them. Knows when the first came.
struct Drain {
    chunk: Vec<u8>,
    first: Option<Instant>,
    flushes: u32,
}

impl Drain {
    fn new() -> Self {
        Self { chunk: Vec::with_capacity(MAX_CHUNK), first: None, flushes: 0 }
    }
}

impl Write for Drain {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(MAX_CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == MAX_CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.first.get_or_insert_with(Instant::now);
        self.flushes += 1;
        self.chunk.clear();
        Ok(())
    }
}

fn change<'a>(target: &Target, written: &'a [Range<u64>]) -> Change<'a> {
    Change { pid: target.pid(), space: 1, written, absent: &[], exited: false }
}

#[test]
#[ignore = "a measurement"]
fn how_fast_memory_is_sent() {
    let megabytes = 1024;
    for contents in ["random", "text", "same", "zero"] {
        let target = Target::start(megabytes, contents, 0);
        let mut line = format!("\n{contents:>6}:");
        for (compression, name) in [(Compression::Never, "raw"), (Compression::Always, "zstd")] {
            for threads in [1, 2] {
                let options =
                    Options { threads, compression, restraint: None, ..Options::default() };
                let mut sender = Sender::new(options.clone());
                let all = [target.range.clone()];
                let mut rate = 0.0;
                let mut stats = RoundStats::default();
                for _ in 0..2 {
                    sender = Sender::new(options.clone());
                    stats = sender
                        .round(
                            false,
                            &[change(&target, &all)],
                            &Reader::default(),
                            &mut Drain::new(),
                        )
                        .unwrap();
                    rate = f64::max(rate, stats.memory_rate());
                }
                let ratio = stats.bytes as f64 / (megabytes << 20) as f64;
                write!(line, "  {name} x{threads} {:.2} GB/s ({ratio:.3})", rate / 1e9).unwrap();
                let again = sender
                    .round(false, &[change(&target, &all)], &Reader::default(), &mut Drain::new())
                    .unwrap();
                assert_eq!(again.sent() + again.same, 0);
                write!(line, " again {:.2}", again.memory_rate() / 1e9).unwrap();
            }
        }
        println!("{line}");
    }
}

#[test]
#[ignore = "a measurement"]
fn how_fast_a_frozen_round_is() {
    let target = Target::start(1024, "random", 0);
    let mut random = Random(3);
    let total = (target.range.end - target.range.start) / PAGE;
    for pages in [100, 1000, 3000, 6000, 20_000] {
        let mut written: Vec<_> = (0..pages)
            .map(|at| target.range.start + (at * total / pages + random.below(3)) * PAGE)
            .map(|addr| addr..addr + PAGE)
            .collect();
        written.dedup();
        let mut line = format!("\n{pages:>6} scattered pages:");
        for threads in [1, 2] {
            let mut best = (Duration::MAX, Duration::ZERO);
            for _ in 0..5 {
                let options = Options { threads, ..Options::default() };
                let (mut sender, mut out) = (Sender::new(options), Drain::new());
                let begin = Instant::now();
                let reader = Reader::default();
                let stats =
                    sender.round(true, &[change(&target, &written)], &reader, &mut out).unwrap();
                assert_eq!(stats.raw, written.len() as u64);
                best = best.min((begin.elapsed(), out.first.unwrap() - begin));
            }
            let per = best.0.as_secs_f64() * 1e6 / written.len() as f64;
            write!(line, "  x{threads} {:?} ({per:.2} us each, first out {:?})", best.0, best.1)
                .unwrap();
        }
        println!("{line}");
    }
}

/// A store that is memory.
struct Flat(Vec<u8>, u64);

impl PageSink for Flat {
    fn write(&mut self, _: u32, addr: u64, pages: &[u8]) -> io::Result<()> {
        let at = (addr - self.1) as usize;
        self.0[at..at + pages.len()].copy_from_slice(pages);
        Ok(())
    }

    fn copy(&mut self, _: (u32, u64), _: (u32, u64)) -> io::Result<()> {
        Ok(())
    }

    fn remove(&mut self, _: u32, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn remove_space(&mut self, _: u32) -> io::Result<()> {
        Ok(())
    }
}

#[test]
#[ignore = "a measurement"]
fn how_fast_memory_is_received() {
    for (contents, compression) in [("random", Compression::Never), ("text", Compression::Always)] {
        let target = Target::start(512, contents, 0);
        let all = [target.range.clone()];
        let mut wire = Vec::new();
        Sender::new(Options { compression, restraint: None, ..Options::default() })
            .round(false, &[change(&target, &all)], &Reader::default(), &mut wire)
            .unwrap();
        let mut store = Flat(vec![1; 512 << 20], target.range.start);
        let mut receiver = Receiver::new();
        let begin = Instant::now();
        for chunk in wire.chunks(MAX_CHUNK) {
            receiver.push(chunk, &mut store).unwrap();
        }
        let rate = (512 << 20) as f64 / begin.elapsed().as_secs_f64() / 1e9;
        println!("\n{contents}: {rate:.2} GB/s of memory received");
    }
}

/// Half seconds with and without copying take turns, so that others who use this host count in both.
#[test]
#[ignore = "a measurement"]
fn what_a_container_loses_while_it_is_copied() {
    let contents = std::env::var("FERRY_MEASURE_WORK").unwrap_or_else(|_| "mixed".into());
    let default = Options::default().restraint;
    for (writers, restraint) in [(1, default), (1, None), (2, default), (2, None)] {
        let mut target = Target::start(512, &contents, writers);
        let (pid, all) = (target.pid(), target.range.clone());
        let (copying, stop, copied) =
            (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
        let (mut alone, mut during) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut sender = Sender::new(Options { restraint, ..Options::default() });
                let reader = Reader::default();
                for part in (0..16).cycle() {
                    while !copying.load(Relaxed) && !stop.load(Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    if stop.load(Relaxed) {
                        break;
                    }
                    let size = (all.end - all.start) / 16;
                    let start = all.start + part * size;
                    let written = std::slice::from_ref(&(start..start + size)).to_vec();
                    let change =
                        Change { pid, space: 1, written: &written, absent: &[], exited: false };
                    let stats = sender.round(false, &[change], &reader, &mut Drain::new()).unwrap();
                    copied.fetch_add(stats.read * PAGE, Relaxed);
                }
            });
            for _ in 0..20 {
                alone.push(target.speed(5));
                copying.store(true, Relaxed);
                target.speed(2);
                during.push(target.speed(5));
                copying.store(false, Relaxed);
                target.speed(2);
            }
            stop.store(true, Relaxed);
        });
        let median = |all: &mut Vec<f64>| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let mut parts: Vec<_> =
            alone.windows(2).zip(&during).map(|(a, d)| d * 2.0 / (a[0] + a[1])).collect();
        let (alone, part) = (median(&mut alone), median(&mut parts));
        println!(
            "\n{writers} x {contents}, {restraint:?}: {alone:.0} pages/s, {:.1} % lost, {:.2} GB/s",
            100.0 * (1.0 - part),
            // Copied during 20 times 6 tenths of a second.
            copied.load(Relaxed) as f64 / 12.0 / 1e9
        );
    }
}
