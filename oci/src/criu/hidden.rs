//! Memory that CRIU is not to dump, because ferry copies it itself.
//!
//! ```text
//!   before the freeze   Hiding::prepare ─ folder; Hiding::env ─ runc's environment
//!                       Hiding::store_smaps ─ a copy of what CRIU would read slowly
//!   in the freeze       Hiding::write ─ orders; then CRIU is released
//!   after the dump      Hiding::report, and images::check: what was hidden is not in the images
//! ```
//! A library in the criu process (`ferry-hide`) answers CRIU's questions about those pages. A
//! seccomp user notification could do it without a library, but cannot tell one `openat` from
//! another: measured, it adds 4 to 14 us to each of the 400 opens of a small dump and 3 to 9 us to
//! each of its 65 scans, 2 to 6 ms in all (the library: under 1 us each), sits in runc and all its
//! children too, and fails the dump when the shim that answers dies.
//!
//! The library is an optimisation. Without it, or with orders it cannot use, CRIU dumps
//! everything, and the check of the images finds out.

#[allow(dead_code, reason = "the library uses the rest")]
#[path = "../../hide/src/format.rs"]
mod format;
mod probe;
mod report;
mod smaps;
#[cfg(test)]
mod tests;

pub use probe::{CannotHide, Probe};
pub use report::HideReport;
pub use smaps::StoredSmaps;

use format as f;
use std::ffi::OsString;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Environment variable that names the folder of the orders to the library.
pub const HIDE_ENV: &str = f::FOLDER_ENV;

/// A range of addresses that is hidden, whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HiddenRange {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Guard pages may lie in it: CRIU must look for them, which takes it 1.3 ms for a GB. `false` only
    /// where there are surely none in the freeze.
    pub guards: bool,
}

/// A task that memory is hidden of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HiddenTask {
    /// Its pid as CRIU sees it in /proc: that of runc's pid namespace.
    pub pid: i32,
    /// What is hidden: ascending, without overlaps. These must be exactly the mappings that CRIU
    /// restores lazily, [`Mapping::can_be_lazy`](super::Mapping::can_be_lazy).
    pub ranges: Vec<HiddenRange>,
    /// The copy of its smaps, if it still [fits](StoredSmaps::fits) in the freeze.
    pub smaps: Option<StoredSmaps>,
}

/// Everything that is hidden from one dump.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orders {
    /// The tasks. Of all others nothing is hidden.
    pub tasks: Vec<HiddenTask>,
}

/// Why memory cannot be hidden.
#[derive(Debug, thiserror::Error)]
pub enum HideError {
    /// A file.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The library's path would be read as several.
    #[error("the path {0:?} has a space or a colon and cannot be preloaded")]
    Path(PathBuf),
    /// Not a pid.
    #[error("{0} is not a pid")]
    Pid(i32),
    /// A range that the library would refuse.
    #[error("the range {0:x}-{1:x} of task {2} is not in order or not made of whole pages")]
    Range(u64, u64, i32),
    /// The copy of smaps is of another task.
    #[error("the copy of smaps of task {0} was given to task {1}")]
    Smaps(i32, i32),
}

impl HideError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Finds the library where it is installed.
pub fn find_library() -> Option<PathBuf> {
    super::places::find(f::LIBRARY)
}

/// The folder through which one dump is told what to hide.
#[derive(Debug)]
pub struct Hiding {
    folder: PathBuf,
    library: PathBuf,
}

impl Hiding {
    /// Makes `folder`, or takes an empty one. It must stay until the dump has ended.
    ///
    /// # Errors
    /// When the folder cannot be made, or `library` has a path that cannot be preloaded.
    pub fn prepare(folder: &Path, library: &Path) -> Result<Self, HideError> {
        let absolute = |path: &Path| std::path::absolute(path);
        let folder = absolute(folder).map_err(HideError::io("find the folder of the orders"))?;
        let library = absolute(library).map_err(HideError::io("find the library that hides"))?;
        if library.as_os_str().as_encoded_bytes().iter().any(|b| b" :".contains(b)) {
            return Err(HideError::Path(library));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(HideError::io("make the folder of the orders"))?;
        for old in [f::ORDERS, f::REPORT] {
            match std::fs::remove_file(folder.join(old)) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => {
                    return Err(HideError::io("remove old orders")(err));
                }
                _ => {}
            }
        }
        Ok(Self { folder, library })
    }

