//! The stream of a container's memory, at a socket of its own.

use super::Container;
use super::part::{Part, tracks_writes};
use super::silent::blocking;
use crate::error::{Error, Result};
use crate::state::{Op, admit};
use ferry_oci::pages::serve;
use ferry_oci::pages::tracker::probe;
use ferry_oci::paths;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

/// How long the process that serves it may take to be ready.
const STARTUP: Duration = Duration::from_secs(10);

impl Container {
    /// A socket at which the container's memory can be had, see [`serve`]. Who
    /// serves it ends with its one connection, or with this shim.
    pub(crate) async fn open_pages(&self) -> Result<PathBuf> {
        let _op = self.op.read().await;
        let snapshot = self.snapshot();
        admit(snapshot.status, Op::Checkpoint)?;
        if self.last_pre_dump().is_some() {
            let text = "its memory is tracked for pre-dumps: end them first (ferry predump --end)";
            return Err(Error::failed_precondition(text));
        }
        self.must_be_filled().await?;
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket =
            Path::new(paths::SOCKETS).join(format!("{}-pages-{count}.sock", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        tracks_writes(&blocking(probe).await?)?;
        let args = [snapshot.pid.to_string(), socket.display().to_string()];
        let Part { mut child, input, mut output } =
            Part::start(&self.runtime.reaper, serve::NAME, &args)?;
        let mut line = [0; 6];
        match timeout(STARTUP, output.read_exact(&mut line)).await {
            Ok(Ok(_)) => {}
            _ => return Err(Error::internal("the process that serves pages has not started")),
        }
        let left = socket.clone();
        tokio::spawn(async move {
            child.wait().await;
            // It would end with this.
            drop(input);
            let _ = std::fs::remove_file(left);
        });
        Ok(socket)
    }
}
