//! CRIU's images in a tar archive, which may be compressed.
//!
//! Two passes: the first keeps small images and notes how long the others are, the second gets the few
//! parts of memory in which the command lines are.

use std::collections::BTreeMap;
use std::io;

use ferry_oci::criu::images::{MOST_BYTES, Source, Span, check_size};

use crate::untar::{Kind, Reader, Stream, bad};

/// The most bytes of all images that are kept.
const MOST_KEPT: u64 = 256 << 20;
/// Of a log only its beginning is of interest, which has the version, bytes.
const LOG_HEAD: u64 = 4096;

/// Opens an archive at its beginning, uncompressed.
pub(crate) type Open = Box<dyn Fn() -> io::Result<Box<dyn Stream>> + Send>;

/// What is in an archive.
pub(crate) struct Archive {
    open: Open,
    prefix: &'static str,
    sizes: BTreeMap<String, u64>,
    kept: BTreeMap<String, Vec<u8>>,
}

impl Archive {
    /// Walks through the archive that `open` gives.
    ///
    /// # Errors
    /// When it cannot be read, or has what is refused (see [`crate::untar`]).
    pub(crate) fn read(open: Open) -> io::Result<Self> {
        let mut reader = Reader::new(open()?);
        let (mut sizes, mut kept, mut room) = (BTreeMap::new(), BTreeMap::new(), MOST_KEPT);
        while let Some(entry) = reader.next()? {
            if entry.kind == Kind::Folder {
                continue;
            }
            if let Some(most) = worth(&entry.name) {
                let bytes = if most < MOST_BYTES { entry.size.min(most) } else { entry.size };
                let named = |error| io::Error::other(format!("{}: {error}", entry.name));
                check_size(bytes).map_err(named)?;
                let too_much = || bad("the archive has more images than a checkpoint can have");
                room = room.checked_sub(bytes).ok_or_else(too_much)?;
                kept.insert(entry.name.clone(), reader.part(bytes)?);
            }
            if sizes.insert(entry.name.clone(), entry.size).is_some() {
                return Err(bad(&format!("{:?} is in the archive twice", entry.name)));
            }
        }
        Ok(Self { open, prefix: "", sizes, kept })
    }

    /// From now on images are looked for in this folder of the archive, if they are not at its root.
    pub(crate) fn enter(&mut self, prefix: &'static str) {
        if self.sizes.keys().any(|name| name.starts_with(prefix)) && self.size(INVENTORY).is_none()
        {
            self.prefix = prefix;
        }
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

const INVENTORY: &str = "inventory.img";

/// How many bytes of a file are worth keeping, if any.
fn worth(name: &str) -> Option<u64> {
    const IMAGES: [&str; 6] = ["core-", "mm-", "pagemap-", "ids-", "fdinfo-", "mountpoints-"];
    let (folder, name) = name.rsplit_once('/').unwrap_or(("", name));
    if !matches!(folder, "" | "checkpoint") {
        return None;
    }
    match name {
        INVENTORY | "pstree.img" | "files.img" | "stats-dump" => Some(MOST_BYTES),
        "ferry.json" | "config.dump" | "spec.dump" => Some(MOST_BYTES),
        "dump.log" => Some(LOG_HEAD),
        _ if !name.ends_with(".img") || name.starts_with("pagemap-shmem-") => None,
        _ if name.starts_with("utsns-") => Some(MOST_BYTES),
        _ => IMAGES.iter().any(|image| name.starts_with(image)).then_some(MOST_BYTES),
    }
}

impl Source for Archive {
    fn names(&self) -> Vec<String> {
        let names = self.sizes.keys().filter_map(|name| name.strip_prefix(self.prefix));
        names.filter(|name| !name.contains('/')).map(str::to_owned).collect()
    }

    fn size(&self, name: &str) -> Option<u64> {
        self.sizes.get(&self.path(name)).copied()
    }

    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.kept.get(&self.path(name)).cloned())
    }

    fn pages(&mut self, spans: &[Span]) -> io::Result<Vec<Vec<u8>>> {
        let mut found = vec![Vec::new(); spans.len()];
        let mut wanted: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, span) in spans.iter().enumerate() {
            wanted.entry(self.path(&span.name)).or_default().push(index);
        }
        let mut reader = Reader::new((self.open)()?);
        while !wanted.is_empty() {
            let Some(entry) = reader.next()? else { break };
            let Some(mut these) = wanted.remove(&entry.name) else { continue };
            these.sort_by_key(|index| spans[*index].offset);
            let mut at = 0;
            for index in these {
                let span = &spans[index];
                // One that overlaps the one before it, or leads out, has no content.
                let Some(gap) = span.offset.checked_sub(at) else { continue };
                let end = span.offset.saturating_add(span.length as u64);
                if end > entry.size {
                    continue;
                }
                reader.pass(gap)?;
                found[index] = reader.part(span.length as u64)?;
                at = end;
            }
        }
        Ok(found)
    }
}
