//! Writes images of memory, as CRIU itself does: for what it did not dump.

use super::{ImageError, PAGE, PAGEMAP_MAGIC, PageRun, Pagemap, read};
use crate::criu::decode::{encode, image};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::{Component, Path, PathBuf};

/// Name of the link to the folder of the dump before, in the folder of a dump.
pub const PARENT: &str = "parent";
/// Flags of a range: in the parent, in the pages image.
const IN_PARENT: u64 = 1;
const PRESENT: u64 = 4;
/// What is copied at once, bytes.
const COPY: usize = 4 << 20;
/// The longest chain of dumps that is followed.
const MOST_PARENTS: usize = 1 << 10;

/// Writes a pagemap and its pages image. They take their names when they are complete.
#[derive(Debug)]
pub struct PagesWriter {
    folder: PathBuf,
    /// `pagemap-PID.img`, or one of shared memory.
    name: String,
    pages_id: u32,
    pages: BufWriter<File>,
    runs: Vec<PageRun>,
}

impl PagesWriter {
    /// Begins the image of task `pid`, the one in its own pid namespace, in `folder`.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn of_task(folder: &Path, pid: u32, pages_id: u32) -> io::Result<Self> {
        Self::new(folder, &format!("pagemap-{pid}.img"), pages_id)
    }

    fn new(folder: &Path, name: &str, pages_id: u32) -> io::Result<Self> {
        let pages = create(&folder.join(format!("{}.new", pages_name(pages_id))))?;
        Ok(Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            pages_id,
            pages: BufWriter::with_capacity(COPY, pages),
            runs: Vec::new(),
        })
    }

    /// Adds whole pages. Calls come in ascending order of addresses.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn present(&mut self, start: u64, bytes: &[u8]) -> io::Result<()> {
        self.pages.write_all(bytes)?;
        self.add(start..start + bytes.len() as u64, false);
        Ok(())
    }

    /// Adds pages that an earlier dump has.
    pub fn in_parent(&mut self, range: Range<u64>) {
        self.add(range, true);
    }

    /// Adds the pages `range`, which are in `from` at `offset`.
    ///
    /// # Errors
    /// When they cannot be read or written.
    pub fn copy(&mut self, range: Range<u64>, from: &File, mut offset: u64) -> io::Result<()> {
        let mut buffer = vec![0; COPY.min((range.end - range.start) as usize)];
        let mut start = range.start;
        while start < range.end {
            let size = buffer.len().min((range.end - start) as usize);
            from.read_exact_at(&mut buffer[..size], offset)?;
            self.present(start, &buffer[..size])?;
            start += size as u64;
            offset += size as u64;
        }
        Ok(())
    }

    fn add(&mut self, range: Range<u64>, in_parent: bool) {
        if range.is_empty() {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if last.end == range.start && last.in_parent == in_parent => {
                last.end = range.end;
            }
            _ => self.runs.push(PageRun {
                start: range.start,
                end: range.end,
                in_parent,
                lazy: false,
                present: !in_parent,
            }),
        }
    }

    /// Gives both their names, and returns the bytes of the pages image.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn finish(mut self) -> io::Result<u64> {
        self.pages.flush()?;
        let mut records = vec![encode::number(1, self.pages_id.into())];
        records.extend(self.runs.iter().map(record));
        let pagemap = self.folder.join(format!("{}.new", self.name));
        create(&pagemap)?.write_all(&image(PAGEMAP_MAGIC, &records))?;
        let pages = self.folder.join(pages_name(self.pages_id));
        fs::rename(self.folder.join(format!("{}.new", pages_name(self.pages_id))), pages)?;
        fs::rename(pagemap, self.folder.join(&self.name))?;
        let bytes = self.runs.iter().filter(|run| run.present).map(|run| run.end - run.start);
        Ok(bytes.sum())
    }
}

fn record(run: &PageRun) -> Vec<u8> {
    let pages = (run.end - run.start) / PAGE;
    let flags = if run.in_parent { IN_PARENT } else { PRESENT };
    // The number of pages twice: 32 bits of it where CRIU before 4.2 looks.
    let few = u64::from(u32::try_from(pages).unwrap_or(u32::MAX));
    [(1, run.start), (2, few), (4, flags), (5, pages)]
        .map(|(number, value)| encode::number(number, value))
        .concat()
}