    /// The folder that somebody else has prepared, and that CRIU may use already.
    pub fn join(folder: &Path, library: &Path) -> Self {
        Self { folder: folder.to_owned(), library: library.to_owned() }
    }

    /// What to add to runc's environment; CRIU gets it from there.
    pub fn env(&self) -> [(&'static str, OsString); 2] {
        let mut preload = OsString::from(&self.library);
        if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
            preload.push(":");
            preload.push(others);
        }
        [("LD_PRELOAD", preload), (f::FOLDER_ENV, self.folder.clone().into())]
    }

    /// Keeps what CRIU needs of `text`, the smaps of the task that CRIU sees as `pid`. Reading the
    /// real one takes 12 ms per GB; this is to be done before the freeze. A later copy of the
    /// same task replaces it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn store_smaps(&self, pid: i32, text: &[u8]) -> Result<StoredSmaps, HideError> {
        if pid <= 0 {
            return Err(HideError::Pid(pid));
        }
        let text = smaps::shorten(text);
        self.replace(&format!("{}{pid}", f::SMAPS_PREFIX), &text)
            .map_err(HideError::io("write a copy of smaps"))?;
        Ok(StoredSmaps::new(pid, &text))
    }

    /// Gives the orders: at once and whole. CRIU's process reads them once, when it first asks
    /// about a task, so this is the last thing before the dump is released.
    ///
    /// # Errors
    /// When they do not make sense or cannot be written; then nothing is hidden.
    pub fn write(&self, orders: &Orders) -> Result<(), HideError> {
        let bytes = orders.encode()?;
        self.replace(f::ORDERS, &bytes).map_err(HideError::io("write the orders"))
    }

    /// What came of the orders so far; `None` if no CRIU has loaded the library.
    ///
    /// # Errors
    /// When the report is there but cannot be read.
    pub fn report(&self) -> io::Result<Option<HideReport>> {
        HideReport::read(&self.folder.join(f::REPORT))
    }

    /// Nothing is made durable: after a crash of the machine there is no dump either.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = self.folder.join(format!("{name}.new"));
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&new)?.write_all(bytes)?;
        std::fs::rename(&new, self.folder.join(name))
    }
}

impl Orders {
    fn encode(&self) -> Result<Vec<u8>, HideError> {
        let ranges: usize = self.tasks.iter().map(|task| task.ranges.len()).sum();
        let tasks = self.tasks.len();
        let mut words = vec![f::ORDERS_MAGIC, f::ORDERS_VERSION, tasks as u64, ranges as u64, 0];
        for task in &self.tasks {
            if task.pid <= 0 {
                return Err(HideError::Pid(task.pid));
            }
            if let Some(smaps) = task.smaps.as_ref().filter(|smaps| smaps.pid != task.pid) {
                return Err(HideError::Smaps(smaps.pid, task.pid));
            }
            let flags = if task.smaps.is_some() { f::TASK_SMAPS } else { 0 };
            let length = task.smaps.as_ref().map_or(0, |smaps| smaps.length);
            words.extend([u64::from(task.pid.unsigned_abs()), flags, length]);
            words.push(task.ranges.len() as u64);
        }
        for task in &self.tasks {
            let mut last = 0;
            for &HiddenRange { start, end, guards } in &task.ranges {
                let whole = start % f::ALIGN == 0 && end % f::ALIGN == 0;
                if !whole || start < last || start >= end {
                    return Err(HideError::Range(start, end, task.pid));
                }
                last = end;
                words.extend([start | if guards { f::RANGE_GUARDS } else { 0 }, end]);
            }
        }
        words[f::CHECKSUM_WORD] = f::checksum(words.iter().copied());
        Ok(words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }
}
