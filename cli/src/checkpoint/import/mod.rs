//! A checkpoint that is a file: the archive of `ferry checkpoint --export` or of `podman container
//! checkpoint --export`.
//!
//! ```text
//!   FILE ─ unpacked into our folder ─┬─ checkpoint/                  CRIU's images ── mounts.rs
//!                                    ├─ rootfs-diff.tar, deleted.files ─ layer.rs ─▶ a layer for containerd
//!                                    ├─ spec.dump                    what it may have: super::spec
//!                                    └─ config.dump                  which image it is based on
//! ```
//! Nothing of it is trusted: only files of known names are unpacked, each into a name of ours, and as
//! many bytes as there is room for.

mod layer;
mod mounts;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::criu::images::{Folder, Source as _, take_any_root};
use ferry_oci::limited;
use nix::sys::statvfs::statvfs;
use serde::Deserialize;
use serde_json::Value;

use super::archive::extract;
use super::export::FERRY;
use super::format::{self, Summary};
use crate::containerd::{Containerd, Image};
use crate::untar::{self, Kind, Reader};

const CONFIG: &str = "config.dump";
const SPEC: &str = "spec.dump";
const DELETED: &str = "deleted.files";
const FILES: &str = "rootfs-diff.tar";
const SHM: &str = "devshm-checkpoint.tar";
/// What is read into memory is not longer, bytes. An archive may name every file of an image as deleted.
const MAX_TEXT: u64 = 16 << 20;

/// An archive, unpacked.
#[derive(Debug)]
pub(super) struct Import {
    /// Its name for the operator.
    shown: String,
    folder: PathBuf,
    config: Config,
    /// Ours, if we have made it.
    pub(super) summary: Option<Summary>,
    /// Its spec, without the mounts that were podman's own.
    pub(super) spec: Value,
    /// What takes their place.
    files: Vec<(String, Vec<u8>)>,
    /// What is gone of the image.
    deleted: Vec<String>,
    /// Bytes that may still be filled with what is packed in it.
    room: u64,
}

/// What is taken of `config.dump`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Config {
    id: String,
    name: String,
    #[serde(rename = "rootfsImageID")]
    image_id: String,
    #[serde(rename = "rootfsImageName")]
    image: String,
    named_volumes: Option<Vec<Value>>,
}

impl Import {
    /// Unpacks `file` into two folders, which are there and empty: CRIU's `images`, and a `folder` for
    /// the rest.
    ///
    /// # Errors
    /// When it is no such archive, has what is refused or more than there is room for, or breaks off.
    pub(super) fn unpack(file: &Path, images: &Path, folder: &Path) -> Result<Self> {
        let shown = file.display().to_string();
        let mut room = members(file, images, folder).with_context(|| shown.clone())?;
        let text = |name: &str| -> Result<Option<Vec<u8>>> {
            let path = folder.join(name);
            path.exists().then(|| read_text(&path)).transpose().context(name.to_owned())
        };
        let must = |name: &str| {
            let missing =
                || format!("{shown} is no checkpoint of podman's form: {name} is missing");
            text(name)?.with_context(missing)
        };
        let config: Config =
            serde_json::from_slice(&must(CONFIG)?).with_context(|| format!("{shown}: {CONFIG}"))?;
        let mut spec: Value =
            serde_json::from_slice(&must(SPEC)?).with_context(|| format!("{shown}: {SPEC}"))?;
        ensure!(
            config.named_volumes.iter().flatten().next().is_none(),
            "the container of {shown} has volumes of podman's, which are not restored here: make the \
             checkpoint of one without"
        );
        ensure!(
            images.join("inventory.img").exists(),
            "{shown} is no checkpoint of podman's form: checkpoint/inventory.img is missing"
        );
        let summary = text(FERRY)?.map(|bytes| format::summary(&bytes)).transpose()?;
        let deleted = text(DELETED)?.map(|bytes| layer::deleted(&bytes)).transpose();
        let deleted = deleted.with_context(|| format!("{shown}: {DELETED}"))?.unwrap_or_default();
        let podmans = mounts::take_out(&mut spec);
        let own = mounts::change(images, &podmans, &folder.join(SHM), &mut room);
        mounts::put_in(&mut spec, &own.context("change the images of mounts")?);
        any_root(images).context("change files.img")?;
        let files = mounts::files(&podmans, &spec);
        let folder = folder.to_owned();
        Ok(Self { shown, folder, config, summary, spec, files, deleted, room })
    }

