//! Memory that a move takes on a host: the kernel's own high-water mark of the host's cgroup, so
//! that nothing has to be sampled and nothing is missed.
//!
//! It holds all that the host's processes take: ferry or by-hand tools, the container itself, images
//! in tmpfs, and cached files. What was in use before the move is subtracted. On the destination it
//! is therefore the container with all that was needed to bring it there; on the source what is
//! needed beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

use ferry_tests::Host;

/// The high-water mark of one host, from now on.
pub(crate) struct Peak {
    mark: File,
    /// Bytes in use at the beginning.
    before: u64,
}

impl Peak {
    /// Sets the mark to what is in use now; none where the kernel keeps no mark.
    pub(crate) fn begin(host: &Host) -> Option<Self> {
        let groups = host.root().join("sys/fs/cgroup");
        // Version 1 is reset for everybody, version 2 for this descriptor (from kernel 6.12 on).
        Self::of(&groups.join("memory"), "memory.max_usage_in_bytes", "memory.usage_in_bytes")
            .or_else(|| Self::of(&groups, "memory.peak", "memory.current"))
    }

    fn of(group: &Path, mark: &str, usage: &str) -> Option<Self> {
        let mut mark = OpenOptions::new().read(true).write(true).open(group.join(mark)).ok()?;
        mark.write_all(b"0").ok()?;
        let before = fs::read_to_string(group.join(usage)).ok()?.trim().parse().ok()?;
        Some(Self { mark, before })
    }

    /// Bytes that were in use at most, beyond those of the beginning.
    pub(crate) fn end(mut self) -> Option<u64> {
        let mut text = String::new();
        self.mark.rewind().ok()?;
        self.mark.read_to_string(&mut text).ok()?;
        text.trim().parse::<u64>().ok().map(|most| most.saturating_sub(self.before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_use_before_does_not_count() {
        let folder = std::env::temp_dir().join(format!("ferry-peak-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("usage"), "1000\n").unwrap();
        fs::write(folder.join("mark"), "9\n").unwrap();
        let peak = Peak::of(&folder, "mark", "usage").unwrap();
        // The reset.
        assert_eq!(fs::read_to_string(folder.join("mark")).unwrap(), "0\n");
        fs::write(folder.join("mark"), "1500\n").unwrap();
        assert_eq!(peak.end(), Some(500));
        assert!(Peak::of(&folder, "none", "usage").is_none());
        fs::remove_dir_all(&folder).unwrap();
    }
}
