//! The stream of a container's memory, at a socket of its own.

use super::Container;
use super::part::{Part, tracks_writes};
use super::silent::blocking;
use crate::error::{Error, Result};
use ferry_oci::pages::serve;
use ferry_oci::pages::tracker::probe;
use ferry_oci::paths;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

/// How long the process that serves it may take to be ready.
const STARTUP: Duration = Duration::from_secs(10);
/// How long it may take to end when its connection has.
const ENDING: Duration = Duration::from_secs(2);

/// Held as long as a container's memory is streamed.
pub(super) type Stream = Arc<Mutex<()>>;

impl Container {
    /// A socket at which the container's memory can be had, see [`serve`]. Who
    /// serves it ends with its one connection, or with this shim.
    pub(crate) async fn open_pages(&self) -> Result<PathBuf> {
        let _op = self.op.read().await;
        self.must_move("a stream of its memory")?;
        let snapshot = self.snapshot();
        let streaming = self.no_stream().await?;
        // None may begin meanwhile either.
        let _none = self.no_pre_dumps().await?;
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
            // It would end with the first.
            drop((input, streaming));
            let _ = std::fs::remove_file(left);
        });
        Ok(socket)
    }

    /// Refuses what tracks the container's memory beside a stream of it; one of which the connection has
    /// ended is given a moment.
    pub(super) async fn no_stream(&self) -> Result<OwnedMutexGuard<()>> {
        timeout(ENDING, self.stream.clone().lock_owned()).await.map_err(|_| {
            let text = "its memory is streamed already: close that connection first";
            Error::failed_precondition(text)
        })
    }
}
