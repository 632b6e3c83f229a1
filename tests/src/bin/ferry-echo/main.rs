//! ferry-echo: a workload that notices when a byte is lost, repeated or changed.
//!
//! ```text
//! ferry-echo serve [--bind ADDRESS] --port N
//! ferry-echo client ADDRESS:PORT [--connections N] [--udp] [--interval-us N] [--size N] [--seconds N]
//! ferry-echo redis  ADDRESS:PORT [--connections N] [--interval-us N] [--seconds N]
//! ```
//!
//! The server counts the messages of every connection and keeps a digest of them, and puts both
//! into each answer: a server whose memory was damaged or set back gives a wrong answer. A client
//! never connects again. It says `ready` once it is connected and prints a report in JSON when its
//! input ends (not with `--seconds`) or at SIGTERM.
//!
//! It uses nothing but the standard library, so that `rustc` alone builds it, statically.

mod client;
mod echo;
mod frame;
mod redis;
mod report;
mod server;
mod stop;

use std::process::ExitCode;

fn main() -> ExitCode {
    stop::at_signal();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.split_first() {
        Some((&"serve", rest)) => Options::parse(rest).and_then(|o| server::run(&o)),
        Some((&"client", [address, rest @ ..])) => {
            Options::parse(rest).and_then(|o| client::run(&o, |n| echo::connect(address, n, &o)))
        }
        Some((&"redis", [address, rest @ ..])) => {
            Options::parse(rest).and_then(|o| client::run(&o, |n| redis::connect(address, n)))
        }
        _ => Err("say serve, client ADDRESS or redis ADDRESS".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ferry-echo: {e}");
            ExitCode::FAILURE
        }
    }
}

/// What the command line says beside the address.
struct Options {
    bind: String,
    port: u16,
    connections: u32,
    udp: bool,
    interval_us: u64,
    size: usize,
    seconds: Option<u64>,
}

impl Options {
    fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            bind: "0.0.0.0".into(),
            port: 7777,
            connections: 1,
            udp: false,
            interval_us: 1000,
            size: 1024,
            seconds: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if *word == "--udp" {
                options.udp = true;
                continue;
            }
            let value = *words.next().ok_or_else(|| format!("{word} needs a value"))?;
            match *word {
                "--bind" => options.bind = value.into(),
                "--port" => options.port = number(word, value)?,
                "--connections" => options.connections = number(word, value)?,
                "--interval-us" => options.interval_us = number(word, value)?,
                "--size" => options.size = number::<usize>(word, value)?.clamp(1, frame::MOST),
                "--seconds" => options.seconds = Some(number(word, value)?),
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
        let options = Options::parse(&["--connections", "50", "--udp", "--seconds", "3"]).unwrap();
        assert_eq!((options.connections, options.udp, options.seconds), (50, true, Some(3)));
        assert!(Options::parse(&["--port"]).is_err());
        assert!(Options::parse(&["--port", "x"]).is_err());
        assert!(Options::parse(&["--reconnect", "1"]).is_err());
    }
}
