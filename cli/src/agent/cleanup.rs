//! Undoing a migration at its destination, or making it permanent.

use std::io;
use std::process::Command;

use anyhow::{Context, Result, bail};
use ferry_oci::record::Record;
use ferry_oci::{paths, quarantine};

use crate::containerd::Destination as Store;
use crate::network::address::{self, Cidr};

/// Removes everything that carries the migration's mark. Can be repeated, and goes on after a
/// step that fails.
///
/// # Errors
/// With everything that went wrong.
pub(super) async fn remove(store: &Store, ip: Option<Cidr>) -> Result<()> {
    let migration = store.migration();
    let mut errors: Vec<String> = store.cleanup().await.iter().map(ToString::to_string).collect();
    // The address goes before the rules that keep it silent.
    if let Some(cidr) = ip
        && let Err(error) = address::remove(cidr.ip).await
    {
        errors.push(format!("{error:#}"));
    }
    if let Err(error) = nft(quarantine::remove(migration)).await {
        errors.push(format!("{error:#}"));
    }
    errors.extend(forget(migration).err().map(|e| format!("{e:#}")));
    if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
}

/// Takes the mark off what was made and removes what only the move needed.
///
/// # Errors
/// When containerd refuses; can be repeated then.
pub(super) async fn keep(store: &Store) -> Result<()> {
    let errors: Vec<String> = store.keep().await.iter().map(ToString::to_string).collect();
    if !errors.is_empty() {
        bail!("{}", errors.join("; "));
    }
    nft(quarantine::remove(store.migration())).await?;
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

/// Runs an nft command.
///
/// # Errors
/// With what nft printed.
pub(crate) async fn nft(command: Command) -> Result<()> {
    let output = tokio::process::Command::from(command).output().await.context("start nft")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())
}