/// Pages of a task that a dump has left out, and where they are.
#[derive(Debug, Clone, Default)]
pub struct LeftOut {
    /// Ranges and their first byte in the file, ascending.
    pub present: Vec<(Range<u64>, u64)>,
    /// Ranges that the dump before has.
    pub in_parent: Vec<Range<u64>>,
}

/// Adds to the images of task `pid` what its dump has left out, of which the content is in `from`.
///
/// # Errors
/// When the dump has some of these pages itself, or images cannot be read or written. They are as they
/// were then.
pub fn merge(images: &Path, pid: u32, left: &LeftOut, from: &File) -> Result<(), ImageError> {
    let name = format!("pagemap-{pid}.img");
    let old = Pagemap::read(images, pid)?;
    let pages = open(images, old.pages_id)?;
    enum From {
        Dump(u64),
        LeftOut(u64),
        Parent,
    }
    let (mut pieces, mut offset) = (Vec::new(), 0);
    for run in &old.runs {
        let from = if run.present { From::Dump(offset) } else { From::Parent };
        pieces.push((run.start..run.end, from));
        offset += if run.present { run.end - run.start } else { 0 };
    }
    let present = left.present.iter().map(|(range, at)| (range.clone(), From::LeftOut(*at)));
    pieces.extend(present);
    pieces.extend(left.in_parent.iter().map(|range| (range.clone(), From::Parent)));
    pieces.sort_by_key(|(range, _)| range.start);
    if pieces.windows(2).any(|pair| pair[0].0.end > pair[1].0.start) {
        return Err(ImageError::Format("it has pages that were to be left out"));
    }
    let write = || -> io::Result<()> {
        let mut writer = PagesWriter::new(images, &name, old.pages_id)?;
        for (range, piece) in pieces {
            match piece {
                From::Dump(at) => writer.copy(range, &pages, at)?,
                From::LeftOut(at) => writer.copy(range, from, at)?,
                From::Parent => writer.in_parent(range),
            }
        }
        writer.finish().map(drop)
    };
    write().map_err(|err| ImageError::Io(name.clone(), err))
}

/// Names `parent` as the dump before the one in `images`. By a path from one to the other, so that both
/// can be moved together.
///
/// # Errors
/// When one of them cannot be found, or the link cannot be made.
pub fn link_parent(images: &Path, parent: &Path) -> io::Result<()> {
    symlink(path_between(images, parent)?, images.join(PARENT))
}

/// The path to `parent` as seen from `images`.
///
/// # Errors
/// When one of them cannot be found.
pub fn path_between(images: &Path, parent: &Path) -> io::Result<PathBuf> {
    let (from, to) = (images.canonicalize()?, parent.canonicalize()?);
    let (from, to): (Vec<_>, Vec<_>) = (from.components().collect(), to.components().collect());
    let same = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = from[same..].iter().map(|_| Component::ParentDir);
    Ok(up.chain(to[same..].iter().copied()).collect())
}

/// Copies into `images` what they refer to in earlier dumps, and takes the link to these away.
///
/// # Errors
/// When an earlier dump lacks a page, or images cannot be read or written.
pub fn flatten(images: &Path) -> Result<(), ImageError> {
    let failed = |name: &str| {
        let name = name.to_owned();
        move |err| ImageError::Io(name, err)
    };
    let chain = chain(images).map_err(failed(PARENT))?;
    if chain.len() < 2 {
        return Ok(());
    }
    for entry in fs::read_dir(images).map_err(failed("the images"))? {
        let name = entry.map_err(failed("the images"))?.file_name().to_string_lossy().into_owned();
        if name.starts_with("pagemap-") && name.ends_with(".img") {
            flatten_one(&chain, &name)?;
        }
    }
    fs::remove_file(images.join(PARENT)).map_err(failed(PARENT))
}

