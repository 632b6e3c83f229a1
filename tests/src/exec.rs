//! Running commands, on this machine and inside a host.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::process;

/// Search path inside every host, for its services, for `ssh` and for tests.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a job may take to end once it was told to.
const PATIENCE: Duration = Duration::from_secs(15);

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended. Its own status, or of the signal that ended it.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The output itself when the command succeeded, else an error that shows all of it.
    pub fn checked(self, what: &str) -> Result<Self> {
        if !self.status.success() {
            bail!("`{what}` failed: {self}");
        }
        Ok(self)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.trim().is_empty() {
                write!(f, "\n  {name}: {}", text.trim_end().replace('\n', "\n          "))?;
            }
        }
        Ok(())
    }
}

/// Runs `command` to its end. An error when it fails.
pub fn run(command: &mut Command) -> Result<Output> {
    let what = describe(command);
    output(command)?.checked(&what)
}

/// Runs `command` to its end, whatever that is.
pub fn output(command: &mut Command) -> Result<Output> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start `{}`", describe(command)))?;
    Ok(Output {
        status: done.status,
        stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
    })
}

fn describe(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    words.join(" ")
}

/// Before a process becomes part of a lab: it leaves every descriptor behind that its caller had
/// left open, and enters the cgroups.
const ENTER: &str = r#"
for fd in /proc/self/fd/*; do
    fd=${fd##*/}
    if [ "$fd" -gt 2 ]; then exec {fd}>&-; fi
done
for door in $1; do
    echo 0 >"$door" || exit 125
done
shift
exec "$@"
"#;

/// A command that enters the cgroups of these `cgroup.procs` files; the program is to be added.
pub(crate) fn enter(doors: &[PathBuf]) -> Command {
    let doors: Vec<_> = doors.iter().map(|door| door.to_string_lossy()).collect();
    let mut command = Command::new("/bin/bash");
    command.args(["-c", ENTER, "enter", &doors.join(" ")]);
    command
}

/// What a new process has to enter in order to be on a host.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The host's first process, as this machine sees it.
    pub pid: i32,
    /// The `cgroup.procs` files to write to.
    pub doors: Vec<PathBuf>,
}

impl Entry {
    /// `program` with arguments, on the host, in `/root`, with a clean environment.
    pub fn command(&self, program: &[&str]) -> Command {
        let term = std::env::var("TERM").unwrap_or_else(|_| "dumb".into());
        let mut command = enter(&self.doors);
        command
            .args(["nsenter", "-t", &self.pid.to_string()])
            .args(["-m", "-u", "-i", "-n", "-p", "-C", "-T", "--"])
            .args(["/usr/bin/env", "-i", "-C", "/root", "HOME=/root", "USER=root", "LANG=C.UTF-8"])
            .args([format!("PATH={PATH}"), format!("TERM={term}")])
            .args(program);
        command
    }
}

/// A command that runs beside the test. Killed when dropped.
pub struct Job {
    what: String,
    child: Child,
    /// Whether the child only brings the command onto a host, and signals are not for it.
    enters: bool,
    stdin: Option<ChildStdin>,
    stdout: Capture,
    stderr: Capture,
}

impl Job {
    /// Starts `command` on this machine; `what` names it in errors.
    pub fn start(command: Command, what: &str) -> Result<Self> {
        Self::spawn(command, what, false)
    }

    /// Starts a command made by [Entry::command].
    pub(crate) fn enter(command: Command, what: &str) -> Result<Self> {
        Self::spawn(command, what, true)
    }

