//! The container's memory at its destination: stored while it still runs at its source, then served
//! by the page daemon.
//!
//! The store belongs to a process of its own, the keeper, which outlives this agent: pages are
//! served until the last one is in, and those of an attempt that failed are there for the next.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_oci::pages::daemon::Client;
use ferry_oci::pages::store::Store;
use ferry_oci::pages::stream::{Receiver, send_hashes};
use ferry_oci::paths;

/// How long a keeper may take to start.
const START: Duration = Duration::from_secs(10);

/// The memory of one container that is on its way here.
pub(super) struct Memory {
    dir: PathBuf,
    /// Until it is complete.
    store: Option<Store>,
    receiver: Receiver,
    client: Client,
}

impl Memory {
    /// Opens the container's store, with what an earlier attempt has left in it.
    ///
    /// # Errors
    /// When no keeper can be started, or another migration writes to its store.
    pub(super) fn open(namespace: &str, container: &str, migration: &str) -> Result<Self> {
        let dir = paths::pages(namespace, container);
        let earlier = Client::connect(&dir);
        let client = match earlier {
            Ok(client) => client,
            Err(_) => {
                crate::pages::remove_stale(&dir)?;
                start_keeper(&dir)?;
                Client::connect_within(&dir, START).context("start the page daemon")?
            }
        };
        let mut store = client.open_store(container, migration).context("open the page store")?;
        store.verify().context("verify the page store")?;
        let client = Client::connect(&dir).context("reach the page daemon")?;
        Ok(Self { dir, store: Some(store), receiver: Receiver::new(), client })
    }

    /// Pages that are there.
    pub(super) fn pages(&self) -> u64 {
        self.store.as_ref().map_or(0, Store::pages)
    }

    /// Writes the hashes of all pages to `out`.
    ///
    /// # Errors
    /// When `out` fails.
    pub(super) fn send_hashes(&self, out: &mut impl io::Write) -> Result<()> {
        let store = self.store.as_ref().context("the memory is complete already")?;
        send_hashes(store.hashes(), out)?;
        Ok(out.flush()?)
    }

    /// Stores a piece of the page stream.
    ///
    /// # Errors
    /// When the stream is damaged or the store is full.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let store = self.store.as_mut().context("the memory is complete already")?;
        self.receiver.push(bytes, store).context("store the pages")?;
        Ok(())
    }

    /// The last round is in: pages are served from now on.
    ///
    /// # Errors
    /// When a round is incomplete, or the keeper is gone.
    pub(super) fn complete(&mut self) -> Result<()> {
        self.receiver.finish().context("the memory is incomplete")?;
        let mut store = self.store.take().context("the memory is complete already")?;
        store.complete().context("serve the pages")
    }

    /// Waits for a restore in CRIU's work folder `work`.
    ///
    /// # Errors
    /// When the keeper cannot.
    pub(super) fn listen(&self, work: &Path, shim: u32) -> Result<()> {
        let keeper = self.client.status().context("ask the page daemon")?.keeper;
        // It must live as long as the container, and not end with the session that started it.
        if let Err(error) = ferry_oci::cgroups::join(keeper, shim) {
            log::debug!("move the page daemon to the shim's cgroups: {error}");
        }
        std::fs::create_dir_all(work).with_context(|| format!("create {}", work.display()))?;
        self.client.listen(&work.join("lazy-pages.socket")).context("serve pages")
    }

    /// The container runs: the rest may be filled.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub(super) fn fill(&self) -> Result<()> {
        // A test that wants it later: the page daemon begins by itself, after 2 s or 30.
        #[cfg(feature = "fault-points")]
        match std::env::var("FERRY_FILL").as_deref() {
            Ok("late") => return Ok(()),
            Ok("held") => return Ok(self.client.hold_fill()?),
            _ => {}
        }
        Ok(self.client.fill()?)
    }

    /// Gives up a restore; what is in the store stays for the next attempt.
    pub(super) fn abort(self) {
        if let Err(error) = self.client.abort_restore() {
            log::debug!("abort the restore from {}: {error}", self.dir.display());
        }
    }
}

fn start_keeper(dir: &Path) -> Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.arg("pages").arg("--dir").arg(dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().context("start the page daemon")?;
    ensure!(child.id() != 0, "the page daemon has no pid");
    Ok(())
}
