//! Undoing a migration at its destination, or making it permanent.

use std::io;

use anyhow::{Context, Result, bail};
use ferry_oci::announce::to_neighbours;
use ferry_oci::record::Record;
use ferry_oci::{paths, quarantine};

use crate::containerd::Destination as Store;
use crate::network::address::{self, Cidr};

/// Removes everything that carries the migration's mark. Can be repeated.
///
/// # Errors
/// With everything that went wrong.
pub(crate) async fn remove(store: &Store, ip: Option<Cidr>) -> Result<()> {
    let migration = store.migration();
    let mut errors: Vec<String> = store.cleanup().await.iter().map(ToString::to_string).collect();
    // A task that cannot be ended may still run: it keeps its address.
    if !errors.is_empty() {
        bail!("{}", errors.join("; "));
    }
    // Only an address that is silent for this migration was brought here by it.
    let silent = blocking(quarantine::present).await?;
    let ip = ip.filter(|_| silent.iter().any(|m| m == migration));
    // The address goes before the rules that keep it silent.
    if let Some(cidr) = ip
        && let Err(error) = address::remove(cidr.ip).await
    {
        errors.push(format!("{error:#}"));
    }
    if let Err(error) = clear(migration).await {
        errors.push(format!("{error:#}"));
    }
    errors.extend(forget(migration).err().map(|e| format!("{e:#}")));
    if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
}

/// Takes the mark off what was made and removes what only the move needed.
///
/// # Errors
/// When containerd refuses; can be repeated then.
pub(crate) async fn keep(store: &Store) -> Result<()> {
    let errors: Vec<String> = store.keep().await.iter().map(ToString::to_string).collect();
    if !errors.is_empty() {
        bail!("{}", errors.join("; "));
    }
    clear(store.migration()).await?;
    forget(store.migration())
}

fn forget(migration: &str) -> Result<()> {
    let images = paths::images(migration);
    match std::fs::remove_dir_all(&images) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove {}", images.display()));
        }
        _ => {}
    }
    Record::remove(migration).context("remove the migration's record")
}

/// Removes all rules of a migration on this host.
///
/// # Errors
/// When the kernel refuses.
pub(crate) async fn clear(migration: &str) -> Result<()> {
    let migration = migration.to_owned();
    let mounts = migration.clone();
    blocking(move || quarantine::clear(&migration)).await?;
    // Those that a shim has left that was killed.
    tokio::task::spawn_blocking(move || ferry_oci::tmpfs::clear(&mounts))
        .await?
        .context("take away the mounts of file systems in memory")
}

/// The kernel takes some milliseconds for a change of its rules.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, quarantine::Error> + Send + 'static,
) -> Result<T> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

/// Announces and opens an address whose container runs here. What fails is told and nothing more: no
/// answer about the container depends on it.
pub(super) async fn announce(migration: &str, cidr: Cidr, device: &str) {
    if let Err(error) = to_neighbours(cidr.ip, device) {
        log::warn!("announce {cidr}: {error:#}");
    }
    if let Err(error) = clear(migration).await {
        log::warn!("open {cidr}: {error:#}");
    }
    // Not before, or connections that the host opens would have waited in vain.
    if paths::preferred(migration).exists()
        && let Err(error) = address::prefer(cidr, device).await
    {
        log::warn!("let this host choose {cidr}: {error:#}");
    }
}
