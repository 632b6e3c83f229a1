//! What an upper directory had at one time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long before a scan a file must have been left alone for its times to prove that it did not change
/// after the scan either. Far longer than the tick of the kernel's clock (10 ms at most), and longer than
/// a single write call takes.
pub const RACY: Duration = Duration::from_secs(2);

/// A time of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds, below 1 000 000 000.
    pub nanoseconds: u32,
}

impl From<SystemTime> for Time {
    /// Times before 1970 count as 1970.
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: since.as_secs().cast_signed(), nanoseconds: since.subsec_nanos() }
    }
}

/// What a path stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory; an opaque one hides what the image has at its path.
    Dir {
        /// Whether it is opaque.
        opaque: bool,
    },
    /// A regular file.
    File,
    /// A symbolic link and where it leads.
    Symlink(PathBuf),
    /// A named pipe.
    Fifo,
    /// A socket's name. Never carried over: who restores the socket makes it.
    Socket,
    /// A character device: major and minor number.
    Char(u32, u32),
    /// A block device: major and minor number.
    Block(u32, u32),
    /// A removed file or directory of the image.
    Whiteout,
}

/// What can be copied of a file besides its contents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with set-uid, set-gid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of its contents.
    pub mtime: Time,
    /// Extended attributes in order of their names, without those that belong to the overlay or to the host.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One path of an upper directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// What is copied with it.
    pub meta: Meta,
    /// Time of its last change of any sort, by the source's clock.
    pub ctime: Time,
    /// Size in bytes; of meaning for regular files only.
    pub size: u64,
    /// Number of its inode; 0 when what the destination has at this path is not known.
    pub ino: u64,
    /// How many names the inode has.
    pub nlink: u64,
}

/// What an upper directory had when it was scanned. The default has nothing, as the upper directory of a
/// fresh snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// By path relative to the upper directory, which itself is the empty path. Parents come before
    /// their children, and everything below a directory right after it.
    pub(super) entries: BTreeMap<PathBuf, Entry>,
    /// Entries changed at or after this time may have changed again after they were looked at.
    pub(super) settled: Time,
}

impl Manifest {
    /// How many paths there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Sum of the sizes of all regular files in bytes, holes included.
    pub fn bytes(&self) -> u64 {
        let files = self.entries.values().filter(|e| e.kind == Kind::File);
        files.fold(0, |sum: u64, e| sum.saturating_add(e.size))
    }

    /// What was found at `path`.
    pub fn get(&self, path: &Path) -> Option<&Entry> {
        self.entries.get(path)
    }

    /// Notes that the destination may have something else at these paths than this manifest says, so that
    /// the next delta brings them whatever they look like then.
    pub fn forget<'a>(&mut self, paths: impl IntoIterator<Item = &'a PathBuf>) {
        for path in paths {
            if let Some(entry) = self.entries.get_mut(path) {
                entry.ino = 0;
            }
        }
    }

    /// Whether `entry` of this manifest has to be taken for changed even when it looks the same later.
    pub(super) fn is_racy(&self, entry: &Entry) -> bool {
        entry.ino == 0 || entry.ctime >= self.settled
    }
}

impl Entry {
    /// Whether two looks saw the same thing unchanged.
    pub(super) fn same(&self, later: &Self) -> bool {
        self.ino == later.ino
            && self.size == later.size
            && self.meta.mtime == later.meta.mtime
            && self.ctime == later.ctime
            && self.kind == later.kind
    }

    /// Whether there is nothing to be made at the destination, only something to be removed.
    pub(super) fn is_absence(&self) -> bool {
        matches!(self.kind, Kind::Whiteout | Kind::Socket)
    }

    pub(super) fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir { .. })
    }

    /// Whether other names of the same inode are names of the same file. Whiteouts share inodes
    /// without meaning anything by it.
    pub(super) fn is_linked(&self) -> bool {
        self.nlink > 1 && !self.is_dir() && !self.is_absence()
    }
}