    /// The container's id, if it says one that is a good one for containerd as well.
    pub(super) fn id(&self) -> Option<String> {
        let own = self.summary.as_ref().map(|summary| &summary.container);
        let ids = own.into_iter().chain([&self.config.name, &self.config.id]);
        ids.into_iter().find(|id| !id.is_empty()).cloned()
    }

    /// The image that the container is based on, which is known by its config: podman has no digests
    /// that containerd has too.
    ///
    /// # Errors
    /// When it is not here.
    pub(super) async fn base(&self, containerd: &Containerd, namespace: &str) -> Result<Image> {
        let (name, id) = (&self.config.image, &self.config.image_id);
        ensure!(
            !name.is_empty(),
            "{} does not say which image its container is based on",
            self.shown
        );
        let named = containerd.image(name).await?;
        let is_here = named.is_some();
        match named {
            Some(named) if id.is_empty() || self.fits(containerd, &named).await => {
                return Ok(named);
            }
            _ => {}
        }
        for image in containerd.list_images().await? {
            if !id.is_empty() && self.fits(containerd, &image).await {
                return Ok(image);
            }
        }
        let pull = format!("ctr -n {namespace} images pull {name}");
        if is_here {
            bail!(
                "the image {name} is here, but not the one that the container is based on (its config is \
                 sha256:{id}): get that one, as by {pull}"
            );
        }
        bail!("the image {name} that the container is based on is not here: {pull}")
    }

    async fn fits(&self, containerd: &Containerd, image: &Image) -> bool {
        let chain = self.summary.as_ref().map(|summary| summary.chain.as_str());
        match containerd.image_content(&image.target, chain).await {
            Ok(content) => content.config.digest == format!("sha256:{}", self.config.image_id),
            Err(error) => {
                log::debug!("{}: {error}", image.name);
                false
            }
        }
    }

    /// Writes the layer of what has changed against the image, a tar.
    ///
    /// # Errors
    /// When the archive's own cannot be read, or unpacks to more than there is room for.
    pub(super) fn write_layer(&self, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        layer::write(out, &self.deleted, &self.files, &self.folder.join(FILES), self.room)
    }
}

/// Unpacks the members that are known. Bytes of room that are left.
fn members(file: &Path, images: &Path, folder: &Path) -> Result<u64> {
    let mut reader = Reader::new(untar::open(file).context("open it")?);
    let mut room = room(folder)?;
    while let Some(entry) = reader.next().context("read the archive")? {
        let image = entry.name.strip_prefix("checkpoint/");
        let (to, name) = match (image, entry.kind) {
            (Some(image), Kind::File) => (images, image),
            (_, Kind::Parent) => {
                bail!("it needs an earlier checkpoint (podman: --with-previous): make one without")
            }
            (None, Kind::File) if [CONFIG, SPEC, DELETED, FERRY].contains(&entry.name.as_str()) => {
                ensure!(entry.size <= MAX_TEXT, "{} is too long", entry.name);
                (folder, entry.name.as_str())
            }
            (None, Kind::File) if [FILES, SHM].contains(&entry.name.as_str()) => {
                (folder, entry.name.as_str())
            }
            _ => continue,
        };
        room = room.checked_sub(entry.size).with_context(|| {
            format!("it has more than there is room for where {} is", folder.display())
        })?;
        extract(&mut reader, to, name)?;
    }
    Ok(room)
}

/// The root folder's permissions are in no layer, and podman has others than containerd.
fn any_root(images: &Path) -> Result<()> {
    const FILES: &str = "files.img";
    let mut folder = Folder::open(images).context("look into the images")?;
    let Some(image) = folder.read(FILES).context("read it")? else { return Ok(()) };
    fs::write(images.join(FILES), take_any_root(&image)?).context("write it")
}

/// Bytes that may be filled.
fn room(folder: &Path) -> Result<u64> {
    let stat = statvfs(folder).context("ask how much room there is")?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    // The rest is others'.
    Ok(free - free / 16)
}

/// Reads a file of at most [`MAX_TEXT`] bytes.
fn read_text(path: &Path) -> std::io::Result<Vec<u8>> {
    limited::read(path, MAX_TEXT)
}

#[cfg(test)]
mod tests;
