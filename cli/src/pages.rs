//! Page stores that failed migrations have left on this host for the next attempt.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use ferry_oci::pages::daemon::{Client, Meta};
use ferry_oci::paths;
use serde::Serialize;

/// One store.
#[derive(Debug, Serialize)]
pub(crate) struct Kept {
    /// `NAMESPACE.CONTAINER`.
    pub(crate) name: String,
    /// Bytes of pages in it.
    pub(crate) bytes: u64,
    /// The migration that wrote to it last.
    pub(crate) migration: String,
    /// Seconds until it goes by itself; `None` while it is in use.
    pub(crate) expires_s: Option<u64>,
}

/// All of them.
///
/// # Errors
/// When their folder cannot be read.
pub(crate) fn kept() -> Result<Vec<Kept>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let stores = Meta::list(Path::new(paths::PAGES)).context("list the page stores")?;
    let kept = stores.into_iter().map(|(dir, meta)| Kept {
        name: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        bytes: meta.bytes,
        migration: meta.migration,
        expires_s: meta.expires.map(|at| at.saturating_sub(now)),
    });
    Ok(kept.collect())
}

/// Forgets the pages of `container`, or all.
///
/// # Errors
/// When there are none, or they are being served.
pub(crate) fn drop(namespace: &str, container: Option<&str>) -> Result<()> {
    let stores = Meta::list(Path::new(paths::PAGES)).context("list the page stores")?;
    let wanted = container.map(|id| paths::pages(namespace, id));
    let mut found = false;
    for (dir, _) in stores {
        if wanted.as_ref().is_some_and(|wanted| *wanted != dir) {
            continue;
        }
        found = true;
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match Client::connect(&dir) {
            Ok(client) => {
                client.drop_store().with_context(|| format!("drop the pages of {name}"))?;
            }
            // Nobody keeps it: its memory has gone already.
            Err(_) => remove_stale(&dir)?,
        }
        println!("dropped the pages of {name}");
    }
    if let (false, Some(id)) = (found, container) {
        bail!("no pages of {id} are kept here: ferry status lists what is");
    }
    Ok(())
}

/// Removes what the keeper of a store has left that was killed.
///
/// # Errors
/// When the folder cannot be removed.
pub(crate) fn remove_stale(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
