//! The part of a task's smaps that CRIU reads.

/// A copy of a task's smaps that [`Hiding::store_smaps`](super::Hiding::store_smaps) keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSmaps {
    pub(super) pid: i32,
    pub(super) length: u64,
    maps: Vec<u8>,
}

impl StoredSmaps {
    pub(super) fn new(pid: i32, short: &[u8]) -> Self {
        Self { pid, length: short.len() as u64, maps: select(short, is_mapping) }
    }

    /// Whether the task still has the mappings of the copy: `maps` is its /proc/PID/maps, read in
    /// the freeze.
    ///
    /// Flags can change without it. Of those that CRIU looks at, mlock shows in `VmLck` of
    /// /proc/PID/status, to be compared too; advice of madvise does not show, and one that was
    /// given since the copy is lost in the restored task.
    pub fn fits(&self, maps: &[u8]) -> bool {
        self.maps == maps
    }
}

/// Leaves the lines that CRIU looks at: the mappings themselves and their flags. It skips all
/// others, and there are twenty for each mapping.
pub(super) fn shorten(text: &[u8]) -> Vec<u8> {
    select(text, |line| line.starts_with(b"VmFlags: ") || is_mapping(line))
}

fn select(text: &[u8], keep: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    lines.filter(|line| keep(line)).flatten().copied().collect()
}

/// `START-END ...`: what CRIU takes for the first line of a mapping.
fn is_mapping(line: &[u8]) -> bool {
    let is_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let range = line.split(|byte| *byte == b' ').next().unwrap_or_default();
    let dash = range.iter().position(|byte| *byte == b'-');
    dash.is_some_and(|dash| {
        range.len() < line.len()
            && range[..dash].iter().all(is_hex)
            && range[dash + 1..].iter().all(is_hex)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_and_their_flags_stay() {
        let text = std::fs::read("/proc/self/smaps").unwrap();
        let short = String::from_utf8(shorten(&text)).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert_eq!(short.lines().count() % 2, 0);
        assert!(short.lines().count() >= 10);
        for pair in short.lines().collect::<Vec<_>>().chunks(2) {
            assert!(pair[1].starts_with("VmFlags: "), "{pair:?}");
            // Mappings of other threads come and go, those of the program do not.
            if pair[0].contains("ferry_oci") {
                assert!(maps.contains(pair[0]), "{pair:?}");
            }
        }
        assert!(short.len() * 4 < text.len());
    }

    #[test]
    fn a_copy_fits_only_the_mappings_it_was_made_of() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let read = |name: &str| std::fs::read(format!("/proc/{}/{name}", child.id())).unwrap();
        // Until it has replaced this program and loaded its libraries.
        while read("stat").split(|byte| *byte == b' ').nth(2) != Some(b"S") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let (smaps, maps) = (read("smaps"), read("maps"));
        child.kill().unwrap();
        child.wait().unwrap();
        let stored = StoredSmaps::new(1, &shorten(&smaps));
        assert!(maps.len() > 500 && stored.fits(&maps), "{}", String::from_utf8_lossy(&maps));
        assert!(!stored.fits(&maps[1..]) && !stored.fits(&[&maps[..], &maps[..]].concat()));
        let mut other = maps.clone();
        other[30] ^= 1;
        assert!(!stored.fits(&other));
    }

    #[test]
    fn what_looks_alike_is_dropped() {
        let text = b"00400000-00401000 r-xp 0 08:01 5 /a b\\012c\nSize: 4 kB\nabc-d\nVmFlags:x\n\
            feed-beef ---p\nFEED-BEEF r\nVmFlags: rd ex\n";
        let short =
            b"00400000-00401000 r-xp 0 08:01 5 /a b\\012c\nfeed-beef ---p\nVmFlags: rd ex\n";
        assert_eq!(shorten(text), short);
    }
}
