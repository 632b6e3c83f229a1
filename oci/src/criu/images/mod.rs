//! What is in a checkpoint, read from CRIU's images without CRIU.
//!
//! ```text
//! inventory.img                how it was dumped
//! pstree.img                   the processes ─┬─ core-PID.img     name, state, user
//!                                             ├─ mm-PID.img       where its command line is
//!                                             ├─ pagemap-PID.img  what of its memory is in pages-N.img
//!                                             └─ ids-PID.img ──── fdinfo-ID.img ── files.img
//! mountpoints-ID.img           the mounts
//! stats-dump                   what the dump took
//! ```
//! Images come from anywhere and are not trusted: each is read up to [`MOST_BYTES`], and what they say
//! of each other is no reason to read without end. Pages are never read but for command lines. The field
//! numbers are those of CRIU's `images/*.proto`.

mod asks;
mod capabilities;
mod edit;
mod files;
mod folder;
mod memory;
mod mounts;
mod process;
mod summary;
#[cfg(test)]
mod tests;

use super::ImageError;
use serde::Serialize;
use std::io;

pub use asks::{Asked, Asks, Namespaces};
pub use capabilities::capabilities;
pub use edit::{Outside, TakenIn, take_any_root, take_in};
pub use files::{File, OpenFile};
pub use folder::Folder;
pub use memory::Memory;
pub use mounts::Mount;
pub use process::Process;
pub use summary::{Inventory, Statistics};

/// The longest image that is read, bytes. Those of a process with 1 TB in large pieces have some MB.
pub const MOST_BYTES: u64 = 32 << 20;
/// Magic of an image of a thread.
const CORE_MAGIC: u32 = 0x5505_3847;
/// The most processes.
const MOST_PROCESSES: usize = 1 << 16;
/// The most memory that the open files of all processes may take, bytes. The same file may be named
/// often.
const MOST_FILE_BYTES: usize = 128 << 20;

/// Where images are: a folder, an archive.
pub trait Source {
    /// Names of all files there, in order.
    fn names(&self) -> Vec<String>;
    /// Length of a file, bytes; `None` if it is not there.
    fn size(&self, name: &str) -> Option<u64>;
    /// The whole of a file, which is no longer than [`MOST_BYTES`]; `None` if it is not there.
    ///
    /// # Errors
    /// When it is longer, or cannot be read.
    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Parts of pages images, in the order of `spans`; empty for one that is not there.
    ///
    /// # Errors
    /// When they cannot be read.
    fn pages(&mut self, spans: &[Span]) -> io::Result<Vec<Vec<u8>>>;
}

/// A part of a pages image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Name of the image.
    pub name: String,
    /// Its first byte there.
    pub offset: u64,
    /// Bytes.
    pub length: usize,
}

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Nothing of CRIU's is there.
    #[error("no images of criu are there (inventory.img is missing)")]
    NoImages,
    /// An image that another one needs is missing.
    #[error("{0} is missing: the checkpoint is not complete")]
    Missing(String),
    /// A file cannot be read.
    #[error("read {0}")]
    Io(String, #[source] io::Error),
    /// An image is not one.
    #[error("{0}")]
    Image(String, #[source] ImageError),
    /// More than anybody has.
    #[error("{0}: more than {1} processes")]
    TooMany(String, usize),
}

/// What is in a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// How it was dumped.
    pub inventory: Inventory,
    /// Its processes, as CRIU wrote them: parents before their children.
    pub processes: Vec<Process>,
    /// Its mounts.
    pub mounts: Vec<Mount>,
    /// Its name for itself; empty if it shares the host's.
    pub hostname: String,
    /// What the dump took, where that was kept.
    pub statistics: Option<Statistics>,
    /// Bytes of memory in all pages images.
    pub pages_bytes: u64,
    /// Bytes of what its small file systems in memory hold, packed.
    pub tmpfs_bytes: u64,
    /// The rest of its memory is in an earlier dump.
    pub has_parent: bool,
}

impl Contents {
    /// Reads them.
    ///
    /// # Errors
    /// The first image that is missing, too large or not what it should be.
    pub fn read(source: &mut dyn Source) -> Result<Self, ReadError> {
        let inventory = image(source, "inventory.img", Inventory::parse)?;
        let inventory = inventory.ok_or(ReadError::NoImages)?;
        let tree = must(source, "pstree.img", process::tree)?;
        if tree.len() > MOST_PROCESSES {
            return Err(ReadError::TooMany("pstree.img".to_owned(), MOST_PROCESSES));
        }
        let table = image(source, "files.img", files::table)?.unwrap_or_default();
        let processes = process::read(source, tree, &table)?;
        let names = source.names();
        let sum = |fits: &dyn Fn(&str) -> bool| {
            let sizes = names.iter().filter(|name| fits(name)).filter_map(|n| source.size(n));
            sizes.fold(0_u64, u64::saturating_add)
        };
        let pages_bytes = sum(&|name| name.starts_with("pages-") && name.ends_with(".img"));
        let tmpfs_bytes = sum(&|name| name.starts_with("tmpfs-"));
        let mut contents = Self {
            inventory,
            processes,
            pages_bytes,
            tmpfs_bytes,
            has_parent: names.iter().any(|name| name == "parent"),
            ..Self::default()
        };
        for name in &names {
            if name.starts_with("mountpoints-") && name.ends_with(".img") {
                contents.mounts.extend(must(source, name, mounts::parse)?);
            }
            if name.starts_with("utsns-") && name.ends_with(".img") {
                contents.hostname = must(source, name, summary::hostname)?;
            }
        }
        contents.statistics = image(source, "stats-dump", Statistics::parse)?.flatten();
        Ok(contents)
    }
}

/// What `parse` finds in the image `name`; `None` if there is none.
fn image<T>(
    source: &mut dyn Source,
    name: &str,
    parse: impl FnOnce(&[u8]) -> Result<T, ImageError>,
) -> Result<Option<T>, ReadError> {
    let bytes = source.read(name).map_err(|err| ReadError::Io(name.to_owned(), err))?;
    let parsed = bytes.map(|bytes| parse(&bytes)).transpose();
    parsed.map_err(|err| ReadError::Image(name.to_owned(), err))
}

/// As [`image`], of one that has to be there.
fn must<T>(
    source: &mut dyn Source,
    name: &str,
    parse: impl FnOnce(&[u8]) -> Result<T, ImageError>,
) -> Result<T, ReadError> {
    image(source, name, parse)?.ok_or_else(|| ReadError::Missing(name.to_owned()))
}

/// Refuses a file that is too long before it is read.
///
/// # Errors
/// When `bytes` are too many.
pub fn check_size(bytes: u64) -> io::Result<()> {
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    let text = format!("it has {bytes} bytes, and no such image has more than {MOST_BYTES}");
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}
