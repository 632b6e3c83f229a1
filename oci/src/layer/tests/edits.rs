//! Random changes to a tree, the same for the same seed.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::layer::sys;

/// A generator of numbers (xorshift64*).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

pub(super) struct Edits {
    root: PathBuf,
    random: Random,
    log: Vec<String>,
}

impl Edits {
    pub(super) fn new(root: PathBuf, seed: u64) -> Self {
        Self { root, random: Random::new(seed), log: Vec::new() }
    }

    /// What was tried, in order.
    pub(super) fn log(&self) -> &[String] {
        &self.log
    }

    /// Makes `count` changes; some of them fail, as they may.
    pub(super) fn some(&mut self, count: usize) {
        for _ in 0..count {
            let (a, b) = (self.path(), self.path());
            let what = self.random.below(22);
            let outcome = self.edit(what, &a, &b);
            self.log.push(format!("{what} {a:?} {b:?}: {outcome:?}"));
        }
    }

    /// One of few paths, so that changes meet.
    fn path(&mut self) -> PathBuf {
        let mut path = self.root.join(format!("d{}", self.random.below(4)));
        for part in ["sub", "deep", "deeper"] {
            if self.random.below(2) == 0 {
                break;
            }
            path.push(part);
        }
        match self.random.below(6) {
            0 => path,
            f => path.join(format!("f{}", f - 1)),
        }
    }

    fn edit(&mut self, what: usize, a: &PathBuf, b: &PathBuf) -> std::io::Result<()> {
        let n = self.random.below(20_000);
        let there = fs::symlink_metadata(a).map(|m| m.file_type());
        let opened = matches!(what, 0..=4 | 17..=19 | 21);
        if opened && there.is_ok_and(|t| !t.is_file() && !t.is_dir()) {
            // A pipe would block, a device would do something.
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let open = |path| OpenOptions::new().read(true).write(true).open(path);
        match what {
            0 | 1 => fs::write(a, vec![n as u8; n]),
            2 => OpenOptions::new().append(true).open(a)?.write_all(b"more"),
            3 => open(a)?.write_all_at(b"within", (n % 100) as u64),
            4 => open(a)?.set_len((n % 3000) as u64),
            5 => fs::remove_file(a),
            6 => fs::remove_dir_all(a),
            7 | 8 => fs::create_dir_all(a),
            9 | 10 => fs::rename(a, b),
            // As mv does it where the kernel refuses: a directory of the image is copied and removed.
            11 => {
                let status = std::process::Command::new("mv")
                    .args(["-T", "-f"])
                    .args([a, b])
                    .stderr(std::process::Stdio::null())
                    .status()?;
                if status.success() { Ok(()) } else { Err(std::io::ErrorKind::Other.into()) }
            }
            12 | 13 => fs::hard_link(a, b),
            14 => symlink(format!("target{n}"), a).and_then(|()| lchown(a, Some(7), None)),
            15 => fs::set_permissions(a, PermissionsExt::from_mode((n % 0o10000) as u32 | 0o700)),
            16 => chown(a, Some(n as u32), Some(5)),
            17 => {
                let time = UNIX_EPOCH + Duration::from_nanos(n as u64 * 1_000_000_007);
                File::open(a)?.set_modified(time)
            }
            18 => sys::set_xattr(File::open(a)?.as_fd(), b"user.test", &vec![1; n % 300]),
            19 => sys::remove_xattr(File::open(a)?.as_fd(), b"user.test"),
            20 => {
                let kinds = [SFlag::S_IFIFO, SFlag::S_IFCHR, SFlag::S_IFBLK];
                // Numbers that are free for experiments: no driver answers.
                let device = makedev(240, n as u64 % 200);
                Ok(mknod(a, kinds[n % 3], Mode::from_bits_truncate(0o640), device)?)
            }
            _ if n.is_multiple_of(4) => {
                // An access list that new files inherit: version 2, then the entries of rwxr-x--- and uid 9.
                let acl: [&[u8]; 6] = [
                    &[2, 0, 0, 0],
                    &[1, 0, 7, 0, 255, 255, 255, 255],
                    &[2, 0, 5, 0, 9, 0, 0, 0],
                    &[4, 0, 5, 0, 255, 255, 255, 255],
                    &[16, 0, 5, 0, 255, 255, 255, 255],
                    &[32, 0, 0, 0, 255, 255, 255, 255],
                ];
                let name: &[u8] = match n % 8 {
                    0 => b"system.posix_acl_default",
                    _ => b"system.posix_acl_access",
                };
                sys::set_xattr(File::open(a)?.as_fd(), name, &acl.concat())
            }
            // Replaced by another of the same size and time: only inode and ctime tell.
            _ if n % 4 == 1 => {
                let old = fs::metadata(a)?;
                let new = a.with_extension("new");
                fs::write(&new, vec![n as u8; old.len() as usize])?;
                File::open(&new)?.set_modified(old.modified()?)?;
                fs::rename(new, a)
            }
            _ if n % 4 == 2 => UnixListener::bind(a).map(drop),
            // Emptied and made again, under the old name.
            _ => {
                fs::remove_dir_all(a)?;
                fs::create_dir(a)?;
                fs::write(a.join("f0"), "new")
            }
        }
    }
}
