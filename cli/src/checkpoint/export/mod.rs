//! A checkpoint as a file: an archive as `podman container checkpoint --export` makes it, which podman
//! restores and checkpointctl reads.
//!
//! ```text
//!   config.dump, spec.dump        podman.rs: what podman makes a container of
//!   network.status                null: addresses are not podman's to give
//!   ferry.json                    our summary, of which podman takes no notice
//!   stats-dump, dump.log          CRIU's
//!   deleted.files, rootfs-diff.tar  layer.rs: the writable layer
//!   checkpoint/                   CRIU's images
//! ```

mod layer;
mod podman;

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use ferry_oci::criu::images::take_any_root;
use tar::{Builder, EntryType, Header};
use tempfile::NamedTempFile;

use super::format::Summary;
use crate::containerd::{BlobReader, ContainerRecord};
use crate::wire::stream;

pub(super) use podman::KEPT_SHM;

/// Our summary in an archive.
pub(super) const FERRY: &str = "ferry.json";
/// CRIU's image of open files.
const FILES: &str = "files.img";
/// What an unfinished archive is called, beside the file that it is to be.
const UNFINISHED: &str = ".ferry-export-";

/// What the archive is packed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compression {
    /// Nothing
    None,
    /// gzip
    Gzip,
    /// zstd
    Zstd,
}

/// What the operator asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wish {
    /// The file.
    pub(crate) file: PathBuf,
    /// How it is packed.
    pub(crate) compress: Compression,
}

/// A file under way. It has its name only when it is complete; dropped before that it is gone.
#[derive(Debug)]
pub(super) struct Export {
    wish: Wish,
    folder: PathBuf,
    unfinished: NamedTempFile,
}

/// What goes into it.
#[derive(Debug)]
pub(super) struct Contents<'a> {
    /// Namespace of containerd.
    pub(super) namespace: &'a str,
    /// The container.
    pub(super) record: &'a ContainerRecord,
    /// Digest of its image's config, which is podman's id of an image.
    pub(super) config: &'a str,
    /// Our summary.
    pub(super) summary: &'a Summary,
    /// Folder of CRIU's images.
    pub(super) images: &'a Path,
    /// Folder of CRIU's log and statistics.
    pub(super) work: &'a Path,
    /// An empty folder.
    pub(super) room: &'a Path,
}