    fn spawn(mut command: Command, what: &str, enters: bool) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start `{what}`"))?;
        Ok(Self {
            what: what.to_owned(),
            enters,
            stdin: child.stdin.take(),
            stdout: Capture::of(child.stdout.take()),
            stderr: Capture::of(child.stderr.take()),
            child,
        })
    }

    /// Its processes, as this machine sees them. On a host they take a moment to appear.
    pub fn pids(&self) -> Vec<i32> {
        let child = self.child.id().cast_signed();
        let own = if self.enters { None } else { Some(child) };
        own.into_iter().chain(process::descendants(child)).collect()
    }

    /// Sends `signal` to its processes.
    pub fn signal(&self, signal: Signal) {
        for pid in self.pids() {
            process::signal(pid, signal);
        }
    }

    /// The standard input, once.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Its messages so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> Result<bool> {
        if self.enters {
            // nsenter stops with the process that it waits for, and does not go on with it.
            process::signal(self.child.id().cast_signed(), Signal::SIGCONT);
        }
        Ok(self.child.try_wait().context("look after a job")?.is_some())
    }

    /// Waits until `text` stands in what it printed to either stream.
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !self.stdout().contains(text) && !self.stderr().contains(text) {
            let ended = self.ended()?;
            if ended || Instant::now() > deadline {
                let how = if ended { "ended" } else { "ran on" };
                bail!(
                    "`{}` {how} without \"{text}\"\n  stdout: {}\n  stderr: {}",
                    self.what,
                    self.stdout(),
                    self.stderr()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits for its end by itself; kills it when that takes longer than `patience`.
    pub fn wait(mut self, patience: Duration) -> Result<Output> {
        let deadline = Instant::now() + patience;
        while !self.ended()? {
            if Instant::now() > deadline {
                self.kill();
                let done = self.collect()?;
                bail!("`{}` did not end in {patience:?}: {done}", self.what);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.collect()
    }

    /// Closes its input, asks it to end with SIGTERM, and waits.
    pub fn stop(mut self) -> Result<Output> {
        drop(self.stdin.take());
        while self.pids().is_empty() && !self.ended()? {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.signal(Signal::SIGTERM);
        self.wait(PATIENCE)
    }

    fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn collect(&mut self) -> Result<Output> {
        let status = self.child.wait().context("wait for a job")?;
        Ok(Output { status, stdout: self.stdout.finish(), stderr: self.stderr.finish() })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.kill();
        }
    }
}

/// Reads a stream to its end so that its writer never waits.
struct Capture {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    fn of(stream: Option<impl Read + Send + 'static>) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&text);
        let reader = stream.map(|mut stream| {
            std::thread::spawn(move || {
                let mut buffer = [0; 16384];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    sink.lock().unwrap_or_else(|e| e.into_inner()).extend(&buffer[..n]);
                }
            })
        });
        Self { text, reader }
    }

    fn text(&self) -> String {
        let text = self.text.lock().unwrap_or_else(|e| e.into_inner());
        String::from_utf8_lossy(&text).into_owned()
    }

    /// All of it. A process left behind may hold the stream open: that is not waited for long.
    fn finish(&mut self) -> String {
        let deadline = Instant::now() + Duration::from_secs(1);
        if let Some(reader) = self.reader.take() {
            while !reader.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn an_error_shows_the_command_its_status_and_both_streams() {
        let error = run(&mut shell("echo out; echo err >&2; exit 3")).unwrap_err().to_string();
        for part in ["exit 3", "exit status: 3", "stdout: out", "stderr: err"] {
            assert!(error.contains(part), "{part} is missing in {error}");
        }
    }

    #[test]
    fn a_job_is_waited_for_and_what_it_printed_is_kept() {
        let mut job = Job::start(shell("trap '' TERM; echo ready; cat; echo end"), "job").unwrap();
        job.wait_for("ready", PATIENCE).unwrap();
        let done = job.stop().unwrap();
        assert_eq!(done.stdout, "ready\nend\n");
    }

    #[test]
    fn a_job_is_asked_to_end() {
        let job = Job::start(
            shell("trap 'echo asked; exit 0' TERM; while :; do sleep 0.01; done"),
            "job",
        );
        let mut job = job.unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(!job.ended().unwrap());
        assert_eq!(job.stop().unwrap().stdout, "asked\n");
    }

    #[test]
    fn a_job_that_runs_on_is_killed_and_named() {
        let job = Job::start(shell("exec sleep 100"), "the sleeper").unwrap();
        let error = job.wait(Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("the sleeper"), "{error}");
    }
}