fn flatten_one(chain: &[PathBuf], name: &str) -> Result<(), ImageError> {
    let levels = chain.iter().map(|folder| Level::open(folder, name));
    // A task that is younger than a dump has none there.
    let levels = levels.map_while(Result::transpose).collect::<Result<Vec<_>, _>>()?;
    let Some(own) = levels.first() else { return Ok(()) };
    if !own.runs.values().any(|run| run.offset.is_none()) {
        return Ok(());
    }
    let failed = |err| ImageError::Io(name.to_owned(), err);
    let mut writer = PagesWriter::new(&chain[0], name, own.pages_id).map_err(failed)?;
    for (start, run) in &own.runs {
        copy(&mut writer, &levels, *start..run.end, name)?;
    }
    writer.finish().map_err(failed).map(drop)
}

/// Copies the pages `range` from the first of `levels` that has them.
fn copy(
    writer: &mut PagesWriter,
    levels: &[Level],
    range: Range<u64>,
    name: &str,
) -> Result<(), ImageError> {
    let missing = ImageError::Format("an earlier dump lacks a page that it refers to");
    let Some((level, earlier)) = levels.split_first() else { return Err(missing) };
    let mut start = range.start;
    while start < range.end {
        let Some((first, run)) = level.runs.range(..=start).next_back() else {
            return Err(missing);
        };
        let end = run.end.min(range.end);
        if end <= start {
            return Err(missing);
        }
        match run.offset {
            Some(offset) => writer
                .copy(start..end, &level.pages, offset + (start - first))
                .map_err(|err| ImageError::Io(name.to_owned(), err))?,
            None => copy(writer, earlier, start..end, name)?,
        }
        start = end;
    }
    Ok(())
}

/// The images of one task in one dump.
struct Level {
    pages_id: u32,
    pages: File,
    /// By first address.
    runs: BTreeMap<u64, LevelRun>,
}

struct LevelRun {
    end: u64,
    /// In the pages image; `None` when it is in the dump before.
    offset: Option<u64>,
}

impl Level {
    fn open(folder: &Path, name: &str) -> Result<Option<Self>, ImageError> {
        let bytes = match read(folder, name) {
            Err(ImageError::Io(_, err)) if err.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let pagemap = Pagemap::parse(&bytes)?;
        let (mut runs, mut at) = (BTreeMap::new(), 0);
        for run in &pagemap.runs {
            let offset = run.present.then_some(at);
            at += if run.present { run.end - run.start } else { 0 };
            runs.insert(run.start, LevelRun { end: run.end, offset });
        }
        let pages = open(folder, pagemap.pages_id)?;
        Ok(Some(Self { pages_id: pagemap.pages_id, pages, runs }))
    }
}

/// The folder, and those of the dumps before.
fn chain(images: &Path) -> io::Result<Vec<PathBuf>> {
    let mut chain = vec![images.to_owned()];
    loop {
        let last = &chain[chain.len() - 1];
        match fs::canonicalize(last.join(PARENT)) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(chain),
            Err(err) => return Err(err),
            Ok(_) if chain.len() > MOST_PARENTS => {
                return Err(io::Error::other("the chain of earlier dumps has no end"));
            }
            Ok(parent) => chain.push(parent),
        }
    }
}

fn pages_name(id: u32) -> String {
    format!("pages-{id}.img")
}

