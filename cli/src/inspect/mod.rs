//! `ferry inspect`: what is in a checkpoint. Only reads.
//!
//! ```text
//!   name of an image ── stored.rs: index and blobs in containerd ─┐
//!   file ─────────────────────────────────────────────────────────┼─ archive.rs ─ untar
//!   folder ── ferry_oci::criu::images::Folder ──────┐             │
//!                                                   ├─ Contents ◀─┘   what CRIU's images say
//!                     record.rs: what others wrote ─┴─ report.rs ── text.rs, or JSON
//! ```
//! Nothing is unpacked: an archive is walked through, and only small images of known names are kept.

mod archive;
mod record;
mod report;
mod stored;
#[cfg(test)]
mod tests;
mod text;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ferry_oci::criu::images::{Contents, Folder, Source};

use crate::containerd::Containerd;
use crate::untar;
use crate::wire::messages::ContainerdAddress;
use archive::Archive;
use report::Report;
pub(crate) use text::clean;

/// Prints what is in `what`.
///
/// # Errors
/// When there is no such checkpoint, or it cannot be read.
pub(crate) async fn run(address: &ContainerdAddress, what: String, json: bool) -> Result<()> {
    let report = match find(&what)? {
        Found::Folder(path) => tokio::task::spawn_blocking(move || folder(&path)).await??,
        Found::File(path) => tokio::task::spawn_blocking(move || file(&path)).await??,
        Found::Name => {
            let containerd = Containerd::connect(&address.socket, &address.namespace).await?;
            stored::read(&containerd, &what).await?
        }
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text::of(&report));
    }
    Ok(())
}

/// What an operator means.
pub(crate) enum Found {
    /// A folder.
    Folder(PathBuf),
    /// A file.
    File(PathBuf),
    /// The name of an image.
    Name,
}

/// Finds out what `what` is: a file or a folder of that name comes first.
///
/// # Errors
/// For a path where nothing is that can be read.
pub(crate) fn find(what: &str) -> Result<Found> {
    let path = Path::new(what);
    match path.metadata() {
        Ok(meta) if meta.is_dir() => Ok(Found::Folder(path.to_owned())),
        Ok(meta) if meta.is_file() => Ok(Found::File(path.to_owned())),
        Ok(_) => bail!("{what} is neither a file nor a folder"),
        Err(error) if what.starts_with(['/', '.']) => Err(error).context(what.to_owned()),
        Err(_) => Ok(Found::Name),
    }
}

fn folder(path: &Path) -> Result<Report> {
    let mut report = Report::new("folder", path.display().to_string());
    let list = |path: &Path| Folder::open(path).with_context(|| format!("list {}", path.display()));
    let mut around = list(path)?;
    report.take_records(&mut around)?;
    // An archive of podman that somebody has unpacked.
    let inner = path.join("checkpoint");
    let is_inside = around.size("inventory.img").is_none() && inner.is_dir();
    let mut images = if is_inside { list(&inner)? } else { around };
    if is_inside {
        report.take_records(&mut images)?;
    }
    report.contents = Some(contents(&mut images, &report.name)?);
    Ok(report)
}

fn file(path: &Path) -> Result<Report> {
    let mut report = Report::new("archive", path.display().to_string());
    let open = {
        let path = path.to_owned();
        move || untar::open(&path)
    };
    let mut archive = Archive::read(Box::new(open)).with_context(|| report.name.clone())?;
    report.take_records(&mut archive)?;
    archive.enter("checkpoint/");
    report.take_records(&mut archive)?;
    report.contents = Some(contents(&mut archive, &report.name)?);
    Ok(report)
}

fn contents(images: &mut dyn Source, name: &str) -> Result<Contents> {
    Contents::read(images).with_context(|| format!("{name} is no checkpoint that can be read"))
}
