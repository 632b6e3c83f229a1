//! What is made once and kept outside the checkout: the base system, images, and the folders of
//! running labs (they need a real disk).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::sweep;

/// The cache: `$FERRY_CACHE`, else `~/.cache/ferry`.
pub fn dir() -> PathBuf {
    match std::env::var_os("FERRY_CACHE") {
        Some(dir) if !dir.is_empty() => std::path::absolute(&dir).unwrap_or(dir.into()),
        _ => Path::new(&std::env::var_os("HOME").unwrap_or_else(|| "/root".into()))
            .join(".cache/ferry"),
    }
}

/// Held while something in the cache is built, used or removed; released on drop.
pub struct Lock(#[expect(dead_code, reason = "held for its drop")] Flock<File>);

/// Waits for the lock called `name`.
pub fn lock(name: &str, how: FlockArg) -> Result<Lock> {
    let path = dir().join(format!("{name}.lock"));
    fs::create_dir_all(dir()).with_context(|| format!("make the cache {}", dir().display()))?;
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    Flock::lock(file, how).map(Lock).map_err(|(_, e)| e).context("lock the cache")
}

/// A short name for what was made from `parts`: other parts, other name.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())[..12].to_owned()
}

/// `bytes` in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Where [folder] keeps what it made.
pub(crate) fn place(kind: &str, key: &str) -> PathBuf {
    dir().join(format!("{kind}-{key}"))
}

/// Returns `KIND-KEY` in the cache; makes it with `build` where it is missing. Only a complete
/// folder ever has that name. Runs that come at the same time wait for the one that builds. Older
/// folders of the same kind then go, unless some lab is there that may use them.
pub fn folder(kind: &str, key: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let done = place(kind, key);
    if done.is_dir() {
        return Ok(done);
    }
    let _lock = lock(kind, FlockArg::LockExclusive)?;
    if done.is_dir() {
        return Ok(done);
    }
    let new = dir().join(format!(".{kind}-{key}.new"));
    if new.exists() {
        fs::remove_dir_all(&new).with_context(|| format!("remove {}", new.display()))?;
    }
    fs::create_dir_all(&new).with_context(|| format!("make {}", new.display()))?;
    build(&new)?;
    fs::rename(&new, &done).with_context(|| format!("name {}", done.display()))?;
    prune(kind, &done)?;
    Ok(done)
}

/// Removes all folders of `kind` but `current`, unless some lab is there that may use them.
pub(crate) fn prune(kind: &str, current: &Path) -> Result<()> {
    if !sweep::labs()?.is_empty() {
        return Ok(());
    }
    for entry in fs::read_dir(dir()).context("read the cache")?.flatten() {
        let name = entry.file_name();
        let of_kind =
            name.to_string_lossy().trim_start_matches('.').starts_with(&format!("{kind}-"));
        if of_kind && entry.path() != current && entry.path().is_dir() {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::key;

    #[test]
    fn key_tells_apart_where_parts_end() {
        assert_ne!(key([&b"ab"[..], b"c"]), key([&b"a"[..], b"bc"]));
        assert_eq!(key([&b"ab"[..]]).len(), 12);
    }
}
