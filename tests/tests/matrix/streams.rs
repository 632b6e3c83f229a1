//! Every kind of stream, of a task and of an exec: what the process writes arrives, all of it.

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::by_hand::{ByHand, IDLE, Shim, exec_request};
use ferry_tests::events::Event;
use ferry_tests::task::api::{self, Status};

use crate::{Answers, SHIMS, show};

/// Copies its streams into files, as nerdctl's logger does: 3 and 4 to read from, 5 to say that it
/// is ready.
const LOGGER: &str = "#!/bin/bash
cat <&3 5>&- >/tmp/logged.out & cat <&4 5>&- >/tmp/logged.err & exec 5>&-; wait";
/// Bytes that a FIFO and a pipe hold together, and one of them does not.
const MUCH: &str = "100000";
/// For less than this, 1 s, a shim waits for a reader.
const STALL: Duration = Duration::from_millis(800);
const SOON: Duration = Duration::from_secs(30);
const TALK: &[&str] = &["sh", "-c", "echo out; echo err >&2; exit 3"];
const ECHO: &[&str] = &["sh", "-c", "cat; exit 4"];
const TTY: &[&str] = &["sh", "-c", "test -t 0 && test -t 1 && read x && echo got $x; exit 5"];

/// Where streams go.
#[derive(Default)]
struct Streams {
    stdin: String,
    stdout: String,
    stderr: String,
    terminal: bool,
}

/// One process with streams: a task, or an exec of the idle task `streams`.
struct Process<'a> {
    hand: &'a ByHand<'a>,
    shim: &'a Shim,
    name: String,
    exec: bool,
}

