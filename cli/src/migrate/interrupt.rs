//! Ctrl-C and its like: what they mean depends on how far the migration has come.
//!
//! ```text
//!               the first one                       another one
//! undecided     everything is undone                leaves: each host undoes its part by itself
//! undoing       told so                             leaves, as above
//! decided       told so, and it is finished         leaves: the same command settles it
//! settling      leaves: the same command settles it
//! ```

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How far a migration has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Before the commit.
    Undecided,
    /// It has failed and is being undone.
    Undoing,
    /// From the commit on.
    Decided,
    /// One that was decided earlier is being settled.
    Settling,
}

/// What is known when somebody leaves.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) container: String,
    pub(super) here: String,
    pub(super) there: String,
}

/// Hears SIGINT, SIGTERM and SIGHUP from its making on; none of them ends the process then.
#[derive(Debug, Clone)]
pub(super) struct Interrupt {
    /// How many have come, and the last one's name.
    heard: watch::Receiver<(u32, &'static str)>,
    stage: Arc<AtomicU8>,
}

impl Interrupt {
    /// Begins to listen.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn listen() -> Result<Self> {
        let ignored = ignored();
        let (tell, heard) = watch::channel((0, ""));
        let tell = Arc::new(tell);
        for (name, kind) in [
            ("SIGINT", SignalKind::interrupt()),
            ("SIGTERM", SignalKind::terminate()),
            ("SIGHUP", SignalKind::hangup()),
        ] {
            // As nohup does, and shells for what they run in the background.
            if ignored >> (kind.as_raw_value() - 1) & 1 == 1 {
                continue;
            }
            let mut signal = signal(kind).with_context(|| format!("listen for {name}"))?;
            let tell = tell.clone();
            tokio::spawn(async move {
                while signal.recv().await.is_some() {
                    tell.send_modify(|(count, last)| (*count, *last) = (*count + 1, name));
                }
            });
        }
        Ok(Self { heard, stage: Arc::default() })
    }

    /// Says how far it has come.
    pub(super) fn enter(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::SeqCst);
    }

    fn stage(&self) -> Stage {
        use Stage::{Decided, Settling, Undecided, Undoing};
        let stage = self.stage.load(Ordering::SeqCst);
        [Undoing, Decided, Settling].into_iter().find(|s| *s as u8 == stage).unwrap_or(Undecided)
    }

    /// Waits for a signal, or finds that one has come; its name.
    pub(super) async fn come(&self) -> &'static str {
        self.beyond(0).await.1
    }

    async fn beyond(&self, count: u32) -> (u32, &'static str) {
        let mut heard = self.heard.clone();
        match heard.wait_for(|(now, _)| *now > count).await {
            Ok(heard) => *heard,
            // Nobody listens: all are ignored, or the runtime ends.
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until it is time to leave whatever is under way, and gives the text to leave with.
    pub(super) async fn leave(&self, names: &Names) -> anyhow::Error {
        let Names { container, here, there } = names;
        let (mut count, mut name) = self.beyond(0).await;
        if self.stage() != Stage::Settling {
            let told = match self.stage() {
                Stage::Decided => format!(
                    "{container} is committed to {there}, and that is being finished; again to \
                     leave at once, and then run the same command again to settle it"
                ),
                _ => "it is being undone; again to leave at once".to_owned(),
            };
            // The terminal may be gone.
            let _ = writeln!(std::io::stderr(), "{name}: {told}");
            (count, name) = self.beyond(count).await;
        }
        log::debug!("left at signal {count}");
        match self.stage() {
            Stage::Undecided | Stage::Undoing => anyhow!(
                "left by {name} while it was being undone\n{container} runs on {here}; each host \
                 removes by itself what is left of the migration"
            ),
            Stage::Decided | Stage::Settling => anyhow!(
                "left by {name} after the commit\n{container} runs on {there}, or is frozen on \
                 {here} until {there} has been asked; run the same command again to settle it"
            ),
        }
    }
}

/// Signals that this process was started with the order to ignore, as bits from signal 1 on.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let [container, here, there] = ["redis", "a", "b"].map(str::to_owned);
        Names { container, here, there }
    }

    fn interrupt() -> (watch::Sender<(u32, &'static str)>, Interrupt) {
        let (tell, heard) = watch::channel((0, ""));
        (tell, Interrupt { heard, stage: Arc::default() })
    }

    /// Whether it has not left once everything else has been done.
    async fn stays(left: &mut (impl Future<Output = anyhow::Error> + Unpin)) -> bool {
        let wait = std::time::Duration::from_millis(20);
        tokio::time::timeout(wait, left).await.is_err()
    }

    #[tokio::test]
    async fn the_second_signal_leaves_and_says_what_to_do() {
        for (stage, says) in [
            (Stage::Undecided, "redis runs on a"),
            (Stage::Undoing, "redis runs on a"),
            (Stage::Decided, "run the same command again"),
        ] {
            let (tell, interrupt) = interrupt();
            interrupt.enter(stage);
            let names = names();
            let mut left = std::pin::pin!(interrupt.leave(&names));
            assert!(stays(&mut left).await, "{stage:?}: no signal");
            tell.send_replace((1, "SIGINT"));
            assert_eq!(interrupt.come().await, "SIGINT");
            assert!(stays(&mut left).await, "{stage:?}: one signal");
            tell.send_replace((2, "SIGTERM"));
            let text = left.await.to_string();
            assert!(text.contains(says) && text.contains("SIGTERM"), "{stage:?}: {text}");
        }
    }

    #[tokio::test]
    async fn one_signal_leaves_what_was_decided_before() {
        let (tell, interrupt) = interrupt();
        interrupt.enter(Stage::Settling);
        tell.send_replace((1, "SIGHUP"));
        let text = interrupt.leave(&names()).await.to_string();
        assert!(text.contains("run the same command again"), "{text}");
    }
}
