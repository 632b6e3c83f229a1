//! CRIU's images of memory: which mappings a task has, and of which pages they hold the content.
//!
//! ```text
//! mm-PID.img        mappings, and so which of them CRIU restores lazily
//! pagemap-PID.img   ranges of pages: in pages-N.img, in the parent, or left to a page daemon
//! ```
//! PID is the task's in its own pid namespace. After a dump with hidden memory, [`check`] says
//! whether the images and what was hidden fit together: a lazy restore asks the page daemon for
//! every page of a lazy mapping, and ignores or doubles what the images hold of it.

mod write;

pub use write::{LeftOut, PARENT, PagesWriter, flatten, link_parent, merge, path_between};

use super::HiddenRange;
use super::decode::{Field, fields, records};
use std::io;
use std::path::Path;

pub(super) const MM_MAGIC: u32 = 0x5749_2820;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const PAGE: u64 = 4096;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file.
    #[error("read the image {0}")]
    Io(String, #[source] io::Error),
    /// The file is not such an image, or ends early.
    #[error("the image is not readable: {0}")]
    Format(&'static str),
}

/// Why hidden memory and images do not fit together.
#[derive(Debug, thiserror::Error)]
pub enum Leak {
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Pages of a hidden range were dumped.
    #[error("the dump holds pages {0:x}-{1:x} that were to be hidden")]
    InImages(u64, u64),
    /// Memory was hidden that CRIU does not restore lazily: it would be lost.
    #[error("the memory {0:x}-{1:x} was hidden, but a restore would not ask for it")]
    NotLazy(u64, u64),
    /// CRIU restores a mapping lazily that was not hidden: the page daemon does not have it.
    #[error("the memory {0:x}-{1:x} was not hidden, but a lazy restore would ask for it")]
    NotHidden(u64, u64),
}

/// A range of pages in a pagemap image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// The content is in the images of an earlier dump.
    pub in_parent: bool,
    /// A lazy restore leaves it to the page daemon.
    pub lazy: bool,
    /// The content is in the pages image.
    pub present: bool,
}

/// A task's pagemap image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pagemap {
    /// Number N of pages-N.img.
    pub pages_id: u32,
    /// Its ranges, ascending.
    pub runs: Vec<PageRun>,
}

/// A mapping in an mm image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Flags of mmap.
    pub flags: u32,
    /// CRIU's kind.
    pub status: u32,
}

impl Mapping {
    /// Whether a lazy restore leaves its pages to the page daemon: all of them, stacks included.
    pub fn can_be_lazy(&self) -> bool {
        // Bits of CRIU's status: vsyscall, vdso, vvar.
        const SPECIAL: u32 = 1 << 2 | 1 << 3 | 1 << 12;
        // The images hold the flags of this architecture.
        let bits = |flags: i32| flags.unsigned_abs();
        let own = bits(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
        let not = bits(libc::MAP_LOCKED | libc::MAP_HUGETLB);
        self.flags & own == own && self.flags & not == 0 && self.status & SPECIAL == 0
    }
}

impl Pagemap {
    /// Reads the pagemap of task `pid` in the folder `images`.
    ///
    /// # Errors
    /// When it is missing or not a pagemap.
    pub fn read(images: &Path, pid: u32) -> Result<Self, ImageError> {
        Self::parse(&read(images, &format!("pagemap-{pid}.img"))?)
    }

    /// Reads a pagemap image.
    ///
    /// # Errors
    /// When it is not one.
    pub fn parse(image: &[u8]) -> Result<Self, ImageError> {
        let mut records = records(image, PAGEMAP_MAGIC)?;
        let head = records.next().ok_or(ImageError::Format("a pagemap without a head"))??;
        let mut pagemap = Self::default();
        for field in fields(head) {
            if let Field { number: 1, value, .. } = field? {
                pagemap.pages_id = value as u32;
            }
        }
        for record in records {
            pagemap.runs.push(run(record?)?);
        }
        Ok(pagemap)
    }

    /// Bytes of content that the pages image holds.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().filter(|run| run.present).map(|run| run.end - run.start).sum()
    }
}

fn run(record: &[u8]) -> Result<PageRun, ImageError> {
    let (mut start, mut few, mut many, mut flags, mut in_parent) = (0, 0, None, None, false);
    for field in fields(record) {
        let field = field?;
        match field.number {
            1 => start = field.value,
            2 => few = field.value,
            3 => in_parent = field.value != 0,
            4 => flags = Some(field.value),
            5 => many = Some(field.value),
            _ => {}
        }
    }
    let bytes = many.unwrap_or(few).checked_mul(PAGE);
    let end = bytes.and_then(|bytes| start.checked_add(bytes));
    let end = end.ok_or(ImageError::Format("a range of pages that does not end"))?;
    // Images without flags are older than the flags.
    let flags = flags.unwrap_or(if in_parent { 1 } else { 4 });
    let has = |bit: u64| flags & bit != 0;
    Ok(PageRun { start, end, in_parent: has(1), lazy: has(2), present: has(4) })
}

