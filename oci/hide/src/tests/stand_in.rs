//! What the stand-in does, with the calls that CRIU makes.

use super::stage::{OUTPUT, ROLE};
use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};

/// The kernel's `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    inverted: u64,
    mask: u64,
    any_of: u64,
    returned: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Plays the role that the environment gives, if it gives one.
pub(super) fn play() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let words: Vec<_> = role.split(' ').collect();
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    let found = match words[0] {
        "scan" => scans(words[1], words[2], &[(number(3), number(4), number(5))]),
        "scans" => {
            let numbers: Vec<_> = words[3..].iter().map(|word| word.parse().unwrap()).collect();
            let asked: Vec<_> = numbers.chunks(3).map(|c| (c[0], c[1], c[2])).collect();
            scans(words[1], words[2], &asked)
        }
        "late" => {
            own_scan();
            std::fs::write(words[6], "").unwrap();
            while !std::path::Path::new(words[7]).exists() {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            scans(words[1], words[2], &[(number(3), number(4), number(5))])
        }
        "smaps" => {
            let mut text = String::new();
            File::from(open_in_proc(words[1], c"smaps")).read_to_string(&mut text).unwrap();
            text
        }
        "children" => {
            let child = std::process::Command::new("/usr/bin/env").output().unwrap();
            String::from_utf8(child.stdout).unwrap()
        }
        "errors" => errors(),
        other => panic!("no role {other}"),
    };
    std::fs::write(std::env::var_os(OUTPUT).unwrap(), found).unwrap();
}

/// As CRIU does: by a descriptor of the task's folder that can only be looked through.
fn open_in_proc(pid: &str, name: &std::ffi::CStr) -> OwnedFd {
    let path = CString::new(format!("/proc/{pid}")).unwrap();
    // SAFETY: strings that end; the descriptors are new and belong to nobody else.
    unsafe {
        let dir = libc::openat64(libc::AT_FDCWD, path.as_ptr(), libc::O_PATH);
        assert!(dir >= 0, "{}", io::Error::last_os_error());
        let dir = OwnedFd::from_raw_fd(dir);
        let file =
            libc::openat64(std::os::fd::AsRawFd::as_raw_fd(&dir), name.as_ptr(), libc::O_RDONLY);
        assert!(file >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(file)
    }
}

/// Scans (start, end, length of the vector) as CRIU does, again from where each one stopped.
fn scans(kind: &str, pid: &str, asked: &[(u64, u64, u64)]) -> String {
    let pagemap = open_in_proc(pid, c"pagemap");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&pagemap);
    let mut text = String::new();
    for &(start, end, vec_len) in asked {
        let mut regions = vec![[0_u64; 3]; vec_len as usize];
        let mut at = start;
        while at < end {
            let mut arg = request(kind, at, end);
            (arg.vec, arg.vec_len) = (regions.as_mut_ptr() as u64, vec_len);
            // SAFETY: a structure and a vector as this ioctl wants them.
            let count = unsafe { libc::ioctl(fd, PAGEMAP_SCAN, &raw mut arg) };
            assert!(count >= 0, "{}", io::Error::last_os_error());
            assert!(arg.walk_end > at && arg.walk_end <= end, "{:x}", arg.walk_end);
            for [start, end, categories] in &regions[..count as usize] {
                // Page by page: where a full vector cuts a region does not matter.
                for page in (*start..*end).step_by(4096) {
                    let _ = writeln!(text, "{page:x} {categories:x}");
                }
            }
            at = arg.walk_end;
        }
    }
    text
}

fn request(kind: &str, start: u64, end: u64) -> ScanArg {
    let mut arg = ScanArg { size: 96, start, end, ..ScanArg::default() };
    if kind == "guards" {
        (arg.mask, arg.returned) = (1 << 8, 1 << 8);
    } else {
        (arg.inverted, arg.mask) = (1 << 5 | 1 << 2, 1 << 5 | 1 << 2);
        (arg.any_of, arg.returned) = (1 << 3 | 1 << 4, 1 << 3 | 1 << 4);
    }
    arg
}

/// What CRIU does when it starts: whether the kernel has this ioctl.
fn own_scan() {
    let pagemap = open_in_proc("self", c"pagemap");
    let mut arg = request("pages", 0, 0);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&pagemap);
    // SAFETY: a structure as this ioctl wants it.
    assert_eq!(unsafe { libc::ioctl(fd, PAGEMAP_SCAN, &raw mut arg) }, 0);
}

/// Calls that fail, or that have nothing to do with memory.
fn errors() -> String {
    let mut text = String::new();
    let mut note = |what: &str, done: i32| {
        let error = io::Error::last_os_error().raw_os_error();
        let _ = writeln!(text, "{what} {done} {:?}", error.filter(|_| done < 0));
    };
    let mut arg = request("pages", 0x1000, 0x2000);
    let mut region = [0_u64; 3];
    (arg.vec, arg.vec_len) = (region.as_mut_ptr() as u64, 1);
    let mut pending = 7_i32;
    // SAFETY: every pointer is valid or null, and null is refused by the kernel.
    unsafe {
        note("bad descriptor", libc::ioctl(-1, PAGEMAP_SCAN, &raw mut arg));
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
        note("no pagemap", libc::ioctl(null, PAGEMAP_SCAN, &raw mut arg));
        note("null", libc::ioctl(null, PAGEMAP_SCAN, std::ptr::null_mut::<ScanArg>()));
        let mut pipe = [0; 2];
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        note("another ioctl", libc::ioctl(pipe[0], libc::FIONREAD, &raw mut pending));
        note("no file", libc::openat64(libc::AT_FDCWD, c"/no/such".as_ptr(), libc::O_RDONLY));
        note("no smaps", libc::openat64(libc::AT_FDCWD, c"smaps".as_ptr(), libc::O_RDONLY));
        note("null path", libc::openat(libc::AT_FDCWD, std::ptr::null(), libc::O_RDONLY));
        let temporary = std::env::temp_dir();
        let temporary = CString::new(temporary.to_str().unwrap()).unwrap();
        let flags = libc::O_TMPFILE | libc::O_RDWR;
        let file = libc::openat(libc::AT_FDCWD, temporary.as_ptr(), flags, 0o640);
        let mut stat: libc::stat = std::mem::zeroed();
        assert_eq!(libc::fstat(file, &raw mut stat), 0);
        note("mode", (stat.st_mode & 0o777) as i32);
    }
    let _ = writeln!(text, "pending {pending} region {region:?}");
    text
}
