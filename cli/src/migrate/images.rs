//! Images on their way: those that are complete early go while the dump still runs.
//!
//! CRIU writes the images of memory in the middle of a dump and closes them at once. They are most of
//! the bytes, and their transfer hides behind the rest of the dump; what of them the destination has
//! already stays here.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use ferry_oci::criu::RESTORE_GATE;
use ferry_oci::pages::patch::Known;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::sync::watch;

use crate::transport::link::Link;
use crate::wire::messages::{ImageFile, Request};

/// How often images are looked for. To be told of each one would take CRIU's processor from it for some
/// 15 us at each of its files.
const LOOK: Duration = Duration::from_millis(2);

/// Images of memory up to this size may cross as patches, bytes.
const PATCHED: u64 = 64 << 20;

/// Images up to this size cross as one piece, bytes.
const TOGETHER: u64 = 4 << 20;

/// The folder of a dump, and what of it has been sent.
pub(super) struct Images {
    dir: PathBuf,
    /// Pages that the destination has.
    known: Arc<Known>,
    /// Stays until the pause is over: the kernel takes 10 ms and more to end it.
    watch: Option<Inotify>,
    sent: BTreeMap<String, Stamp>,
    /// Bytes of images of memory.
    pub(super) pages: u64,
    /// Of these, bytes that were sent as a patch, and how long the patches were.
    pub(super) patched: (u64, u64),
    /// Bytes of all others.
    pub(super) rest: u64,
    /// How many went while the dump still ran.
    pub(super) early: usize,
}

/// Tells whether a file is still as it was: its size and when it was written.
type Stamp = (u64, Option<SystemTime>);

/// An image and its content, if that is not to be read while it is sent.
type Loaded = (ImageFile, Option<Vec<u8>>);

impl Images {
    /// Images that will come to lie in `dir`; if `early`, they go as soon as they do.
    pub(super) fn new(dir: PathBuf, early: bool, known: Arc<Known>) -> Self {
        let watched = early.then(|| watch(&dir)).transpose();
        // An image that cannot be watched for goes with the others.
        let watch = watched.inspect_err(|error| log::debug!("watch the images: {error}"));
        let watch = watch.ok().flatten();
        let (sent, patched) = (BTreeMap::new(), (0, 0));
        Self { dir, known, watch, sent, pages: 0, patched, rest: 0, early: 0 }
    }

