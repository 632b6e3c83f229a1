//! ferry-memory: a workload that knows what every byte of its memory must be.
//!
//! ```text
//! ferry-memory check  [--port N] [--processes N] [--threads N] [--megabytes N] [--rate N] [--events N]
//! ferry-memory writer [--port N] [--megabytes N] [--rate N] [--content random|repetitive]
//! ferry-memory hold   [--port N] [--megabytes N] [--kind dense|locked|shared|memoryfile|file|...]
//! ```
//!
//! `check` has memory of every kind, in processes that share it copy-on-write and in threads, and
//! never leaves it alone: it writes `--rate` pages and maps, moves, frees and forks `--events` times
//! a second. `writer` writes `--rate` MB/s, one page of 4 KB after the other, at random places of a
//! working set of `--megabytes`. `hold` has memory of one kind, written once.
//!
//! All say `ready` when they are, and answer lines on a TCP port:
//!
//! ```text
//! check    ok 51200 pages | wrong: ...     all stops until every byte was looked at
//! stats    one line of JSON
//! guards stay | guards change     whether guard pages are made and taken away; they are at first
//! guard PAGE                      of hold: makes that page a guard, or an empty page again
//! ```
//!
//! It uses nothing but the standard library, so that `rustc` alone builds it, statically.

mod area;
mod control;
mod hold;
mod kinds;
mod pattern;
mod server;
mod sys;
mod turn;
mod worker;
mod writer;

use std::process::ExitCode;

fn main() -> ExitCode {
    sys::stop_at_signal();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.split_first() {
        Some((&"check", rest)) => Options::parse(rest).and_then(|o| control::run(&o)),
        Some((&"writer", rest)) => Options::parse(rest).and_then(|o| writer::run(&o)),
        Some((&"hold", rest)) => Options::parse(rest).and_then(|o| hold::run(&o)),
        _ => Err("say check, writer or hold".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ferry-memory: {e}");
            ExitCode::FAILURE
        }
    }
}

/// What the command line says.
#[derive(Clone)]
struct Options {
    port: u16,
    processes: usize,
    threads: usize,
    megabytes: usize,
    rate: u64,
    events: u64,
    repetitive: bool,
    kind: kinds::Kind,
}

impl Options {
    fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            port: 7778,
            processes: 3,
            threads: 2,
            megabytes: 32,
            rate: 1000,
            events: 50,
            repetitive: false,
            kind: kinds::Kind::Dense,
        };
        for pair in words.chunks(2) {
            let [word, value] = pair else { return Err(format!("{} needs a value", pair[0])) };
            match *word {
                "--port" => options.port = number(word, value)?,
                "--processes" => options.processes = number::<usize>(word, value)?.clamp(1, 16),
                "--threads" => options.threads = number::<usize>(word, value)?.min(16),
                "--megabytes" => options.megabytes = number::<usize>(word, value)?.max(1),
                "--rate" => options.rate = number(word, value)?,
                "--events" => options.events = number(word, value)?,
                "--kind" => {
                    let named = |kind: &kinds::Kind| format!("{kind:?}").to_lowercase() == *value;
                    let found = kinds::Kind::ALL.into_iter().find(named);
                    options.kind = found.ok_or_else(|| format!("there is no kind {value}"))?;
                }
                "--content" => {
                    options.repetitive = match *value {
                        "repetitive" => true,
                        "random" => false,
                        _ => return Err(format!("there is no content {value}")),
                    }
                }
                _ => return Err(format!("there is no option {word}")),
            }
        }
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(word: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{word} needs a number, not {value}"))
}

#[cfg(test)]
mod tests {
    use super::Options;

    #[test]
    fn options_are_read_and_unknown_ones_refused() {
        let options = Options::parse(&["--rate", "50", "--content", "repetitive"]).unwrap();
        assert_eq!((options.rate, options.repetitive, options.processes), (50, true, 3));
        let options = Options::parse(&["--kind", "memoryfile"]).unwrap();
        assert_eq!(options.kind, super::kinds::Kind::MemoryFile);
        for bad in [
            &["--port"][..],
            &["--port", "x"],
            &["--pages", "1"],
            &["--content", "zero"],
            &["--kind", "x"],
        ] {
            assert!(Options::parse(bad).is_err(), "{bad:?}");
        }
    }
}
