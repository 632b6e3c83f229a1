//! The client: one connection, one question every millisecond, and how long no answer came.
//!
//! ```text
//!  ask ─▶ answer · 1 ms · ask ─▶ answer · 1 ms · ask ─────── frozen ───────▶ answer
//!              └─ gap ───────────────┘               gap: from answer to answer
//! ```
//!
//! It runs in the client's namespace as `ferry-bench ask` and costs next to nothing: on a small
//! machine a busy client would take the time that the move needs. A gap includes the millisecond.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::Host;
use serde::{Deserialize, Serialize};

use crate::reporter::{self, Reporter};

/// Between an answer and the next question.
const INTERVAL: Duration = Duration::from_millis(1);
/// How long one answer may take before the connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whom to ask, and what.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Ask {
    /// Where to connect to
    pub(crate) address: String,
    /// The line to send
    #[arg(long)]
    pub(crate) say: String,
    /// More connections, which only have to be alive at the end
    #[arg(long, default_value_t = 0)]
    pub(crate) idle: usize,
}

/// What the client saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Longest time from one answer to the next, milliseconds.
    pub(crate) longest_gap_ms: f64,
    /// Answers.
    pub(crate) answers: u64,
    /// Connections that did not live to the end.
    pub(crate) lost: usize,
    /// What ended the first of them.
    pub(crate) error: Option<String>,
}

/// Asks until the input ends, then prints what was seen.
pub(crate) fn run(ask: &Ask) -> Result<()> {
    let mut first = Line::connect(&ask.address)?;
    let idle: Result<Vec<_>> = (0..ask.idle).map(|_| Line::connect(&ask.address)).collect();
    let mut idle = idle?;
    for line in &mut idle {
        line.ask(&ask.say)?;
    }
    let ended = reporter::input_ended();

    let mut seen = Seen { longest_gap_ms: 0.0, answers: 0, lost: 0, error: None };
    first.ask(&ask.say)?;
    let mut last = Instant::now();
    reporter::say_ready();
    while !ended.load(Ordering::Relaxed) {
        std::thread::sleep(INTERVAL);
        if let Err(e) = first.ask(&ask.say) {
            seen.lose(&e);
            break;
        }
        let gap = last.elapsed();
        last += gap;
        seen.answers += 1;
        seen.longest_gap_ms = seen.longest_gap_ms.max(gap.as_secs_f64() * 1000.0);
    }
    for line in &mut idle {
        if let Err(e) = line.ask(&ask.say) {
            seen.lose(&e);
        }
    }
    reporter::say(&seen)
}

impl Seen {
    fn lose(&mut self, error: &anyhow::Error) {
        self.lost += 1;
        self.error.get_or_insert_with(|| format!("{error:#}"));
    }
}

/// A connection on which a line is answered by a line.
struct Line {
    stream: BufReader<TcpStream>,
    answer: String,
}

impl Line {
    fn connect(address: &str) -> Result<Self> {
        let stream =
            TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream), answer: String::new() })
    }

    fn ask(&mut self, say: &str) -> Result<()> {
        self.stream.get_mut().write_all(format!("{say}\r\n").as_bytes()).context("ask")?;
        self.answer.clear();
        let length = self.stream.read_line(&mut self.answer).context("wait for an answer")?;
        ensure!(length > 0, "the server hung up");
        ensure!(!self.answer.starts_with('-'), "the answer was {}", self.answer.trim());
        Ok(())
    }
}

/// A client that runs.
pub(crate) type Client = Reporter<Seen>;

/// Starts a client on `host` and waits until it is connected.
///
/// # Errors
/// When it cannot connect.
pub(crate) fn start(host: &Host, ask: &Ask) -> Result<Client> {
    let Ask { address, say, idle } = ask;
    Reporter::start(host, &format!("ask {address} --say {say} --idle {idle}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_error_as_answer_and_a_server_that_hangs_up_are_errors() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in ["+PONG\r\n", "-ERR no\r\n"] {
                assert_eq!(lines.next().unwrap().unwrap(), "PING");
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut line = Line::connect(&address).unwrap();
        line.ask("PING").unwrap();
        assert!(line.ask("PING").unwrap_err().to_string().contains("-ERR no"));
        server.join().unwrap();
        assert!(line.ask("PING").is_err());
    }
}
