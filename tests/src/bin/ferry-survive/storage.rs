//! What lies on file systems that are only memory.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::sys;
use crate::turn::{Done, In, Turn, Wrong, holds, same};

pub(crate) fn shm(turn: &mut Turn) -> Done {
    stays(turn, Path::new("/dev/shm"))
}

pub(crate) fn tmpfs(turn: &mut Turn) -> Done {
    stays(turn, Path::new("/scratch"))
}

fn stays(turn: &mut Turn, parent: &Path) -> Done {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = |text: &str| -> Option<String> {
        let line =
            text.lines().find(|line| line.split(' ').nth(4).map(Path::new) == Some(parent))?;
        // Without the numbers, which are the kernel's.
        Some(line.split(' ').skip(4).collect::<Vec<_>>().join(" "))
    };
    holds("it is a mount", mount(&mounts).is_some())?;
    let folder = parent.join(format!("kept-{}", std::process::id()));
    fill(&folder)?;
    let was = list(&folder)?;
    if turn.pass()? {
        fs::set_permissions(folder.join("file"), Permissions::from_mode(0o641))?;
    }
    let mounts_now = fs::read_to_string("/proc/self/mountinfo")?;
    same("the mount", mount(&mounts_now), mount(&mounts))?;
    let now = list(&folder)?;
    same("the names", now.keys().collect::<Vec<_>>(), was.keys().collect())?;
    for (path, was) in was {
        same(&format!("{}", path.display()), now.get(&path), Some(&was))?;
    }
    fs::remove_dir_all(folder).map_err(Wrong::from)
}

fn fill(folder: &Path) -> Done {
    let inner = folder.join("a folder/inner");
    fs::create_dir_all(&inner).at("make folders")?;
    let content: Vec<u8> = (0..3 << 20).map(|n| sys::byte(12, n)).collect();
    fs::write(folder.join("file"), content)?;
    fs::write(inner.join("empty"), "")?;
    fs::hard_link(folder.join("file"), inner.join("linked"))?;
    symlink("../file", folder.join("a folder/symbolic"))?;
    let mut sparse = File::create(folder.join("sparse"))?;
    sparse.seek(SeekFrom::Start(5 << 20))?;
    sparse.write_all(b"end")?;
    chown(folder.join("file"), Some(1000), Some(1001)).at("give it away")?;
    fs::set_permissions(folder.join("file"), Permissions::from_mode(0o640))?;
    fs::set_permissions(&inner, Permissions::from_mode(0o1750))?;
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_234_567_890);
    File::open(folder.join("file"))?.set_modified(then)?;
    File::open(&inner)?.set_modified(then)?;
    Ok(())
}

/// What there is to know of one.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    kind_and_mode: u32,
    owner: (u32, u32),
    names: u64,
    /// In seconds: tar, by which CRIU keeps it, knows no parts of them.
    modified: i64,
    length: u64,
    sum: u64,
}

fn list(folder: &Path) -> Result<BTreeMap<PathBuf, Entry>, Wrong> {
    let (mut found, mut left) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(path) = left.pop() {
        let meta = path.symlink_metadata()?;
        let content = if meta.is_symlink() {
            fs::read_link(&path)?.into_os_string().into_encoded_bytes()
        } else if meta.is_dir() {
            Vec::new()
        } else {
            fs::read(&path)?
        };
        let sum = content
            .iter()
            .fold(5_381_u64, |sum, byte| sum.wrapping_mul(33).wrapping_add(u64::from(*byte)));
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
        let entry = Entry {
            kind_and_mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            names: meta.nlink(),
            modified: meta.mtime(),
            // Of a folder it is the file system's affair.
            length: if meta.is_dir() { 0 } else { meta.len() },
            sum,
        };
        found.insert(path, entry);
    }
    Ok(found)
}
