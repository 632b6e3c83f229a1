//! What has to be done to a copy of one manifest to make it a copy of the next.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::manifest::{Entry, Kind, Manifest, Time};

/// One step at the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Remove what is there, a directory with everything in it.
    Remove(PathBuf),
    /// Make what is there be `entry`. A directory that is there stays with what is in it, unless `clear`;
    /// anything else is replaced.
    Create {
        /// Where.
        path: PathBuf,
        /// What.
        entry: Entry,
        /// Whether a directory is to be emptied first.
        clear: bool,
        /// Other names that the same file has.
        links: Vec<PathBuf>,
    },
    /// Make it another name of the file that an earlier step has made.
    Link {
        /// The new name.
        path: PathBuf,
        /// The name that the file has.
        to: PathBuf,
    },
    /// Set the time of a directory, which work in it has changed.
    Times {
        /// The directory.
        path: PathBuf,
        /// Its time of last change.
        mtime: Time,
    },
}

/// The steps that turn a destination which has `old` into one which has `new`, in the order in which they
/// must be done.
pub fn delta(old: &Manifest, new: &Manifest) -> Vec<Change> {
    let (mut marked, cleared) = mark(old, new);
    let groups = groups(new);
    // A file that is made anew is another file: all its names have to lead to it.
    for group in groups.values() {
        if group.iter().any(|path| marked.contains(path)) {
            marked.extend(group);
        }
    }

    let mut changes = Vec::new();
    let mut touched: BTreeSet<&Path> = BTreeSet::new();
    let removed = removed(old, new);
    for path in removed {
        touched.extend(path.parent());
        changes.push(Change::Remove(path.to_owned()));
    }
    for (path, entry) in &new.entries {
        if !marked.contains(path.as_path()) {
            continue;
        }
        touched.extend(path.parent());
        if entry.is_absence() {
            changes.push(Change::Remove(path.clone()));
            continue;
        }
        if entry.is_dir() {
            touched.insert(path);
        }
        let group = groups.get(&inode(entry)).filter(|_| entry.is_linked());
        match group.and_then(|g| g.first()) {
            Some(first) if *first != path => {
                changes.push(Change::Link { path: path.clone(), to: (*first).to_owned() });
            }
            _ => changes.push(Change::Create {
                path: path.clone(),
                entry: entry.clone(),
                clear: cleared.contains(path.as_path()),
                links: group.into_iter().flatten().skip(1).map(|p| (*p).to_owned()).collect(),
            }),
        }
    }
    // Deepest first; all work in a directory is done by now.
    for path in touched.into_iter().rev() {
        if let Some(entry) = new.get(path).filter(|e| e.is_dir()) {
            changes.push(Change::Times { path: path.to_owned(), mtime: entry.meta.mtime });
        }
    }
    changes
}

/// The paths at which something has to be done, and those of them where a directory has to be emptied.
fn mark<'a>(old: &Manifest, new: &'a Manifest) -> (HashSet<&'a Path>, HashSet<&'a Path>) {
    let mut marked = HashSet::new();
    let mut cleared = HashSet::new();
    // The emptied directory whose contents are being looked at.
    let mut within: Option<&Path> = None;
    for (path, entry) in &new.entries {
        if within.is_some_and(|dir| !path.starts_with(dir)) {
            within = None;
        }
        let before = if within.is_some() { None } else { old.get(path) };
        // Only contents can have changed unseen: everything else is compared.
        let contents = matches!(entry.kind, Kind::File) && entry.size > 0;
        let racy = before
            .is_some_and(|b| old.is_racy(b) && (contents || b.ino == 0 || b.meta != entry.meta));
        let changed = match (&entry.kind, before) {
            (Kind::Whiteout | Kind::Socket, None) => within.is_none(),
            (Kind::Whiteout | Kind::Socket, Some(b)) => !b.is_absence(),
            (_, None) => true,
            (_, Some(b)) => racy || !b.same(entry),
        };
        if !changed {
            continue;
        }
        marked.insert(path.as_path());
        if let Kind::Dir { opaque } = entry.kind {
            // The same directory stays, with what is in it; so does that of the image when it is first
            // touched. Another one in its place begins empty.
            let clear = match before.map(|b| (&b.kind, b.ino)) {
                None => opaque,
                Some((Kind::Dir { opaque: was }, ino)) => ino != entry.ino || (opaque && !was),
                Some(_) => true,
            };
            if clear {
                cleared.insert(path.as_path());
                within = within.or(Some(path));
            }
        }
    }
    (marked, cleared)
}

/// The paths that `old` has and `new` has not, without those below another of them.
fn removed<'a>(old: &'a Manifest, new: &Manifest) -> Vec<&'a Path> {
    let mut removed: Vec<&Path> = Vec::new();
    for (path, entry) in &old.entries {
        let below = removed.last().is_some_and(|last| path.starts_with(last));
        if !below && !entry.is_absence() && new.get(path).is_none() {
            removed.push(path);
        }
    }
    removed
}

/// The names of every file that has several, in order.
fn groups(manifest: &Manifest) -> HashMap<(u64, Time), Vec<&Path>> {
    let mut groups: HashMap<_, Vec<&Path>> = HashMap::new();
    for (path, entry) in manifest.entries.iter().filter(|(_, e)| e.is_linked()) {
        groups.entry(inode(entry)).or_default().push(path);
    }
    groups
}

/// Tells files apart. By the ctime, too: while a scan goes on, another file can get the number of one that
/// was seen and removed.
fn inode(entry: &Entry) -> (u64, Time) {
    (entry.ino, entry.ctime)
}