impl Process<'_> {
    fn ids(&self) -> (&str, &str) {
        if self.exec { ("streams", &self.name) } else { (&self.name, "") }
    }

    /// Its pid.
    fn start(&self, args: &[&str], streams: &Streams) -> Result<u32> {
        let Streams { stdin, stdout, stderr, terminal } = streams;
        let (id, exec) = self.ids();
        if self.exec {
            let mut request = exec_request(id, exec, args);
            let mut process: serde_json::Value = serde_json::from_slice(&request.spec.value)?;
            process["terminal"] = (*terminal).into();
            request.spec.mut_or_insert_default().value = process.to_string().into_bytes();
            (request.stdin, request.stdout) = (stdin.clone(), stdout.clone());
            (request.stderr, request.terminal) = (stderr.clone(), *terminal);
            self.shim.task.call::<api::Empty>("Exec", &request)?;
        } else {
            let bundle = self.hand.bundle(id, args)?;
            let config = self.hand.path(&bundle).join("config.json");
            let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&config)?)?;
            spec["process"]["terminal"] = (*terminal).into();
            std::fs::write(&config, spec.to_string())?;
            let mut request = self.hand.create_request(id);
            (request.stdin, request.stdout) = (stdin.clone(), stdout.clone());
            (request.stderr, request.terminal) = (stderr.clone(), *terminal);
            self.shim.task.call::<api::CreateTaskResponse>("Create", &request)?;
        }
        self.shim.start(id, exec).context("start")
    }

    /// Waits for its end and removes it; the exit code.
    fn end(&self) -> Result<u32> {
        let (id, exec) = self.ids();
        let limit = Duration::from_secs(30);
        let request =
            api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        let exit: api::WaitResponse = self.shim.task.call_for("Wait", &request, limit)?;
        self.shim.delete(id, exec)?;
        Ok(exit.exit_status)
    }

    /// Removes what a failure has left.
    fn forget(&self) {
        let (id, exec) = self.ids();
        let _ = self.shim.kill(id, exec, 9);
        let _ = self.shim.wait_for_status(id, exec, Status::STOPPED);
        let _ = self.shim.delete(id, exec);
    }

    fn fifo(&self, stream: &str) -> Result<(String, File)> {
        self.hand.fifo(&format!("{}.{stream}", self.name))
    }

    fn null(&self) -> Result<String> {
        self.start(TALK, &Streams::default())?;
        Ok(format!("exit {}", self.end()?))
    }

    fn fifos(&self) -> Result<String> {
        let ((stdout, mut out), (stderr, mut err)) = (self.fifo("out")?, self.fifo("err")?);
        self.start(TALK, &Streams { stdout, stderr, ..Default::default() })?;
        let code = self.end()?;
        Ok(format!("{:?} {:?} exit {code}", text(&mut out)?, text(&mut err)?))
    }

    fn input(&self) -> Result<String> {
        let ((stdin, mut input), (stdout, mut out)) = (self.fifo("in")?, self.fifo("out")?);
        // The reference takes streams without one for errors for a mistake.
        let (stderr, _err) = self.fifo("err")?;
        self.start(ECHO, &Streams { stdin, stdout, stderr, ..Default::default() })?;
        input.write_all(b"in\n")?;
        drop(input);
        let (id, exec) = self.ids();
        let (id, exec_id) = (id.into(), exec.into());
        let close = api::CloseIORequest { id, exec_id, stdin: true, ..Default::default() };
        self.shim.task.call::<api::Empty>("CloseIO", &close)?;
        let code = self.end()?;
        Ok(format!("{:?} exit {code}", text(&mut out)?))
    }

    fn file(&self) -> Result<String> {
        let log = format!("/tmp/{}/new/log", self.name);
        let uri = format!("file://{log}");
        self.start(TALK, &Streams { stdout: uri.clone(), stderr: uri, ..Default::default() })?;
        let code = self.end()?;
        let log = std::fs::read_to_string(self.hand.path(&log)).context("read the log")?;
        let mut lines: Vec<_> = log.lines().collect();
        lines.sort_unstable();
        Ok(format!("{lines:?} exit {code}"))
    }

    fn binary(&self) -> Result<String> {
        let host = self.hand.host;
        let logger = self.hand.path("/usr/local/bin/logger");
        std::fs::write(&logger, LOGGER).context("write the logger")?;
        host.run("chmod +x /usr/local/bin/logger; rm -f /tmp/logged*")?;
        let uri = "binary:///usr/local/bin/logger?key=value".to_owned();
        self.start(TALK, &Streams { stdout: uri.clone(), stderr: uri, ..Default::default() })?;
        let code = self.end()?;
        // The reference ends it before it has ended by itself.
        host.wait_until("the logger has written", |h| {
            h.output("test -s /tmp/logged.out -a -s /tmp/logged.err")
                .is_ok_and(|o| o.status.success())
        })?;
        let read = |name: &str| std::fs::read_to_string(self.hand.path(name)).context("read a log");
        Ok(format!("{:?} {:?} exit {code}", read("/tmp/logged.out")?, read("/tmp/logged.err")?))
    }

    fn terminal(&self) -> Result<String> {
        let ((stdin, mut input), (stdout, mut out)) = (self.fifo("in")?, self.fifo("out")?);
        self.start(TTY, &Streams { stdin, stdout, terminal: true, ..Default::default() })?;
        input.write_all(b"in\n")?;
        let code = self.end()?;
        drop(input);
        Ok(format!("{:?} exit {code}", text(&mut out)?))
    }

    /// Writes more than a FIFO holds and ends before anybody has read it: its end must not be told before the
    /// last byte is in the FIFO. Whether that was seen in the time for which a shim waits for a reader.
    fn tells_last(&self) -> Result<bool> {
        let (stdout, mut out) = self.fifo("out")?;
        let args = ["head", "-c", MUCH, "/dev/zero"];
        let pid = self.start(&args, &Streams { stdout, ..Default::default() })?;
        let (id, exec) = self.ids();
        let told = |events: &[Event]| events.iter().any(|e| e.topic == "exit" && e.exec == exec);
        let process = self.hand.path(&format!("/proc/{pid}"));
        let (start, mut alive) = (Instant::now(), Instant::now());
        loop {
            let now = Instant::now();
            if !process.exists() {
                break;
            }
            alive = now;
            ensure!(start.elapsed() < SOON, "it has not ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Time enough for an event that waits for nothing.
        std::thread::sleep(Duration::from_millis(200));
        let early = told(&self.hand.events.of(id));
        let seen = alive.elapsed() < STALL;
        let mut bytes = vec![0; 1 << 20];
        // One read takes all that is there.
        let mut count = out.read(&mut bytes).context("read a FIFO")?;
        ensure!(!early || !seen, "its end was told with {count} bytes in the FIFO");
        self.hand.events.wait_for(id, SOON, told)?;
        count += out.read(&mut bytes).unwrap_or_default();
        ensure!(!seen || count.to_string() == MUCH, "{count} bytes when its end was told");
        self.end()?;
        Ok(seen)
    }
}

/// What is there to be read.
fn text(from: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    match from.read_to_end(&mut bytes) {
        Err(err) if err.kind() != std::io::ErrorKind::WouldBlock => Err(err).context("read a FIFO"),
        _ => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

/// A kind of streams, and what has to come through them.
type Kind = (&'static str, fn(&Process<'_>) -> Result<String>, &'static str);

const KINDS: [Kind; 6] = [
    ("null", |process| process.null(), "exit 3"),
    ("fifo", |process| process.fifos(), r#""out\n" "err\n" exit 3"#),
    ("fifo for input", |process| process.input(), r#""in\n" exit 4"#),
    ("file", |process| process.file(), r#"["err", "out"] exit 3"#),
    ("binary", |process| process.binary(), r#""out\n" "err\n" exit 3"#),
    ("terminal", |process| process.terminal(), r#""in\r\ngot in\r\n" exit 5"#),
];

fn answers(hand: &ByHand<'_>, program: &str) -> Result<Answers> {
    let shim = hand.shim(program, "streams", crate::service()?)?;
    hand.create(&shim, "streams", IDLE)?;
    shim.start("streams", "")?;
    let mut answers = Answers::new();
    for exec in [false, true] {
        for (n, (kind, run, expected)) in KINDS.iter().enumerate() {
            let what = if exec { "exec" } else { "task" };
            let process =
                Process { hand, shim: &shim, name: format!("{what}-{n}-of-{program}"), exec };
            let answer = run(&process).unwrap_or_else(|err| {
                process.forget();
                format!("{err:#}")
            });
            println!("  {kind}, {what}: {answer}");
            // The reference can lose the end of an output.
            ensure!(program != SHIMS[0] || answer == *expected, "{kind}, {what}: {answer}");
            answers.push((format!("{kind}, {what}"), answer));
        }
    }
    shim.has_not_panicked()?;
    shim.kill("streams", "", 9)?;
    shim.wait("streams", "")?;
    shim.delete("streams", "")?;
    Ok(answers)
}

#[test]
fn every_kind_of_stream_carries_all_of_it() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    let mut both = [Answers::new(), Answers::new()];
    for (program, of) in SHIMS.into_iter().zip(&mut both) {
        println!("{program}:");
        *of = answers(&hand, program)?;
        hand.clear()?;
    }
    show("streams", &both)
}

/// Not with the reference, which tells of the end at once.
#[test]
fn the_end_of_a_process_is_told_after_its_last_byte() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    let shim = hand.shim(SHIMS[0], "streams", crate::service()?)?;
    hand.create(&shim, "streams", IDLE)?;
    shim.start("streams", "")?;
    for exec in [false, true] {
        let mut seen = false;
        for n in 0..10 {
            let what = if exec { "exec" } else { "task" };
            let process =
                Process { hand: &hand, shim: &shim, name: format!("{what}-{n}-that-ends"), exec };
            seen = process.tells_last().with_context(|| what.to_owned())?;
            if seen {
                break;
            }
        }
        ensure!(seen, "the machine is too busy to see it");
    }
    Ok(())
}
