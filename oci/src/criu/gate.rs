//! Gates: FIFOs that CRIU opens where it expects a file, and at which it waits.
//!
//! Starting runc and CRIU takes 14 to 18 ms. A gate lets them start while the container still runs:
//!
//! - a dump stops at `irmap-cache` in its work directory, which it opens after its start-up and
//!   before it looks at the freezer;
//! - a restore stops at `inventory.img`, the first image it opens; runc has made mounts and cgroups
//!   by then.
//!
//! Nothing of the container has changed while they wait. Dropping a gate without opening it fails
//! what waits there within a millisecond.

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where a dump waits, in its work directory.
pub const DUMP_GATE: &str = "irmap-cache";
/// Where a restore waits, in the images directory.
pub const RESTORE_GATE: &str = "inventory.img";

/// An empty cache: service magic and the magic of an irmap cache, and no records.
const EMPTY_CACHE: [u8; 8] = [0x40, 0x59, 0x10, 0x55, 0x59, 0x40, 0x00, 0x57];

/// A FIFO; removed when dropped.
#[derive(Debug)]
pub struct Gate {
    path: PathBuf,
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = remove(&self.path);
    }
}

/// The end of a gate that somebody waits at.
#[derive(Debug)]
pub struct Waiting {
    fifo: File,
}

impl Gate {
    /// Makes the FIFO; what was there before is removed.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn make(path: &Path) -> io::Result<Self> {
        remove(path)?;
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(Self { path: path.to_owned() })
    }

    /// Whether somebody waits at it. Never blocks.
    ///
    /// # Errors
    /// When the FIFO is gone.
    pub fn try_open(&self) -> io::Result<Option<Waiting>> {
        let open = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&self.path);
        match open {
            Ok(fifo) => Ok(Some(Waiting { fifo })),
            Err(err) if err.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(err) => Err(err),
        }
    }
}

impl Waiting {
    /// Lets a dump go on.
    ///
    /// # Errors
    /// When nobody waits any more.
    pub fn open_dump(self) -> io::Result<()> {
        self.open(&EMPTY_CACHE)
    }

    /// Lets a restore go on with `inventory`, the content of the image it waits for.
    ///
    /// # Errors
    /// When nobody waits any more.
    pub fn open_restore(self, inventory: &[u8]) -> io::Result<()> {
        self.open(inventory)
    }

    fn open(mut self, content: &[u8]) -> io::Result<()> {
        // A pipe holds 64 KiB; an inventory has a few hundred bytes.
        self.fifo.write_all(content)
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::time::{Duration, Instant};

    fn waiting(gate: &Gate) -> Waiting {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(waiting) = gate.try_open().unwrap() {
                return waiting;
            }
            assert!(Instant::now() < end, "nobody has come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn reader(path: PathBuf) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut content = Vec::new();
            File::open(path).unwrap().read_to_end(&mut content).unwrap();
            content
        })
    }

    #[test]
    fn a_gate_is_closed_until_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(RESTORE_GATE);
        let gate = Gate::make(&path).unwrap();
        assert!(gate.try_open().unwrap().is_none());
        let reader = reader(path.clone());
        let waiting = waiting(&gate);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!reader.is_finished());
        waiting.open_restore(b"inventory").unwrap();
        assert_eq!(reader.join().unwrap(), b"inventory");
        drop(gate);
        assert!(!path.exists());
    }

    #[test]
    fn dropping_a_gate_sends_away_who_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(DUMP_GATE);
        let gate = Gate::make(&path).unwrap();
        let reader = reader(path);
        drop(waiting(&gate));
        assert_eq!(reader.join().unwrap(), b"");
    }

    #[test]
    fn an_empty_cache_has_the_magic_numbers_of_one() {
        assert_eq!(u32::from_le_bytes(EMPTY_CACHE[..4].try_into().unwrap()), 0x5510_5940);
        assert_eq!(u32::from_le_bytes(EMPTY_CACHE[4..].try_into().unwrap()), 0x5700_4059);
    }
}
