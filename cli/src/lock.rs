//! One agent at a time for one migration.
//!
//! A driver that was killed leaves an agent behind that may still read a commit from its input.
//! Whoever asks what became of the migration must wait until that agent has ended.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_oci::paths;

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Takes the lock called `name`, waiting at most `limit`.
///
/// # Errors
/// When somebody holds it longer than that.
pub(crate) async fn take(name: &str, limit: Duration) -> Result<Lock> {
    let dir = Path::new(paths::RUN).join("locks");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join(name);
    let start = Instant::now();
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        if file.try_lock().is_ok() {
            // Whoever held it may have removed the file: then the lock is on nothing.
            if same_file(&file, &path) {
                return Ok(Lock { _file: file });
            }
            continue;
        }
        if start.elapsed() >= limit {
            bail!("another ferry holds {} (waited {} s)", path.display(), limit.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Removes the lock's file while it is held, so that nothing stays behind.
pub(crate) fn remove(name: &str, lock: Lock) {
    let _ = fs::remove_file(Path::new(paths::RUN).join("locks").join(name));
    drop(lock);
}

fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        _ => false,
    }
}