fn open(folder: &Path, pages_id: u32) -> Result<File, ImageError> {
    let name = pages_name(pages_id);
    File::open(folder.join(&name)).map_err(|err| ImageError::Io(name, err))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE as usize]
    }

    fn run(start: u64, end: u64, in_parent: bool) -> PageRun {
        PageRun { start, end, in_parent, lazy: false, present: !in_parent }
    }

    /// The bytes at which each page of the pages image begins.
    fn pages(folder: &Path, id: u32) -> Vec<u8> {
        let bytes = fs::read(folder.join(pages_name(id))).unwrap();
        bytes.chunks(PAGE as usize).map(|page| page[0]).collect()
    }

    #[test]
    fn what_is_written_is_read_and_neighbours_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = PagesWriter::of_task(dir.path(), 7, 3).unwrap();
        writer.present(0x1000, &page(1)).unwrap();
        writer.present(0x2000, &[page(2), page(3)].concat()).unwrap();
        writer.in_parent(0x4000..0x6000);
        writer.in_parent(0x6000..0x7000);
        writer.present(1 << 46, &page(4)).unwrap();
        assert!(Pagemap::read(dir.path(), 7).is_err(), "not before it is complete");
        assert_eq!(writer.finish().unwrap(), 4 * PAGE);
        let expected = Pagemap {
            pages_id: 3,
            runs: vec![
                run(0x1000, 0x4000, false),
                run(0x4000, 0x7000, true),
                run(1 << 46, (1 << 46) + PAGE, false),
            ],
        };
        assert_eq!(Pagemap::read(dir.path(), 7).unwrap(), expected);
        assert_eq!(pages(dir.path(), 3), [1, 2, 3, 4]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_dump_is_completed_in_the_order_of_addresses_and_never_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut dumped = PagesWriter::of_task(dir.path(), 1, 1).unwrap();
        dumped.present(0x2000, &page(2)).unwrap();
        dumped.present(0x9000, &page(9)).unwrap();
        dumped.finish().unwrap();
        let content = dir.path().join("content");
        fs::write(&content, [page(7), page(1), page(5)].concat()).unwrap();
        let content = File::open(content).unwrap();
        let left = LeftOut {
            present: vec![(0x1000..0x2000, PAGE), (0x5000..0x6000, 2 * PAGE)],
            in_parent: std::iter::once(0x3000..0x5000).collect(),
        };
        merge(dir.path(), 1, &left, &content).unwrap();
        let runs = Pagemap::read(dir.path(), 1).unwrap().runs;
        let expected = [
            run(0x1000, 0x3000, false),
            run(0x3000, 0x5000, true),
            run(0x5000, 0x6000, false),
            run(0x9000, 0xa000, false),
        ];
        assert_eq!(runs, expected);
        assert_eq!(pages(dir.path(), 1), [1, 2, 5, 9]);
        let twice =
            LeftOut { in_parent: std::iter::once(0x9000..0xa000).collect(), ..LeftOut::default() };
        assert!(merge(dir.path(), 1, &twice, &content).is_err());
        assert_eq!(pages(dir.path(), 1), [1, 2, 5, 9]);
    }

    #[test]
    fn flattened_images_hold_what_the_nearest_dump_has() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (first, second, last) = (folder("pre/1"), folder("pre/2"), folder("last"));
        let mut writer = PagesWriter::of_task(&first, 1, 1).unwrap();
        writer.present(0x1000, &[page(1), page(2), page(3), page(4)].concat()).unwrap();
        writer.finish().unwrap();
        let mut writer = PagesWriter::of_task(&second, 1, 1).unwrap();
        writer.in_parent(0x1000..0x2000);
        writer.present(0x2000, &page(20)).unwrap();
        writer.in_parent(0x3000..0x5000);
        writer.finish().unwrap();
        let mut writer = PagesWriter::of_task(&last, 1, 5).unwrap();
        writer.in_parent(0x1000..0x4000);
        writer.present(0x4000, &page(40)).unwrap();
        writer.finish().unwrap();
        // Began after the pre-dumps.
        let mut writer = PagesWriter::of_task(&last, 9, 6).unwrap();
        writer.present(0x1000, &page(9)).unwrap();
        writer.finish().unwrap();
        link_parent(&second, &first).unwrap();
        link_parent(&last, &second).unwrap();
        assert_eq!(fs::read_link(last.join(PARENT)).unwrap(), Path::new("../pre/2"));
        assert_eq!(fs::read_link(second.join(PARENT)).unwrap(), Path::new("../1"));
        flatten(&last).unwrap();
        assert_eq!(Pagemap::read(&last, 1).unwrap().runs, [run(0x1000, 0x5000, false)]);
        assert_eq!(pages(&last, 5), [1, 20, 3, 40]);
        assert_eq!(pages(&last, 6), [9]);
        assert!(!last.join(PARENT).exists());
        // Nothing to do, and a page that nobody has.
        flatten(&last).unwrap();
        let mut writer = PagesWriter::of_task(&last, 1, 5).unwrap();
        writer.in_parent(0x1000..0x7000);
        writer.finish().unwrap();
        link_parent(&last, &second).unwrap();
        assert!(flatten(&last).unwrap_err().to_string().contains("lacks a page"));
    }
}
