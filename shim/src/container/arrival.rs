//! The address that `ferry restore --ip` brings is silent until the command opens it. Should the command be
//! killed before, a container would run that nobody reaches: its shim looks after that.

use super::Container;
use crate::error::{Context as _, Result};
use crate::state::Status;
use ferry_oci::{paths, quarantine};
use log::warn;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// How long the command has; it needs some milliseconds, and a second while packets of others wait.
const COMMAND: Duration = Duration::from_secs(5);

impl Container {
    /// The container runs: sees to it that its address is open in [`COMMAND`].
    pub(super) fn open_later(self: &Arc<Self>, images: &Path) {
        let Some((folder, id)) = paths::restore_of(images) else { return };
        let (folder, id) = (folder.to_owned(), id.to_owned());
        let container = self.clone();
        tokio::spawn(async move {
            sleep(COMMAND).await;
            // The next command undoes the restore of one that has ended.
            if container.snapshot().status == Status::Stopped {
                return;
            }
            let opened = tokio::task::spawn_blocking(move || open(&folder, &id)).await;
            if let Err(err) = opened.context("open the address").and_then(|opened| opened) {
                warn!("{err}");
            }
        });
    }
}

fn open(folder: &Path, id: &str) -> Result<()> {
    let silent = quarantine::present().context("look for the address's rules")?;
    if !silent.iter().any(|other| other == id) {
        return Ok(());
    }
    warn!("ferry restore was lost after the start: opening the address");
    // Now it is nothing to undo any more.
    std::fs::write(folder.join(paths::CHECKPOINT_STARTED), "")
        .context("write down that the container has started")?;
    quarantine::clear(id).context("open the address")
}
