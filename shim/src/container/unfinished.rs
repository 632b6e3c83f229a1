//! Images of a dump that fails: what they have of it goes, and what was in their folder stays.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use log::warn;

/// The image that makes a dump a complete one: CRIU writes it last.
const LAST: &str = "inventory.img";

/// A folder of images before the dump.
pub(super) struct Unfinished {
    folder: PathBuf,
    /// What was in it; nothing if there was no folder.
    before: Option<HashSet<OsString>>,
}

impl Unfinished {
    /// Remembers what is in `folder`.
    pub(super) fn of(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), before: names(folder).ok() }
    }

    /// Removes what the dump has brought, but for logs.
    pub(super) fn remove(self) {
        let before = self.before.as_ref();
        for name in names(&self.folder).unwrap_or_default() {
            let was_there = before.is_some_and(|before| before.contains(&name));
            let is_log = Path::new(&name).extension().is_some_and(|end| end == "log");
            if !was_there && !is_log {
                let path = self.folder.join(&name);
                if let Err(err) = std::fs::remove_file(&path) {
                    warn!("remove {}: {err}", path.display());
                }
            }
        }
        if before.is_none() {
            // Not with a log in it.
            let _ = std::fs::remove_dir(&self.folder);
        }
    }
}

/// Where there is a dump already it is no longer complete once another has begun to replace it.
pub(super) fn begin_anew(folder: &Path) -> io::Result<()> {
    match std::fs::remove_file(folder.join(LAST)) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

fn names(folder: &Path) -> io::Result<HashSet<OsString>> {
    std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, names: &[&str]) {
        for name in names {
            std::fs::write(folder.join(name), "").unwrap();
        }
    }

    #[test]
    fn what_was_there_stays_and_is_no_complete_dump_any_more() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &["mine", "core-1.img", LAST]);
        let unfinished = Unfinished::of(dir.path());
        begin_anew(dir.path()).unwrap();
        begin_anew(dir.path()).unwrap();
        write(dir.path(), &["core-1.img", "core-2.img", "descriptors.json", "dump.log"]);
        unfinished.remove();
        let left = ["mine", "core-1.img", "dump.log"].map(OsString::from);
        assert_eq!(names(dir.path()).unwrap(), HashSet::from(left));
    }

    #[test]
    fn a_folder_that_was_made_goes_unless_it_has_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("new");
        for log in [false, true] {
            let unfinished = Unfinished::of(&folder);
            std::fs::create_dir(&folder).unwrap();
            write(&folder, &["core-1.img"]);
            write(&folder, if log { &["dump.log"] } else { &[] });
            unfinished.remove();
            assert_eq!(folder.exists(), log);
        }
    }
}
