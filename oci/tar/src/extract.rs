//! Making the tree that an archive of ours describes.
//!
//! All of the archive is checked before anything is made. An image may come from elsewhere: every
//! entry is made by its last name in a folder that was opened before it, never through a link, so
//! nothing outside of the target is reached.

use crate::Stop;
use crate::gzip;
use crate::ustar::{BLOCK, END, Entry, Kind};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, RawMode, SeekFrom, Timespec, Timestamps, UTIME_OMIT,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Larger images are not of our making. Bytes.
const LARGE: u64 = 64 << 20;

/// Makes the tree in `folder` from the archive at the input.
///
/// # Errors
/// As [`unpack`].
pub fn run(folder: &OsStr) -> Result<(), Stop> {
    rustix::process::umask(Mode::empty());
    unpack(&input().ok_or(Stop::Real)?, folder)
}

/// Makes the tree of the archive `packed` in `folder`. The calling thread's umask must be empty.
///
/// # Errors
/// [`Stop::Real`] when the archive is none of ours, or the folder is not empty; when something cannot be
/// made.
pub fn unpack(packed: &[u8], folder: &OsStr) -> Result<(), Stop> {
    let data = gzip::unpack(packed).ok_or(Stop::Real)?;
    let items = parse(&data).ok_or(Stop::Real)?;
    // The real tar replaces what it finds. That is rare, CRIU's file systems are new.
    if !is_empty(folder).map_err(|_| Stop::Real)? {
        return Err(Stop::Real);
    }
    let root = rustix::fs::open(folder, FOLDER, Mode::empty()).map_err(|_| Stop::Real)?;
    make(root, &items).map_err(|err| Stop::Failed("extract the archive", err.into()))
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The whole input, from where it stands, which does not move: the real tar may read it again.
fn input() -> Option<Vec<u8>> {
    let stdin = std::io::stdin();
    let input = stdin.as_fd();
    let stat = rustix::fs::fstat(input).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    let mut at = rustix::fs::seek(input, SeekFrom::Current(0)).ok()?;
    let size = u64::try_from(stat.st_size).ok()?.checked_sub(at).filter(|size| *size <= LARGE)?;
    let mut bytes = vec![0; usize::try_from(size).ok()?];
    let mut rest = &mut bytes[..];
    while !rest.is_empty() {
        match rustix::io::pread(input, &mut *rest, at) {
            Ok(0) => return None,
            Ok(count) => {
                at += count as u64;
                rest = &mut rest[count..];
            }
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    Some(bytes)
}

fn is_empty(folder: &OsStr) -> rustix::io::Result<bool> {
    let folder = rustix::fs::open(folder, FOLDER, Mode::empty())?;
    let mut entries = Dir::read_from(&folder)?;
    while let Some(entry) = entries.read() {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// An entry with its content.
struct Item<'a> {
    entry: Entry<'a>,
    /// The folders above it.
    depth: usize,
    /// Its last name; empty for the root.
    name: &'a [u8],
    content: &'a [u8],
}

/// The entries, if each one is in a folder that is open when its turn comes: one that came before
/// it and was not left since.
fn parse(data: &[u8]) -> Option<Vec<Item<'_>>> {
    let (blocks, []) = data.as_chunks::<BLOCK>() else { return None };
    let mut items = Vec::new();
    let mut open: Vec<&[u8]> = Vec::new();
    let mut at = 0;
    loop {
        let block = blocks.get(at)?;
        if block.iter().all(|byte| *byte == 0) {
            break;
        }
        let entry = Entry::decode(block)?;
        at += 1;
        let size = usize::try_from(entry.size).ok()?;
        if entry.kind != Kind::File && size != 0 {
            return None;
        }
        let start = at.checked_mul(BLOCK)?;
        let content = data.get(start..start.checked_add(size)?)?;
        at = at.checked_add(size.div_ceil(BLOCK))?;
        let (folder, name) = split(&entry)?;
        match folder {
            None if !items.is_empty() => return None,
            None => {}
            Some(folder) => open.truncate(open.iter().position(|path| *path == folder)? + 1),
        }
        items.push(Item { depth: open.len(), name, content, entry });
        let last = items.last()?;
        if last.entry.kind == Kind::Folder {
            open.push(last.entry.name);
        }
    }
    let is_end = blocks.len() == at + END / BLOCK && blocks[at..].iter().flatten().all(|b| *b == 0);
    (is_end && !items.is_empty()).then_some(items)
}

/// The path of an entry's folder, and its own name in it.
fn split<'a>(entry: &Entry<'a>) -> Option<(Option<&'a [u8]>, &'a [u8])> {
    let is_folder = entry.kind == Kind::Folder;
    if entry.name == b"./" {
        return is_folder.then_some((None, b""));
    }
    let path = match entry.name.strip_suffix(b"/") {
        Some(path) if is_folder => path,
        None if !is_folder => entry.name,
        _ => return None,
    };
    let slash = path.iter().rposition(|byte| *byte == b'/')?;
    let (folder, name) = path.split_at(slash + 1);
    (!matches!(name, b"" | b"." | b"..")).then_some((Some(folder), name))
}

fn make(root: OwnedFd, items: &[Item<'_>]) -> rustix::io::Result<()> {
    let mut open: Vec<(OwnedFd, &Entry<'_>)> = Vec::new();
    let mut root = Some(root);
    for item in items {
        while open.len() > item.depth {
            finish(open.pop())?;
        }
        let entry = &item.entry;
        let Some((folder, _)) = open.last() else {
            open.extend(root.take().map(|root| (root, entry)));
            continue;
        };
        let folder = folder.as_fd();
        if entry.kind == Kind::Folder {
            rustix::fs::mkdirat(folder, item.name, Mode::RWXU)?;
            let flags = FOLDER | OFlags::NOFOLLOW;
            open.push((rustix::fs::openat(folder, item.name, flags, Mode::empty())?, entry));
        } else {
            make_one(folder, item)?;
        }
    }
    while !open.is_empty() {
        finish(open.pop())?;
    }
    Ok(())
}

/// Gives a folder its owner, permissions and time, once all is in it.
fn finish(folder: Option<(OwnedFd, &Entry<'_>)>) -> rustix::io::Result<()> {
    let Some((folder, entry)) = folder else { return Ok(()) };
    let (user, group) = entry.owner();
    rustix::fs::fchown(&folder, user, group)?;
    rustix::fs::fchmod(&folder, permissions(entry.mode))?;
    rustix::fs::futimens(&folder, &times(entry))
}

fn make_one(folder: BorrowedFd<'_>, item: &Item<'_>) -> rustix::io::Result<()> {
    let (entry, name) = (&item.entry, item.name);
    let (user, group) = entry.owner();
    if entry.kind == Kind::File {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut rest = item.content;
        while !rest.is_empty() {
            match rustix::io::write(&file, rest) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::INTR) => {}
                Err(err) => return Err(err),
            }
        }
        rustix::fs::fchown(&file, user, group)?;
        rustix::fs::fchmod(&file, permissions(entry.mode))?;
        return rustix::fs::futimens(&file, &times(entry));
    }
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    if entry.kind == Kind::Link {
        rustix::fs::symlinkat(entry.link, folder, name)?;
    } else {
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(folder, name, entry.kind.file_type(), mode, entry.dev())?;
    }
    rustix::fs::chownat(folder, name, user, group, nofollow)?;
    if entry.kind != Kind::Link {
        // It was made just now and is no link.
        rustix::fs::chmodat(folder, name, permissions(entry.mode), AtFlags::empty())?;
    }
    rustix::fs::utimensat(folder, name, &times(entry), nofollow)
}

fn permissions(mode: RawMode) -> Mode {
    Mode::from_raw_mode(mode)
}

fn times(entry: &Entry<'_>) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: entry.time.cast_signed(), tv_nsec: 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(Kind, &str, &str)]) -> Vec<u8> {
        let mut data = Vec::new();
        for &(kind, name, content) in entries {
            let (name, link) = (name.as_bytes(), b"".as_slice());
            let size = content.len() as u64;
            let entry =
                Entry { kind, name, mode: 0, uid: 0, gid: 0, size, time: 0, link, device: (0, 0) };
            data.extend(entry.encode().unwrap());
            data.extend(content.as_bytes());
            data.resize(data.len().next_multiple_of(BLOCK), 0);
        }
        data.resize(data.len() + END, 0);
        data
    }

    #[test]
    fn entries_are_in_the_folders_before_them() {
        use Kind::{File, Folder};
        let data = archive(&[
            (Folder, "./", ""),
            (Folder, "./a/", ""),
            (Folder, "./a/b/", ""),
            (File, "./a/b/x", "text"),
            (File, "./a/y", ""),
            (File, "./z", ""),
        ]);
        let items = parse(&data).unwrap();
        let depths: Vec<_> = items.iter().map(|item| item.depth).collect();
        assert_eq!(depths, [0, 1, 2, 3, 2, 1]);
        assert_eq!((items[3].name, items[3].content), (&b"x"[..], &b"text"[..]));
        for length in (0..data.len()).step_by(BLOCK) {
            assert!(parse(&data[..length]).is_none(), "{length} bytes");
        }
    }

    #[test]
    fn nothing_outside_of_the_target_is_named() {
        use Kind::{File, Folder, Link};
        for entries in [
            &[(Folder, "./", ""), (File, "/etc/x", "")][..],
            &[(Folder, "./", ""), (File, "x", "")],
            &[(Folder, "./", ""), (File, "./..", "")],
            &[(Folder, "./", ""), (Folder, "./../", "")],
            &[(Folder, "./", ""), (File, "./../x", "")],
            &[(Folder, "./", ""), (Folder, "./a/", ""), (File, "./a/../x", "")],
            &[(Folder, "./", ""), (File, ".//x", "")],
            &[(Folder, "./", ""), (File, "./", "")],
            // Through a link, and into a folder that was left.
            &[(Folder, "./", ""), (Link, "./a", ""), (File, "./a/x", "")],
            &[(Folder, "./", ""), (Folder, "./a/", ""), (File, "./b", ""), (File, "./a/x", "")],
            &[(File, "./x", "")],
            &[(Folder, "./", ""), (Folder, "./", "")],
            &[(Folder, "./", "content")],
            &[],
        ] {
            assert!(parse(&archive(entries)).is_none(), "{entries:?}");
        }
    }

    #[test]
    fn a_link_made_twice_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        std::fs::create_dir(place("target")).unwrap();
        std::fs::create_dir(place("outside")).unwrap();
        std::os::unix::fs::symlink(place("outside"), place("target/a")).unwrap();
        let data = archive(&[(Kind::Folder, "./", ""), (Kind::Folder, "./a/", "")]);
        let root = rustix::fs::open(place("target"), FOLDER, Mode::empty()).unwrap();
        assert!(make(root, &parse(&data).unwrap()).is_err());
    }
}