/// Reads the mappings of task `pid` in the folder `images`.
///
/// # Errors
/// When the mm image is missing or not one.
pub fn read_mappings(images: &Path, pid: u32) -> Result<Vec<Mapping>, ImageError> {
    parse_mappings(&read(images, &format!("mm-{pid}.img"))?)
}

/// Reads the mappings in an mm image.
///
/// # Errors
/// When it is not one.
pub fn parse_mappings(image: &[u8]) -> Result<Vec<Mapping>, ImageError> {
    const MAPPINGS: u64 = 14;
    let mut records = records(image, MM_MAGIC)?;
    let record = records.next().ok_or(ImageError::Format("an empty mm image"))??;
    let mut mappings = Vec::new();
    for field in fields(record) {
        let Field { number: MAPPINGS, bytes: Some(bytes), .. } = field? else { continue };
        let mut mapping = Mapping::default();
        for field in fields(bytes) {
            let field = field?;
            match field.number {
                1 => mapping.start = field.value,
                2 => mapping.end = field.value,
                6 => mapping.flags = field.value as u32,
                7 => mapping.status = field.value as u32,
                _ => {}
            }
        }
        mappings.push(mapping);
    }
    Ok(mappings)
}

/// Bytes of all pages images in the folder `images`.
///
/// # Errors
/// When the folder cannot be read.
pub fn pages_bytes(images: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in images.read_dir()? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("pages-") && name.ends_with(".img") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// Pids of the tasks whose memory the folder `images` describes, in no order.
///
/// # Errors
/// When the folder cannot be read.
pub fn tasks(images: &Path) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in images.read_dir()? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("mm-")?.strip_suffix(".img"));
        pids.extend(pid.and_then(|pid| pid.parse::<u32>().ok()));
    }
    Ok(pids)
}

/// Checks that what was hidden of task `pid` is exactly what a lazy restore asks for, and that the
/// images hold none of it. `pid` is the task's in its own pid namespace, which names the images.
///
/// # Errors
/// The first range where that is not so, or an image that cannot be read.
pub fn check(images: &Path, pid: u32, hidden: &[HiddenRange]) -> Result<(), Leak> {
    let mappings = read_mappings(images, pid)?;
    check_parsed(&Pagemap::read(images, pid)?, &mappings, hidden)
}

/// As [`check`], of images read before.
///
/// # Errors
/// As there.
pub fn check_parsed(
    pagemap: &Pagemap,
    mappings: &[Mapping],
    hidden: &[HiddenRange],
) -> Result<(), Leak> {
    let hidden = joined(hidden.iter().map(|range| (range.start, range.end)));
    let lazy = mappings.iter().filter(|mapping| mapping.can_be_lazy());
    let lazy = joined(lazy.map(|mapping| (mapping.start, mapping.end)));
    let dumped = joined(pagemap.runs.iter().map(|run| (run.start, run.end)));
    if let Some((start, end)) = minus(&hidden, &lazy) {
        return Err(Leak::NotLazy(start, end));
    }
    if let Some((start, end)) = minus(&lazy, &hidden) {
        return Err(Leak::NotHidden(start, end));
    }
    match dumped.iter().find_map(|run| overlap(*run, &hidden)) {
        Some((start, end)) => Err(Leak::InImages(start, end)),
        None => Ok(()),
    }
}

type Span = (u64, u64);

/// The spans in ascending order, those that touch as one.
fn joined(spans: impl Iterator<Item = Span>) -> Vec<Span> {
    let mut spans: Vec<_> = spans.filter(|span| span.0 < span.1).collect();
    spans.sort_unstable();
    let mut all: Vec<Span> = Vec::with_capacity(spans.len());
    for (start, end) in spans {
        match all.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => all.push((start, end)),
        }
    }
    all
}

/// The first part of `these` that is not in `those`. Both are [`joined`].
fn minus(these: &[Span], those: &[Span]) -> Option<Span> {
    these.iter().find_map(|&(start, end)| {
        let that = those.iter().find(|that| that.1 > start).filter(|that| that.0 < end);
        match that {
            None => Some((start, end)),
            Some(that) if that.0 > start => Some((start, that.0)),
            Some(that) if that.1 < end => Some((that.1, end)),
            Some(_) => None,
        }
    })
}

/// The first part of `span` that is in `those`.
fn overlap(span: Span, those: &[Span]) -> Option<Span> {
    let at = those.partition_point(|that| that.1 <= span.0);
    let that = those.get(at).filter(|that| that.0 < span.1)?;
    Some((span.0.max(that.0), span.1.min(that.1)))
}

fn read(images: &Path, name: &str) -> Result<Vec<u8>, ImageError> {
    std::fs::read(images.join(name)).map_err(|err| ImageError::Io(name.to_owned(), err))
}

#[cfg(test)]
mod tests;
