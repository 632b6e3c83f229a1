//! A part of this program that runs on the client's host until its input ends and then says what it
//! saw, in JSON.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use ferry_tests::{Host, Job};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long it may take to connect.
const START: Duration = Duration::from_secs(20);
/// How long it may take to end: answers may still be on their way.
const END: Duration = Duration::from_secs(120);

/// One that runs, and will say a `T`.
pub(crate) struct Reporter<T> {
    job: Job,
    says: PhantomData<T>,
}

impl<T: DeserializeOwned> Reporter<T> {
    /// Starts `ferry-bench WORDS` on `host`, where this program is, and waits until it is connected.
    ///
    /// # Errors
    /// When it cannot connect.
    pub(crate) fn start(host: &Host, words: &str) -> Result<Self> {
        let mut job = host.spawn(&format!("exec ferry-bench {words}"))?;
        job.wait_for("ready", START)?;
        Ok(Self { job, says: PhantomData })
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it says nothing.
    pub(crate) fn finish(mut self) -> Result<T> {
        // Its input ends.
        drop(self.job.stdin());
        let output = self.job.wait(END)?;
        let line = output.stdout.lines().last().with_context(|| format!("no report: {output}"))?;
        serde_json::from_str(line).with_context(|| format!("read {line}"))
    }
}

/// Whether the input of this process has ended, from now on.
pub(crate) fn input_ended() -> &'static AtomicBool {
    static ENDED: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        ENDED.store(true, Ordering::Relaxed);
    });
    &ENDED
}

/// Says it is connected.
pub(crate) fn say_ready() {
    eprintln!("ready");
}

/// Says what was seen.
///
/// # Errors
/// When that is no JSON.
pub(crate) fn say(seen: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(seen)?);
    Ok(())
}
