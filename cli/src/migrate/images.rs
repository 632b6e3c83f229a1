//! Images on their way: those that are complete early go while the dump still runs.
//!
//! CRIU writes the images of memory in the middle of a dump and closes them at once. They are most of
//! the bytes, and their transfer hides behind the rest of the dump.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::transport::link::Link;
use crate::wire::messages::{ImageFile, Request};

/// Images up to this size cross as one piece, bytes.
const TOGETHER: u64 = 4 << 20;

/// The folder of a dump, and what of it has been sent.
pub(super) struct Images {
    dir: PathBuf,
    /// Stays until the pause is over: the kernel takes 10 ms and more to end it.
    watch: Option<AsyncFd<Watch>>,
    sent: BTreeSet<String>,
    /// Bytes of images of memory.
    pub(super) pages: u64,
    /// Bytes of all others.
    pub(super) rest: u64,
    /// How many went while the dump still ran.
    pub(super) early: usize,
}

/// An inotify descriptor that tokio can wait for.
struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Images {
    /// Images that will come to lie in `dir`; if `early`, those of memory go as soon as they do.
    pub(super) fn new(dir: PathBuf, early: bool) -> Self {
        let watched = early.then(|| watch(&dir)).transpose();
        // An image that cannot be watched for goes with the others.
        let watch = watched.inspect_err(|error| log::debug!("watch the images: {error}"));
        let watch = watch.ok().flatten();
        Self { dir, watch, sent: BTreeSet::new(), pages: 0, rest: 0, early: 0 }
    }

    /// Sends images of memory as soon as they are complete, until `done`. How many answers are to
    /// come for that.
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
            let names = tokio::select! {
                biased;
                _ = done.wait_for(|done| *done) => return Ok(answers),
                names = closed(watch) => names.context("watch the images")?,
            };
            for name in names.into_iter().filter(|name| is_pages(name)) {
                // The orders say nothing of it yet: one that was there before goes with the others.
                let file = self.file(&name)?;
                link.send_on(&Request::PutImages(vec![file.clone()])).await?;
                link.file(&self.dir.join(&name), file.size).await?;
                link.end_stream().await?;
                answers += 1;
                self.early += 1;
            }
        }
    }

    fn file(&mut self, name: &str) -> Result<ImageFile> {
        let size = std::fs::metadata(self.dir.join(name)).context("look at an image")?.len();
        *(if is_pages(name) { &mut self.pages } else { &mut self.rest }) += size;
        self.sent.insert(name.to_owned());
        Ok(ImageFile { name: name.to_owned(), size })
    }

    /// Sends all that are left, with the order to restore; the answer to that is still to come.
    ///
    /// # Errors
    /// When a file cannot be read or the destination has no room.
    pub(super) async fn send_rest(&mut self, link: &mut Link) -> Result<()> {
        let (mut files, mut all) = (Vec::new(), Vec::new());
        // They lie in memory: reading them here is quicker than asking another thread to.
        for entry in std::fs::read_dir(&self.dir).context("read the images")? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Logs and the like stay here.
            let wanted = name.ends_with(".img") || name.ends_with(".json");
            if !wanted || self.sent.contains(&name) || !entry.file_type()?.is_file() {
                continue;
            }
            let mut file = self.file(&name)?;
            if file.size <= TOGETHER {
                let bytes = std::fs::read(entry.path()).context("read the images")?;
                file.size = bytes.len() as u64;
                all.extend(bytes);
            }
            files.push(file);
        }
        ensure!(!self.sent.is_empty(), "the dump left no images");
        // Those that are long come last, and are not read into memory as a whole.
        files.sort_by_key(|file| file.size > TOGETHER);
        link.send_on(&Request::Restore(files.clone())).await?;
        link.piece(&all).await?;
        for file in files.iter().filter(|file| file.size > TOGETHER) {
            link.file(&self.dir.join(&file.name), file.size).await?;
        }
        link.end_stream().await
    }

    /// Where they are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

fn watch(dir: &Path) -> io::Result<AsyncFd<Watch>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(dir, AddWatchFlags::IN_CLOSE_WRITE)?;
    register(Watch(inotify))
}

#[allow(unsafe_code)] // tokio cannot know that the descriptor stays the same
fn register(watch: Watch) -> io::Result<AsyncFd<Watch>> {
    // SAFETY: the descriptor is owned by the watch, and stays the same one as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) }?)
}

fn is_pages(name: &str) -> bool {
    name.starts_with("pages-") && name.ends_with(".img")
}

/// The next files that were closed after writing.
async fn closed(watch: &AsyncFd<Watch>) -> io::Result<Vec<String>> {
    let events = watch
        .async_io(Interest::READABLE, |watch| match watch.0.read_events() {
            Err(Errno::EAGAIN) => Err(io::ErrorKind::WouldBlock.into()),
            events => Ok(events?),
        })
        .await?;
    let names = events.into_iter().filter_map(|event| event.name);
    Ok(names.map(|name| name.to_string_lossy().into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_told_of_when_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let watch = watch(dir.path()).unwrap();
        std::fs::write(dir.path().join("pages-1.img"), "x").unwrap();
        assert_eq!(closed(&watch).await.unwrap(), ["pages-1.img"]);
    }

    #[test]
    fn only_images_of_memory_go_early() {
        assert!(is_pages("pages-1.img") && is_pages("pages-shmem-2.img"));
        for other in ["pagemap-1.img", "pages-1.img.new", "inventory.img", "pages"] {
            assert!(!is_pages(other), "{other}");
        }
    }
}
