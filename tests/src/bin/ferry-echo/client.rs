//! What both clients do: many connections at once, one request after the other on each, every
//! answer checked and timed, no second chance.

use std::io;
use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::report::Report;
use crate::{Options, stop};

/// How long a request may stay unanswered once it is time to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a waiting connection looks whether it is time to end.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// One connection of a client.
pub(crate) trait Connection {
    /// Sends request number `n`, counted from 1, and checks its answer.
    fn request(&mut self, n: u64) -> io::Result<()>;
    /// The client's end of it.
    fn local(&self) -> String;
    /// How many messages were sent again because no answer came.
    fn resent(&self) -> u64 {
        0
    }
}

pub(crate) fn run<C: Connection>(
    options: &Options,
    connect: impl Fn(u32) -> io::Result<C> + Sync,
) -> Result<(), String> {
    match options.seconds {
        Some(seconds) => {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_secs(seconds));
                stop::request();
            });
        }
        None => stop::at_end_of_input(),
    }
    let report = Mutex::new(Report::new(options.connections));
    let waiting = AtomicU32::new(options.connections);
    std::thread::scope(|scope| {
        for n in 0..options.connections {
            let (report, waiting, connect) = (&report, &waiting, &connect);
            scope.spawn(move || {
                let connection = connect(n);
                if waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
                    eprintln!("ready");
                }
                let mine = drive(n, connection, options);
                report.lock().unwrap_or_else(|e| e.into_inner()).add(mine);
            });
        }
    });
    println!("{}", report.into_inner().unwrap_or_else(|e| e.into_inner()).json());
    Ok(())
}

/// Sends requests on one connection until it is time to end or something is wrong.
fn drive(n: u32, connection: io::Result<impl Connection>, options: &Options) -> Report {
    let mut report = Report::default();
    let mut connection = match connection {
        Ok(connection) => connection,
        Err(e) => {
            report.errors.push(format!("connection {n}: connect: {e}"));
            return report;
        }
    };
    report.sockets.push(connection.local());
    while !stop::now() {
        let start = Instant::now();
        let number = report.requests + 1;
        let answer = connection.request(number);
        report.longest_gap = report.longest_gap.max(start.elapsed());
        if let Err(e) = answer {
            let after = start.elapsed().as_millis();
            report.errors.push(format!("connection {n}: request {number}: {e} (after {after} ms)"));
            break;
        }
        report.requests = number;
        if options.interval_us > 0 {
            std::thread::sleep(Duration::from_micros(options.interval_us));
        }
    }
    report.resent = connection.resent();
    report
}

/// Fills `buffer`. The stream has a read timeout of [LOOK].
pub(crate) fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match stream.read(&mut buffer[done..]) {
            Ok(0) => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "server hung up"));
            }
            Ok(n) => done += n,
            Err(e) if is_patient(&e) => {}
            Err(e) if waits(&e) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Whether `error` says only that nothing came yet, and waiting on is right.
pub(crate) fn is_patient(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
        || waits(error) && stop::since().is_none_or(|time| time < PATIENCE)
}

fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
        && error.raw_os_error() != Some(ETIMEDOUT)
}

/// What a connection says that was given up: an error, not a wait.
const ETIMEDOUT: i32 = 110;
