//! Containers that know what every byte of their memory must be, and who asks them.

use std::io::Write;
use std::process::ChildStdin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::scene::{FLOATING, RUNTIME};
use crate::{Host, Job, Scene};

/// The port it answers on.
const PORT: u16 = 7778;
/// How long an answer may take: a check stops every writer, and reads all there is.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks a container that runs ferry-memory, from the client's host and over one connection: it has
/// to outlive every move.
pub struct Asked {
    job: Job,
    questions: ChildStdin,
    answers: usize,
}

impl Scene {
    /// Starts `ferry-memory MODE` as the container `mem` with the floating address on host `name`,
    /// and connects to it. `more` are options of `ctr run`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn start_memory(&self, name: &str, mode: &str, more: &str) -> Result<Asked> {
        let host = self.host(name);
        host.run(&format!(
            "ip addr add {FLOATING}/24 dev eth0; ctr run -d --null-io --net-host \
             --runtime {RUNTIME} {more} docker.io/library/memory:latest mem \
             ferry-memory {mode} --port {PORT}"
        ))?;
        host.wait_until("ferry-memory listens", |h| {
            let script = format!("ss -Htln 'sport = :{PORT}'");
            h.output(&script).is_ok_and(|o| !o.stdout.trim().is_empty())
        })?;
        let mut job = self.lab.client().spawn(&format!(
            "exec bash -c 'exec 3<>/dev/tcp/{FLOATING}/{PORT} || exit; echo connected; \
             while read -r question; do echo \"$question\" >&3; \
             read -r -u 3 answer || exit; echo \"answer $answer\"; done'"
        ))?;
        job.wait_for("connected", PATIENCE)?;
        let questions = job.stdin().context("the client has no input")?;
        Ok(Asked { job, questions, answers: 0 })
    }
}

impl Asked {
    /// The answer to `question`.
    ///
    /// # Errors
    /// When none comes, or the connection is lost.
    pub fn ask(&mut self, question: &str) -> Result<String> {
        writeln!(self.questions, "{question}").context("ask ferry-memory")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A line that has no end yet is not an answer.
            let text = self.job.stdout();
            let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            if let Some(line) =
                lines.by_ref().filter_map(|l| l.strip_prefix("answer ")).nth(self.answers)
            {
                self.answers += 1;
                return Ok(line.trim_end().to_owned());
            }
            let ended = self.job.ended()?;
            if ended || Instant::now() > deadline {
                let how = if ended { "the connection was lost" } else { "nothing came" };
                bail!("{question}: {how}; stdout {text:?}, stderr {:?}", self.job.stderr());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Has every byte looked at; how many pages that were.
    ///
    /// # Errors
    /// With the first byte that is wrong.
    pub fn check(&mut self) -> Result<u64> {
        let answer = self.ask("check")?;
        let pages = answer.strip_prefix("ok ").and_then(|rest| rest.split(' ').next());
        let pages = pages.and_then(|n| n.parse().ok());
        pages.with_context(|| format!("ferry-memory says {answer:?}"))
    }

    /// Has guard pages stay what they are, or change again, from now on.
    ///
    /// A guard that is made where a page of the store has not come to yet is overwritten by it: the
    /// kernel does not tell the page daemon of guards.
    ///
    /// # Errors
    /// When it does not answer, or has wrong memory.
    pub fn keep_guards(&mut self, keep: bool) -> Result<()> {
        let answer = self.ask(if keep { "guards stay" } else { "guards change" })?;
        ensure!(answer == "ok", "ferry-memory says {answer:?}");
        // After a check everybody knows of it.
        self.check().map(drop)
    }

    /// Its statistics.
    ///
    /// # Errors
    /// When they are no JSON.
    pub fn stats(&mut self) -> Result<Value> {
        let answer = self.ask("stats")?;
        serde_json::from_str(&answer).with_context(|| format!("decode {answer}"))
    }

    /// Waits until it has written more than it had when this was called.
    ///
    /// # Errors
    /// When it does not write.
    pub fn goes_on(&mut self) -> Result<()> {
        let written = |stats: &Value| {
            let count = |key: &str| stats[key].as_f64().unwrap_or_default();
            count("writes") + count("total_mb")
        };
        let before = written(&self.stats()?);
        let deadline = Instant::now() + PATIENCE;
        while written(&self.stats()?) <= before {
            ensure!(Instant::now() < deadline, "nothing was written in {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Names of the containers whose pages `host` keeps or serves, as in `ferry status`.
///
/// # Errors
/// When the host cannot be asked.
pub fn stores(host: &Host) -> Result<Vec<Value>> {
    let text = host.run("ferry status --json")?.stdout;
    let status: Value = serde_json::from_str(&text).with_context(|| format!("decode {text}"))?;
    status["pages"].as_array().cloned().with_context(|| format!("no pages in {text}"))
}

/// Option of `ferry migrate` by which memory comes only when it is touched, until 2 s after the move.
/// Needs ferry built with `fault-points`.
pub const LATE_FILL: &str = "--remote-ferry 'FERRY_FILL=late ferry'";
/// The same, until 30 s after the move or until somebody asks the page daemon for it.
pub const HELD_FILL: &str = "--remote-ferry 'FERRY_FILL=held ferry'";

/// Waits until `host` serves no memory any more: what came is all in its place.
///
/// # Errors
/// When it does not come to that.
pub fn wait_for_fill(host: &Host) -> Result<()> {
    host.wait_until("all memory is in its place", |h| stores(h).is_ok_and(|s| s.is_empty()))
}
