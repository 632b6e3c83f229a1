//! Headers of the archive: the old, simple form that every tar reads.

use rustix::fs::{Dev, FileType, Gid, RawMode, Stat, Uid};

/// Everything comes in blocks of this, bytes.
pub(crate) const BLOCK: usize = 512;
/// Two empty blocks end an archive.
pub(crate) const END: usize = 2 * BLOCK;
/// Longest name, bytes; one more would need an extension.
const NAME: usize = 100;
const LINK: std::ops::Range<usize> = 157..257;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const MAGIC: &[u8] = b"ustar\x0000";

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Link,
    Char,
    Block,
    Folder,
    Fifo,
}

/// An entry of an archive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) kind: Kind,
    /// `./` and below, folders with a slash at the end.
    pub(crate) name: &'a [u8],
    /// Permissions, without the type.
    pub(crate) mode: RawMode,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Bytes of content.
    pub(crate) size: u64,
    /// Last change, seconds.
    pub(crate) time: u64,
    /// Where a link leads.
    pub(crate) link: &'a [u8],
    pub(crate) device: (u32, u32),
}

const KINDS: [(Kind, FileType, u8); 6] = [
    (Kind::File, FileType::RegularFile, b'0'),
    (Kind::Link, FileType::Symlink, b'2'),
    (Kind::Char, FileType::CharacterDevice, b'3'),
    (Kind::Block, FileType::BlockDevice, b'4'),
    (Kind::Folder, FileType::Directory, b'5'),
    (Kind::Fifo, FileType::Fifo, b'6'),
];

impl Kind {
    /// `None` for what an archive has no word for.
    pub(crate) fn of(kind: FileType) -> Option<Self> {
        KINDS.iter().find(|known| known.1 == kind).map(|known| known.0)
    }

    /// As the system says it.
    pub(crate) fn file_type(self) -> FileType {
        KINDS[self as usize].1
    }
}

impl<'a> Entry<'a> {
    /// The entry of a file with this `stat`; `None` if it does not fit the simple form.
    pub(crate) fn new(kind: Kind, name: &'a [u8], stat: &Stat, link: &'a [u8]) -> Option<Self> {
        let device: Dev = stat.st_rdev;
        let entry = Self {
            kind,
            name,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: if kind == Kind::File { u64::try_from(stat.st_size).ok()? } else { 0 },
            time: u64::try_from(stat.st_mtime).ok()?,
            link,
            device: match kind {
                Kind::Char | Kind::Block => (rustix::fs::major(device), rustix::fs::minor(device)),
                _ => (0, 0),
            },
        };
        Some(entry)
    }

    pub(crate) fn owner(&self) -> (Option<Uid>, Option<Gid>) {
        (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))
    }

    pub(crate) fn dev(&self) -> Dev {
        rustix::fs::makedev(self.device.0, self.device.1)
    }

    /// Its header; `None` if it does not fit.
    pub(crate) fn encode(&self) -> Option<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        block
            .get_mut(..self.name.len())
            .filter(|_| self.name.len() <= NAME)?
            .copy_from_slice(self.name);
        let link = block[LINK].get_mut(..self.link.len())?;
        link.copy_from_slice(self.link);
        let numbers = [
            (100..108, self.mode.into()),
            (108..116, self.uid.into()),
            (116..124, self.gid.into()),
            (124..136, self.size),
            (136..148, self.time),
            (329..337, self.device.0.into()),
            (337..345, self.device.1.into()),
        ];
        for (place, number) in numbers {
            put(&mut block[place], number)?;
        }
        block[156] = KINDS[self.kind as usize].2;
        block[257..257 + MAGIC.len()].copy_from_slice(MAGIC);
        let sum = checksum(&block);
        put(&mut block[CHECKSUM.start..CHECKSUM.end - 1], sum)?;
        block[CHECKSUM.end - 1] = b' ';
        Some(block)
    }

    /// The entry of a header that [`Entry::encode`] made; `None` for all others.
    pub(crate) fn decode(block: &'a [u8; BLOCK]) -> Option<Self> {
        let kind = KINDS.iter().find(|known| known.2 == block[156])?.0;
        let number = |place: std::ops::Range<usize>| get(&block[place]);
        let small = |place| u32::try_from(number(place)?).ok();
        let entry = Self {
            kind,
            name: text(&block[..NAME]),
            mode: small(100..108)?,
            uid: small(108..116)?,
            gid: small(116..124)?,
            size: number(124..136)?,
            time: number(136..148)?,
            link: text(&block[LINK]),
            device: (small(329..337)?, small(337..345)?),
        };
        // Whatever else is in there has not come from us.
        (entry.encode()? == *block).then_some(entry)
    }
}

/// Writes `number` in octal, with zeros before it and a zero byte after it.
fn put(place: &mut [u8], mut number: u64) -> Option<()> {
    let (_, digits) = place.split_last_mut()?;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 8) as u8;
        number /= 8;
    }
    (number == 0).then_some(())
}

fn get(place: &[u8]) -> Option<u64> {
    let (end, digits) = place.split_last()?;
    if *end != 0 || !digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) {
        return None;
    }
    Some(digits.iter().fold(0, |number, digit| number * 8 + u64::from(digit - b'0')))
}

fn text(place: &[u8]) -> &[u8] {
    place.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn checksum(block: &[u8; BLOCK]) -> u64 {
    let bytes = block.iter().enumerate();
    bytes.map(|(at, byte)| u64::from(if CHECKSUM.contains(&at) { b' ' } else { *byte })).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry<'a>(name: &'a [u8], link: &'a [u8]) -> Entry<'a> {
        Entry {
            kind: Kind::Link,
            name,
            mode: 0o7654,
            uid: 1000,
            gid: 0o777_7777,
            size: 0,
            time: 1_700_000_000,
            link,
            device: (0, 0),
        }
    }

    #[test]
    fn a_header_is_read_back() {
        let name = [b'n'; NAME];
        for entry in [entry(b"./a", b"/x"), entry(&name, &name), entry(b"./\xff\n", b"")] {
            assert_eq!(Entry::decode(&entry.encode().unwrap()), Some(entry));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let long = [b'n'; NAME + 1];
        assert_eq!(entry(&long, b"").encode(), None);
        assert_eq!(entry(b"./a", &long).encode(), None);
        assert_eq!(Entry { uid: 0o1000_0000, ..entry(b"./a", b"") }.encode(), None);
        assert_eq!(Entry { time: 1 << 33, ..entry(b"./a", b"") }.encode(), None);
    }

    #[test]
    fn a_changed_header_is_refused() {
        let block = entry(b"./a", b"/x").encode().unwrap();
        for at in 0..BLOCK {
            let mut changed = block;
            changed[at] ^= 1;
            assert_eq!(Entry::decode(&changed), None, "byte {at}");
        }
        assert_eq!(Entry::decode(&[0; BLOCK]), None);
    }
}
