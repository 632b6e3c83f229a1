//! Images in a folder.

use super::{MOST_BYTES, Source, Span, check_size};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The most files that a folder is looked through for.
const MOST_FILES: usize = 1 << 20;

/// A folder of images. Links in it are not followed: who made it may not be who reads it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    sizes: BTreeMap<String, u64>,
}

impl Folder {
    /// Looks what is in `path`.
    ///
    /// # Errors
    /// When it cannot be listed, or has more files than a checkpoint can have.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut sizes = BTreeMap::new();
        for entry in path.read_dir()? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let meta = entry.metadata()?;
            // The one link that CRIU makes is to an earlier dump.
            if meta.is_file() || name == "parent" {
                sizes.insert(name, meta.len());
            }
            if sizes.len() > MOST_FILES {
                return Err(io::Error::other("the folder has too many files for a checkpoint"));
            }
        }
        Ok(Self { path: path.to_owned(), sizes })
    }

    fn file(&self, name: &str) -> io::Result<Option<File>> {
        if !self.sizes.contains_key(name) {
            return Ok(None);
        }
        // Neither a link nor a FIFO that has taken the file's place.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(self.path.join(name))?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        Ok(Some(file))
    }
}

impl Source for Folder {
    fn names(&self) -> Vec<String> {
        self.sizes.keys().cloned().collect()
    }

    fn size(&self, name: &str) -> Option<u64> {
        self.sizes.get(name).copied()
    }

    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = self.file(name)? else { return Ok(None) };
        check_size(file.metadata()?.len())?;
        let mut bytes = Vec::new();
        // It may grow meanwhile.
        file.take(MOST_BYTES).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn pages(&mut self, spans: &[Span]) -> io::Result<Vec<Vec<u8>>> {
        let read = |span: &Span| {
            let Some(file) = self.file(&span.name)? else { return Ok(Vec::new()) };
            let mut bytes = vec![0; span.length];
            match file.read_exact_at(&mut bytes, span.offset) {
                Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => Ok(Vec::new()),
                other => other.map(|()| bytes),
            }
        };
        spans.iter().map(read).collect()
    }
}
