//! Whose `pagemap` or folder of /proc a descriptor is: told by where its link leads.
//!
//! CRIU may see /proc at another place than usual, so only the end of the path counts.

use crate::state::decimal;
use crate::sys;
use std::ffi::{CStr, c_int};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

/// The last `pagemap` that was asked for. A task is asked for many times in a row, and a stat
/// costs less than a link. The kernel numbers the files of /proc anew for each task.
static LAST_BUSY: AtomicBool = AtomicBool::new(false);
static LAST_DEVICE: AtomicU64 = AtomicU64::new(0);
static LAST_INODE: AtomicU64 = AtomicU64::new(0);
static LAST_PID: AtomicI32 = AtomicI32::new(0);

/// The pid whose `pagemap` is open as `fd`.
pub(crate) fn pid_of_pagemap(fd: c_int) -> Option<i32> {
    if LAST_BUSY.swap(true, Ordering::Acquire) {
        // Another thread looks there.
        return pid_of(fd, b"/pagemap");
    }
    let pid = remembered(fd);
    LAST_BUSY.store(false, Ordering::Release);
    pid
}

fn remembered(fd: c_int) -> Option<i32> {
    let stat = sys::stat(fd)?;
    let same = LAST_DEVICE.load(Ordering::Relaxed) == stat.st_dev
        && LAST_INODE.load(Ordering::Relaxed) == stat.st_ino;
    let pid = LAST_PID.load(Ordering::Relaxed);
    if same && pid != 0 {
        return Some(pid);
    }
    let pid = pid_of(fd, b"/pagemap")?;
    LAST_DEVICE.store(stat.st_dev, Ordering::Relaxed);
    LAST_INODE.store(stat.st_ino, Ordering::Relaxed);
    LAST_PID.store(pid, Ordering::Relaxed);
    Some(pid)
}

/// The pid whose folder in a proc file system is open as `dir`.
pub(crate) fn pid_of_dir(dir: c_int) -> Option<i32> {
    if dir < 0 || !sys::is_proc(dir) {
        return None;
    }
    pid_of(dir, b"")
}

fn pid_of(fd: c_int, file: &[u8]) -> Option<i32> {
    let (mut path, mut digits, mut buffer) = ([0_u8; 32], [0; 12], [0; 512]);
    let number = if fd < 0 { return None } else { decimal(fd, &mut digits) };
    path.iter_mut().zip(b"/proc/self/fd/".iter().chain(number)).for_each(|(to, from)| *to = *from);
    let path = CStr::from_bytes_until_nul(&path).ok()?;
    pid_in(sys::read_link(path, &mut buffer)?.strip_suffix(file)?)
}

/// The pid that the path of a folder in /proc ends with; not that of a thread.
fn pid_in(path: &[u8]) -> Option<i32> {
    let mut parts = path.rsplit(|byte| *byte == b'/');
    let digits = parts.next()?;
    if parts.next()? == b"task" || digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_i32, |number, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        number.checked_mul(10)?.checked_add(digit.into())
    })
}

/// Opened with `flags`, a file can be read and nothing else.
pub(crate) fn is_read(flags: c_int) -> bool {
    flags & (libc::O_ACCMODE | libc::O_PATH | libc::O_CREAT | libc::O_DIRECTORY) == libc::O_RDONLY
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn only_the_end_of_a_path_counts() {
        assert_eq!(pid_in(b"/proc/123"), Some(123));
        assert_eq!(pid_in(b"/4"), Some(4));
        assert_eq!(pid_in(b"/run/x/proc/2147483647"), Some(i32::MAX));
        for other in [
            &b"/proc/2147483648"[..],
            b"/proc/1/task/123",
            b"/proc/self",
            b"/proc/12a",
            b"/proc/",
            b"123",
            b"",
        ] {
            assert_eq!(pid_in(other), None, "{}", other.escape_ascii());
        }
    }

    #[test]
    fn a_descriptor_tells_its_pid() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
        for _ in 0..3 {
            assert_eq!(pid_of_pagemap(pagemap.as_raw_fd()), Some(pid));
        }
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let child_pid = i32::try_from(child.id()).unwrap();
        let other = File::open(format!("/proc/{child_pid}/pagemap"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(pid_of_pagemap(other.unwrap().as_raw_fd()), Some(child_pid));
        assert_eq!(pid_of_pagemap(pagemap.as_raw_fd()), Some(pid));
        let folder = File::open(format!("/proc/{pid}")).unwrap();
        assert_eq!(pid_of_dir(folder.as_raw_fd()), Some(pid));
        assert_eq!(pid_of_pagemap(folder.as_raw_fd()), None);
        assert_eq!(pid_of_dir(-1), None);
    }

    #[test]
    fn a_folder_with_a_number_elsewhere_is_no_task() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("123");
        std::fs::create_dir(&place).unwrap();
        assert_eq!(pid_of_dir(File::open(place).unwrap().as_raw_fd()), None);
    }
}