/// A member of the archive.
enum Member {
    Text(&'static str, Vec<u8>),
    File(String, PathBuf),
    Folder(&'static str),
}

impl Export {
    /// Begins a file beside the one that is to be. That one is not touched yet: as with podman it may
    /// be there, and is replaced.
    ///
    /// # Errors
    /// When it could not be written.
    pub(super) fn begin(wish: Wish) -> Result<Self> {
        let shown = wish.file.display().to_string();
        match wish.file.symlink_metadata() {
            Ok(meta) => ensure!(meta.is_file(), "{shown} is there and no file: give another name"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context(shown),
        }
        ensure!(wish.file.file_name().is_some(), "{shown:?} is no name of a file");
        let folder = match wish.file.parent() {
            Some(folder) if folder != "" => folder.to_owned(),
            _ => ".".into(),
        };
        let folder = folder.canonicalize().with_context(|| format!("the folder of {shown}"))?;
        let unfinished = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&folder);
        let unfinished = unfinished.with_context(|| format!("write into {}", folder.display()))?;
        Ok(Self { wish, folder, unfinished })
    }

    /// Where it is as long as it has not its name.
    pub(super) fn unfinished(&self) -> &Path {
        self.unfinished.path()
    }

    /// Writes it, with the layer that `layer` gives, if there is one.
    ///
    /// # Errors
    /// When something cannot be read, or there is no room.
    pub(super) async fn write(
        &self,
        contents: Contents<'_>,
        layer: Option<BlobReader>,
    ) -> Result<()> {
        let mut members = contents.texts()?;
        for name in ["stats-dump", "dump.log"] {
            let path = contents.work.join(name);
            if path.is_file() {
                members.push(Member::File(name.to_owned(), path));
            }
        }
        if let Some(layer) = layer {
            members.extend(split(layer, contents.room).await?);
        }
        members.push(Member::Folder("checkpoint"));
        // No layer brings the root folder's permissions, and CRIU would insist on them.
        let files = std::fs::read(contents.images.join(FILES)).context("read files.img")?;
        let files = take_any_root(&files).context("change files.img")?;
        members.push(Member::Text("checkpoint/files.img", files));
        members.extend(listed(contents.images).context("list the images")?);
        let file = self.unfinished.as_file().try_clone().context("open the file once more")?;
        let compress = self.wish.compress;
        let written = tokio::task::spawn_blocking(move || write(file, compress, &members)).await?;
        written.with_context(|| format!("write {}", self.wish.file.display()))
    }

    /// Gives it its name. Its size, bytes.
    ///
    /// # Errors
    /// When it cannot have it.
    pub(super) fn finish(self) -> Result<u64> {
        let shown = self.wish.file.display().to_string();
        let file = self.unfinished.persist(&self.wish.file).map_err(|error| error.error);
        let file = file.with_context(|| format!("name the archive {shown}"))?;
        // After a crash of the host it has its name still.
        let folder = File::open(&self.folder).and_then(|folder| folder.sync_all());
        folder.with_context(|| format!("write {}", self.folder.display()))?;
        Ok(file.metadata().with_context(|| shown)?.len())
    }
}

impl Contents<'_> {
    fn texts(&self) -> Result<Vec<Member>> {
        let spec = self.record.spec_json()?;
        let summary = serde_json::to_value(self.summary).context("write the summary")?;
        let all = [
            ("config.dump", podman::config(self, &spec)),
            ("spec.dump", podman::spec(&spec, &self.record.id)),
            ("network.status", serde_json::Value::Null),
            (FERRY, summary),
        ];
        let member = |(name, value)| Ok(Member::Text(name, serde_json::to_vec_pretty(&value)?));
        all.into_iter().map(member).collect()
    }
}

/// The writable layer as podman has it.
async fn split(mut layer: BlobReader, room: &Path) -> Result<Vec<Member>> {
    let (to, from) = stream::reader();
    let path = room.join("rootfs-diff.tar");
    let spool = path.clone();
    let split = tokio::task::spawn_blocking(move || {
        let mut out = io::BufWriter::new(File::create(&spool)?);
        let split = layer::split(flate2::read::GzDecoder::new(from), &mut out)?;
        out.flush().map(|()| split)
    });
    while let Some(chunk) = layer.chunk().await? {
        // It has ended and says why.
        if to.send(chunk).await.is_err() {
            break;
        }
    }
    drop(to);
    let split = split.await?.context("read the writable layer")?;
    let mut members = Vec::new();
    if !split.deleted.is_empty() {
        let bytes = serde_json::to_vec_pretty(&split.deleted).context("list deleted files")?;
        members.push(Member::Text("deleted.files", bytes));
    }
    if split.files > 0 {
        members.push(Member::File("rootfs-diff.tar".to_owned(), path));
    }
    Ok(members)
}

fn listed(folder: &Path) -> io::Result<Vec<Member>> {
    let mut names = Vec::new();
    for entry in folder.read_dir()? {
        names.push(entry?.file_name());
    }
    names.retain(|name| name != FILES);
    names.sort();
    let member = |name: std::ffi::OsString| {
        Member::File(format!("checkpoint/{}", name.to_string_lossy()), folder.join(&name))
    };
    Ok(names.into_iter().map(member).collect())
}

fn write(file: File, compress: Compression, members: &[Member]) -> io::Result<()> {
    let out = io::BufWriter::with_capacity(1 << 20, file);
    let out = match compress {
        Compression::None => pack(members, out)?,
        Compression::Gzip => {
            pack(members, flate2::write::GzEncoder::new(out, flate2::Compression::fast()))?
                .finish()?
        }
        Compression::Zstd => pack(members, zstd::Encoder::new(out, 0)?)?.finish()?,
    };
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

fn pack<W: Write>(members: &[Member], out: W) -> io::Result<W> {
    let mut builder = Builder::new(out);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let header = |kind, mode, size| {
        let mut header = Header::new_gnu();
        header.set_mtime(now);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header
    };
    for member in members {
        match member {
            Member::Text(name, bytes) => {
                let mut header = header(EntryType::Regular, 0o600, bytes.len() as u64);
                builder.append_data(&mut header, name, bytes.as_slice())?;
            }
            Member::Folder(name) => {
                builder.append_data(
                    &mut header(EntryType::Directory, 0o700, 0),
                    name,
                    io::empty(),
                )?;
            }
            Member::File(name, path) => {
                let file = File::open(path)?;
                let mut header = header(EntryType::Regular, 0o600, file.metadata()?.len());
                builder.append_data(&mut header, name, file)?;
            }
        }
    }
    builder.into_inner()
}
