//! The client that has no connection yet: every millisecond it tries a new one, asks on it, and hangs
//! up at the answer.
//!
//! ```text
//!  try ─▶ connected ─▶ ask ─▶ answer      one attempt; the next begins a millisecond after this one,
//!    try ─▶ ...                           whether this one has come to an end or not
//! ```
//!
//! The longest time from one answer to the next is the time from the freeze to the first answer on a
//! new connection, and a millisecond more. An attempt never waits for an earlier one: one whose first
//! packet was lost takes a second, and somebody else's does not.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc::linger;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use crate::reporter;

/// Between the beginnings of two attempts.
const INTERVAL: Duration = Duration::from_millis(1);
/// Attempts that may be under way; the oldest is given up for a new one.
const MOST: usize = 900;
/// How long the first attempts may take.
const START: Duration = Duration::from_secs(20);

/// Whom to connect to, and what to say.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Connect {
    /// Where to connect to
    pub(crate) address: SocketAddrV4,
    /// The line to send
    #[arg(long)]
    pub(crate) say: String,
}

/// What it saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Connected {
    /// Longest time from one answer on a new connection to the next one, milliseconds.
    pub(crate) longest_gap_ms: f64,
    /// Connections that got their answer.
    pub(crate) answers: u64,
    /// Attempts that were refused, or broke before their answer.
    pub(crate) refused: u64,
    /// Attempts that were given up.
    pub(crate) given_up: u64,
}

/// Tries until the input ends, then prints what was seen.
///
/// # Errors
/// When there is never an answer.
pub(crate) fn run(connect: &Connect) -> Result<()> {
    let mut prober = Prober::new(connect);
    let begun = Instant::now();
    while prober.seen.answers == 0 {
        ensure!(begun.elapsed() < START, "no answer from {}: {:?}", connect.address, prober.seen);
        prober.step()?;
    }
    prober.seen = Connected { answers: 1, ..Connected::default() };
    let ended = reporter::input_ended();
    reporter::say_ready();
    while !ended.load(Ordering::Relaxed) {
        prober.step()?;
    }
    reporter::say(&prober.seen)
}

/// One attempt.
struct Attempt {
    stream: TcpStream,
    asked: bool,
}

/// What became of an attempt.
enum Progress {
    Waits,
    Answered,
    Broke,
}

impl Attempt {
    /// Begins to connect.
    fn begin(address: SocketAddrV4) -> Result<Option<Self>> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket: OwnedFd = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)
            .context("make a socket")?;
        // Reset at the end: connections that linger would use up all ports in half a minute.
        socket::setsockopt(&socket, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
        let begun = match socket::connect(socket.as_raw_fd(), &SockaddrIn::from(address)) {
            Ok(()) | Err(Errno::EINPROGRESS) => true,
            // Nobody has the address, at this moment.
            Err(Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::ECONNREFUSED) => false,
            Err(e) => bail!("connect: {e}"),
        };
        Ok(begun.then(|| Self { stream: TcpStream::from(socket), asked: false }))
    }

    /// Goes on where the kernel says that something has happened.
    fn go_on(&mut self, say: &[u8]) -> Progress {
        if !self.asked {
            if !matches!(self.stream.take_error(), Ok(None)) || self.stream.write_all(say).is_err()
            {
                return Progress::Broke;
            }
            self.asked = true;
            return Progress::Waits;
        }
        match self.stream.read(&mut [0; 256]) {
            Ok(1..) => Progress::Answered,
            Err(e) if e.kind() == ErrorKind::WouldBlock => Progress::Waits,
            _ => Progress::Broke,
        }
    }
}

struct Prober {
    address: SocketAddrV4,
    say: Vec<u8>,
    /// The oldest first.
    under_way: VecDeque<Attempt>,
    /// When the next attempt is due.
    next: Instant,
    /// When the last answer came.
    last: Option<Instant>,
    seen: Connected,
}

impl Prober {
    fn new(connect: &Connect) -> Self {
        Self {
            address: connect.address,
            say: format!("{}\r\n", connect.say).into_bytes(),
            under_way: VecDeque::new(),
            next: Instant::now(),
            last: None,
            seen: Connected::default(),
        }
    }

    /// Begins an attempt if one is due, and waits for the others until the next one is.
    fn step(&mut self) -> Result<()> {
        let now = Instant::now();
        if now >= self.next {
            self.begin()?;
            // One that was late is not made up for: this is no load.
            self.next = (self.next + INTERVAL).max(now);
        }
        let left = self.next.saturating_duration_since(Instant::now());
        let flags = |attempt: &Attempt| match attempt.asked {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLOUT,
        };
        let mut polled: Vec<_> =
            self.under_way.iter().map(|a| PollFd::new(a.stream.as_fd(), flags(a))).collect();
        match ppoll(&mut polled, Some(TimeSpec::from_duration(left)), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => bail!("wait for connections: {e}"),
        }
        let happened: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or_default()).collect();
        let mut happened = happened.into_iter();
        let (say, seen, last) = (&self.say, &mut self.seen, &mut self.last);
        self.under_way.retain_mut(|attempt| {
            if !happened.next().unwrap_or_default() {
                return true;
            }
            match attempt.go_on(say) {
                Progress::Waits => return true,
                Progress::Broke => seen.refused += 1,
                Progress::Answered => {
                    let now = Instant::now();
                    if let Some(last) = last.replace(now) {
                        let gap = (now - last).as_secs_f64() * 1000.0;
                        seen.longest_gap_ms = seen.longest_gap_ms.max(gap);
                    }
                    seen.answers += 1;
                }
            }
            false
        });
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        if self.under_way.len() >= MOST {
            self.under_way.pop_front();
            self.seen.given_up += 1;
        }
        match Attempt::begin(self.address)? {
            Some(attempt) => self.under_way.push_back(attempt),
            None => self.seen.refused += 1,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::{SocketAddr, TcpListener};

    use super::*;

    #[test]
    fn the_gap_is_from_an_answer_to_the_next_one_on_another_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("no IPv4") };
        let mut prober = Prober::new(&Connect { address, say: "PING".into() });
        let answer = || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            assert_eq!(line, "PING\r\n");
            stream.write_all(b"+PONG\r\n").unwrap();
            // Its client hangs up by a reset.
            let _ = stream.read(&mut [0; 1]);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                answer();
                std::thread::sleep(Duration::from_millis(60));
                answer();
            });
            while prober.seen.answers < 2 {
                prober.step().unwrap();
            }
        });
        let gap = prober.seen.longest_gap_ms;
        assert!((50.0..5000.0).contains(&gap), "{gap}");
        // Attempts went on meanwhile.
        assert!(prober.under_way.len() > 10, "{}", prober.under_way.len());
    }

    #[test]
    fn refused_attempts_are_counted_and_nothing_else_happens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("no IPv4") };
        drop(listener);
        let mut prober = Prober::new(&Connect { address, say: "PING".into() });
        while prober.seen.refused < 3 {
            prober.step().unwrap();
        }
        assert_eq!(prober.seen.answers, 0);
        assert_eq!(prober.seen.longest_gap_ms, 0.0);
    }
}
