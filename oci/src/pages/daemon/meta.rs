//! What a store's folder says about it, for those who look without asking its keeper.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Name of the control socket in a store's folder.
pub(super) const CONTROL: &str = "control.sock";
const META: &str = "meta.json";
const NEW: &str = "meta.json.new";

/// `meta.json`. It may be a few seconds old.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Meta {
    /// Version of this description: 1.
    pub version: u32,
    /// The container whose memory it is; empty before the store is opened.
    pub container: String,
    /// The migration that opened it last.
    pub migration: String,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// When it ends by itself if nobody uses it, seconds since 1970. `None` while it is in use.
    pub expires: Option<u64>,
    /// Bytes of pages that it was given.
    pub bytes: u64,
    /// The keeper's process id.
    pub keeper: u32,
}

impl Meta {
    /// Reads the description in the folder of a store.
    ///
    /// # Errors
    /// When there is none.
    pub fn read(dir: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(dir.join(META))?)?)
    }

    /// All stores whose folders lie in `parent`, with their folders.
    ///
    /// # Errors
    /// When `parent` cannot be read. One that is not there has no stores.
    pub fn list(parent: &Path) -> io::Result<Vec<(PathBuf, Self)>> {
        let entries = match std::fs::read_dir(parent) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let folders = entries.filter_map(Result::ok).map(|entry| entry.path());
        Ok(folders.filter_map(|dir| Some((dir.clone(), Self::read(&dir).ok()?))).collect())
    }

    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        std::fs::write(dir.join(NEW), serde_json::to_vec(self)?)?;
        std::fs::rename(dir.join(NEW), dir.join(META))
    }
}

/// Removes the folder of a store that has ended.
pub(super) fn remove(dir: &Path) {
    for name in [CONTROL, META, NEW] {
        let _ = std::fs::remove_file(dir.join(name));
    }
    if let Err(e) = std::fs::remove_dir(dir) {
        log::warn!("folder of a page store {}: {e}", dir.display());
    }
}

/// Seconds since 1970.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