    /// Sends images as soon as they are complete, until `done`. How many answers are to come for that.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn send_early(
        &mut self,
        link: &mut Link,
        done: &mut watch::Receiver<bool>,
    ) -> Result<usize> {
        let mut answers = 0;
        loop {
            let Some(watch) = &self.watch else { return Ok(answers) };
            tokio::select! {
                biased;
                _ = done.wait_for(|done| *done) => return Ok(answers),
                () = tokio::time::sleep(LOOK) => {}
            }
            let names = closed(watch).context("watch the images")?;
            // One that was taken away again is none.
            let names = names.into_iter().filter(|name| goes_early(name));
            let names = names.filter(|name| self.dir.join(name).exists()).collect::<Vec<_>>();
            let loaded = names.iter().map(|name| self.load(name)).collect::<Result<Vec<_>>>()?;
            if !loaded.is_empty() {
                self.early += loaded.len();
                answers += 1;
                self.send(link, loaded, Request::PutImages).await?;
            }
        }
    }

    /// Sends all that are left, with the order to restore; the answer to that is still to come.
    ///
    /// # Errors
    /// When a file cannot be read or the destination has no room.
    pub(super) async fn send_rest(&mut self, link: &mut Link) -> Result<()> {
        let mut loaded = Vec::new();
        // They lie in memory: reading them here is quicker than asking another thread to.
        for entry in std::fs::read_dir(&self.dir).context("read the images")? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Logs and the like stay here.
            let wanted = name.ends_with(".img") || name.ends_with(".json");
            let meta = entry.metadata().context("look at an image")?;
            // One that was written again after it had been complete goes again.
            if wanted && meta.is_file() && self.sent.get(&name) != Some(&stamp(&meta)) {
                loaded.push(self.load(&name)?);
            }
        }
        ensure!(!self.sent.is_empty(), "the dump left no images");
        self.send(link, loaded, Request::Restore).await
    }

    async fn send(
        &self,
        link: &mut Link,
        mut loaded: Vec<Loaded>,
        order: impl FnOnce(Vec<ImageFile>) -> Request,
    ) -> Result<()> {
        // Those that are long come last, and are not read into memory as a whole.
        loaded.sort_by_key(|(_, bytes)| bytes.is_none());
        let files = loaded.iter().map(|(file, _)| file.clone()).collect();
        link.send_on(&order(files)).await?;
        let bytes = loaded.iter().filter_map(|(_, bytes)| bytes.as_deref());
        link.piece(&bytes.collect::<Vec<_>>().concat()).await?;
        for (file, _) in loaded.iter().filter(|(_, bytes)| bytes.is_none()) {
            link.file(&self.dir.join(&file.name), file.size).await?;
        }
        link.end_stream().await
    }

    /// Makes an image ready to be sent.
    fn load(&mut self, name: &str) -> Result<Loaded> {
        let path = self.dir.join(name);
        let meta = std::fs::metadata(&path).context("look at an image")?;
        let size = meta.len();
        self.sent.insert(name.to_owned(), stamp(&meta));
        *(if is_pages(name) { &mut self.pages } else { &mut self.rest }) += size;
        let patch = is_pages(name) && !self.known.bytes().is_empty() && size <= PATCHED;
        if !patch && size > TOGETHER {
            return Ok((ImageFile::whole(name, size), None));
        }
        let bytes = std::fs::read(path).context("read the images")?;
        if patch {
            let patch = self.known.patch(&bytes);
            if patch.len() < bytes.len() {
                self.patched.0 += size;
                self.patched.1 += patch.len() as u64;
                let (name, size) = (name.to_owned(), patch.len() as u64);
                return Ok((ImageFile { name, size, patch: true }, Some(patch)));
            }
        }
        Ok((ImageFile::whole(name, bytes.len() as u64), Some(bytes)))
    }

    /// Where they are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

fn stamp(meta: &Metadata) -> Stamp {
    (meta.len(), meta.modified().ok())
}

fn watch(dir: &Path) -> io::Result<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(dir, AddWatchFlags::IN_CLOSE_WRITE)?;
    Ok(inotify)
}

/// Nothing is restored before inventory.img is there.
fn goes_early(name: &str) -> bool {
    name.ends_with(".img") && name != RESTORE_GATE
}

fn is_pages(name: &str) -> bool {
    name.starts_with("pages-") && name.ends_with(".img")
}

/// Files that were closed after writing since the last time.
fn closed(watch: &Inotify) -> io::Result<Vec<String>> {
    let events = match watch.read_events() {
        Err(Errno::EAGAIN) => return Ok(Vec::new()),
        events => events?,
    };
    let names = events.into_iter().filter_map(|event| event.name);
    Ok(names.map(|name| name.to_string_lossy().into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_told_of_when_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let watch = watch(dir.path()).unwrap();
        std::fs::write(dir.path().join("pages-1.img"), "x").unwrap();
        assert_eq!(closed(&watch).unwrap(), ["pages-1.img"]);
        assert!(closed(&watch).unwrap().is_empty());
    }

    #[test]
    fn images_of_memory_and_those_that_go_early_are_told_by_their_names() {
        assert!(is_pages("pages-1.img") && is_pages("pages-shmem-2.img"));
        for other in ["pagemap-1.img", "pages-1.img.new", "inventory.img", "pages"] {
            assert!(!is_pages(other), "{other}");
        }
        assert!(goes_early("pages-1.img") && goes_early("core-1.img"));
        assert!(!goes_early("inventory.img") && !goes_early("ferry.json"));
    }
}
