//! Where a process's output goes.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

/// Takes output.
pub(super) enum Sink {
    /// Nowhere.
    Null,
    /// A FIFO, opened for reading and writing, or a pipe to a log program.
    Pipe(pipe::Sender),
    /// A file, opened for appending.
    File(tokio::fs::File),
}

impl Sink {
    pub(super) fn file(file: File) -> Self {
        Self::File(tokio::fs::File::from_std(file))
    }

    /// Writes all of `bytes`, counting them in `moved`.
    pub(super) async fn write(&mut self, mut bytes: &[u8], moved: &AtomicU64) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = match self {
                Self::Null => bytes.len(),
                Self::Pipe(pipe) => pipe.write(bytes).await?,
                Self::File(file) => {
                    let count = file.write(bytes).await?;
                    // tokio's file reports a write when it is queued.
                    file.flush().await?;
                    count
                }
            };
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            moved.fetch_add(count as u64, Ordering::SeqCst);
            bytes = bytes.get(count..).unwrap_or_default();
        }
        Ok(())
    }
}
