//! Programs and libraries that are needed in the pause, brought into memory before it.
//!
//! CRIU reads the head of every program and library of a container at both ends, the restored tasks run
//! them, and most of CRIU's own code runs for the first time in the pause. What of it is not in memory
//! is read from a disk, page by page, while the clients wait: on a host that is short of memory, or to
//! which the container comes for the first time.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use crate::pages::areas::{Area, parse_maps, read_maps};

/// Most that is read ahead of one file, and of all, bytes.
const FILE: u64 = 64 << 20;
const ALL: u64 = 512 << 20;

/// Reads ahead the files that hold code of the processes. Returns at once: the kernel goes on reading.
/// Their paths, as the processes see them.
pub fn processes(pids: impl IntoIterator<Item = i32>) -> Vec<String> {
    let (mut seen, mut paths, mut room) = (BTreeSet::new(), Vec::new(), ALL);
    for pid in pids {
        // One that has ended needs nothing.
        for area in code(pid).unwrap_or_default() {
            if !seen.insert((area.dev, area.inode)) {
                continue;
            }
            // Whatever its path leads to by now.
            let link = format!("/proc/{pid}/map_files/{:x}-{:x}", area.start, area.end);
            if let Ok(file) = File::open(link) {
                ahead(&file, &mut room);
            }
            paths.extend(String::from_utf8(area.name).ok());
        }
    }
    paths
}

fn code(pid: i32) -> io::Result<Vec<Area>> {
    let mut text = Vec::new();
    read_maps(pid, &mut text)?;
    let areas = parse_maps(&text).map_err(io::Error::other)?;
    let is_code = |area: &Area| area.perms[2] == b'x' && area.inode != 0;
    Ok(areas.into_iter().filter(|area| is_code(area) && area.name.starts_with(b"/")).collect())
}

/// Reads ahead files of a container whose root file system is `root`. Paths that lead nowhere are passed
/// over, and none leads out of it.
pub fn files(root: &Path, paths: &[String]) {
    let Ok(root) =
        openat2(CWD, root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty())
    else {
        return;
    };
    let mut room = ALL;
    for path in paths {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found = openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve);
        let Ok(found) = found else { continue };
        let link = format!("/proc/self/fd/{}", found.as_raw_fd());
        // To open a device may do something.
        if fs::metadata(&link).is_ok_and(|meta| meta.is_file())
            && let Ok(file) = File::open(link)
        {
            ahead(&file, &mut room);
        }
    }
}

fn ahead(file: &File, room: &mut u64) {
    let length = file.metadata().map_or(0, |meta| meta.len()).min(FILE).min(*room);
    *room -= length;
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    let asked = posix_fadvise(file.as_fd(), 0, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    if let Err(error) = asked {
        log::debug!("read ahead: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    /// How much of a file is in memory, bytes.
    fn cached(path: &Path) -> u64 {
        let output = Command::new("fincore").args(["-bno", "RES"]).arg(path).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }

    fn cold(path: &Path) {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        assert!(cached(path) < 64 << 10, "{} stays in memory", path.display());
    }

    /// All but some pages that the kernel was busy with: it only takes advice.
    fn becomes_warm(path: &Path) {
        let (size, start) = (fs::metadata(path).unwrap().len(), Instant::now());
        while cached(path) < size / 10 * 9 {
            assert!(start.elapsed() < Duration::from_secs(10), "{} of {size}", cached(path));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A program of its own, in a folder that is on a disk.
    fn program() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let program = dir.path().join("program");
        fs::copy("/usr/bin/sleep", &program).unwrap();
        let file = File::options().append(true).open(&program).unwrap();
        file.set_len(3 << 20).unwrap();
        (dir, program)
    }

    #[test]
    fn code_of_a_process_is_read_ahead_and_its_paths_are_told() {
        let (_dir, path) = program();
        let start = Instant::now();
        let mut child = loop {
            match Command::new(&path).arg("100").stdin(Stdio::null()).spawn() {
                // Another test has just forked, with our file open for writing.
                Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => {
                    assert!(start.elapsed() < Duration::from_secs(10), "{error}");
                }
                child => break child.unwrap(),
            }
        };
        let is_libc = |area: &Area| area.name.windows(5).any(|name| name == b"libc.");
        while !code(child.id().cast_signed()).is_ok_and(|areas| areas.iter().any(is_libc)) {
            assert!(start.elapsed() < Duration::from_secs(10), "it does not start");
        }
        // What it has mapped stays; the rest does not, once it has come to rest.
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        while cached(&path) >= 2 << 20 {
            assert!(start.elapsed() < Duration::from_secs(10), "all of it stays in memory");
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        }
        let paths = processes([child.id().cast_signed(), i32::MAX]);
        assert!(paths.contains(&path.display().to_string()), "{paths:?}");
        assert!(paths.iter().any(|path| path.contains("libc.")), "{paths:?}");
        becomes_warm(&path);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn files_are_looked_for_in_their_root_alone() {
        let (dir, program) = program();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        symlink("/usr/bin", root.join("bin")).unwrap();
        symlink(&program, root.join("out")).unwrap();
        fs::copy(&program, root.join("usr/bin/tool")).unwrap();
        let tool = root.join("usr/bin/tool");
        cold(&tool);
        cold(&program);
        let paths = ["/bin/tool", "/out", "/../program", "/usr", "/no/such", "/proc/self/exe"];
        files(&root, &paths.map(str::to_owned));
        becomes_warm(&tool);
        assert!(cached(&program) < 64 << 10, "it is outside");
        files(Path::new("/no/such"), &["/x".to_owned()]);
    }
}
