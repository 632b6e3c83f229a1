//! Walking through a tar archive that nobody vouches for.
//!
//! What is refused: names that lead out of a folder, links, devices, more entries or longer extensions
//! than a checkpoint has, and an archive that ends early. So whoever unpacks what passes here writes
//! nothing but files and folders below his own.

mod open;

use std::io::{self, Read, Write};

pub(crate) use open::{open, through, uncompressed};

const BLOCK: usize = 512;
/// The most entries. A process has some five images.
const MOST_ENTRIES: usize = 1 << 20;
/// The longest extension that holds a name or attributes, bytes.
const LONGEST_EXTENSION: u64 = 1 << 20;
/// The longest name, bytes.
const LONGEST_NAME: usize = 4096;

/// The bytes of an archive.
pub(crate) trait Stream: Read + Send {
    /// Passes over `bytes`. Passing the end may go unnoticed until the next read.
    ///
    /// # Errors
    /// When it cannot be read.
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

/// A file or a folder in an archive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its path, without `./` before it and without a slash at its end.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: Kind,
    /// Bytes of its content.
    pub(crate) size: u64,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file.
    File,
    /// A folder.
    Folder,
    /// The one link that CRIU makes, to an earlier dump, by its name alone: where it leads is not read.
    Parent,
}

/// An archive on its way through.
pub(crate) struct Reader {
    stream: Box<dyn Stream>,
    /// Content of the entry that was not read.
    left: u64,
    /// What fills up its last block.
    padding: u64,
    entries: usize,
}

/// What extensions say of the entry after them.
#[derive(Default)]
struct Extended {
    name: Option<String>,
    size: Option<u64>,
}

impl Reader {
    pub(crate) fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream, left: 0, padding: 0, entries: 0 }
    }

    /// The next entry; `None` at the end.
    ///
    /// # Errors
    /// For what is refused.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut extended = Extended::default();
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            self.entries += 1;
            if self.entries > MOST_ENTRIES {
                return Err(bad("the archive has too many entries for a checkpoint"));
            }
            let size = number(&header[124..136])?;
            match header[156] {
                b'x' => self.attributes(size, &mut extended)?,
                // Of all entries to come: of no interest here.
                b'g' => self.begin(size)?,
                b'L' => {
                    let name = self.extension(size)?;
                    extended.name = Some(text(&name).into_owned());
                }
                // A long target of a link, which is refused or not read.
                b'K' => _ = self.extension(size)?,
                kind => {
                    let name = extended.name.unwrap_or_else(|| name(&header));
                    let size = extended.size.unwrap_or(size);
                    return self.entry(&name, kind, size).map(Some);
                }
            }
        }
    }

    /// All of the entry's content.
    ///
    /// # Errors
    /// When the archive ends early. To be asked for only where its size is known to be small.
    pub(crate) fn content(&mut self) -> io::Result<Vec<u8>> {
        self.part(self.left)
    }

    /// The next `bytes` of the entry's content, which are a few.
    ///
    /// # Errors
    /// When the archive ends early.
    pub(crate) fn part(&mut self, bytes: u64) -> io::Result<Vec<u8>> {
        let bytes = bytes.min(self.left);
        let mut part = Vec::new();
        (&mut self.stream).take(bytes).read_to_end(&mut part)?;
        if part.len() as u64 != bytes {
            return Err(early());
        }
        self.left -= bytes;
        Ok(part)
    }

    /// Writes what is left of the entry's content to `out`.
    ///
    /// # Errors
    /// When the archive ends early, or `out` does not take it.
    pub(crate) fn copy(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let copied = io::copy(&mut (&mut self.stream).take(self.left), out)?;
        self.left -= copied;
        if self.left == 0 { Ok(()) } else { Err(early()) }
    }

    /// Passes over some of the entry's content.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn pass(&mut self, bytes: u64) -> io::Result<()> {
        let bytes = bytes.min(self.left);
        self.stream.skip(bytes)?;
        self.left -= bytes;
        Ok(())
    }

    fn entry(&mut self, name: &str, kind: u8, size: u64) -> io::Result<Entry> {
        let name = plain(name)?;
        let kind = match kind {
            0 | b'0' | b'7' => Kind::File,
            b'5' => Kind::Folder,
            b'2' if name == "parent" || name.ends_with("/parent") => Kind::Parent,
            b'1' | b'2' => return Err(bad(&format!("{name:?} is a link, which is refused"))),
            _ => return Err(bad(&format!("{name:?} is neither a file nor a folder"))),
        };
        let size = if kind == Kind::File { size } else { 0 };
        self.begin(size)?;
        Ok(Entry { name, kind, size })
    }

    /// The next header. Two empty blocks end an archive, and one is enough.
    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let rest = self.left.checked_add(self.padding).ok_or_else(early)?;
        self.stream.skip(rest)?;
        (self.left, self.padding) = (0, 0);
        let mut header = [0; BLOCK];
        self.stream.read_exact(&mut header).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => early(),
            _ => error,
        })?;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let counted = |(at, byte): (usize, &u8)| {
            u64::from(if (148..156).contains(&at) { b' ' } else { *byte })
        };
        let sum: u64 = header.iter().enumerate().map(counted).sum();
        if number(&header[148..156]).ok() != Some(sum) {
            return Err(bad("it is no tar archive, or a damaged one"));
        }
        Ok(Some(header))
    }

    fn begin(&mut self, size: u64) -> io::Result<()> {
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        Ok(())
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > LONGEST_EXTENSION {
            return Err(bad("an extension of the archive is too long"));
        }
        self.begin(size)?;
        self.content()
    }

    /// Lines of `LENGTH KEY=VALUE`.
    fn attributes(&mut self, size: u64, extended: &mut Extended) -> io::Result<()> {
        let bytes = self.extension(size)?;
        let damaged = || bad("an extension of the archive is damaged");
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(damaged)?;
            let length = text(&rest[..space]).parse::<usize>().map_err(|_| damaged())?;
            let line = rest.get(space + 1..length).ok_or_else(damaged)?;
            rest = &rest[length..];
            let line = line.strip_suffix(b"\n").ok_or_else(damaged)?;
            let equals = line.iter().position(|byte| *byte == b'=').ok_or_else(damaged)?;
            let value = String::from_utf8_lossy(&line[equals + 1..]);
            match &line[..equals] {
                b"path" => extended.name = Some(value.into_owned()),
                b"size" => extended.size = Some(value.parse().map_err(|_| damaged())?),
                key if key.starts_with(b"GNU.sparse") => {
                    return Err(bad("files with holes are not read: make the archive without"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A name below the folder, or an error.
fn plain(name: &str) -> io::Result<String> {
    if name.len() > LONGEST_NAME || name.contains('\0') {
        return Err(bad("a name in the archive is too long"));
    }
    if name.starts_with('/') || name.split('/').any(|part| part == "..") {
        return Err(bad(&format!("the name {name:?} leads out of the archive, which is refused")));
    }
    let parts: Vec<_> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    Ok(parts.join("/"))
}

/// The name in a header.
fn name(header: &[u8; BLOCK]) -> String {
    let name = text(&header[..100]);
    // GNU's own form has a space there, and times where the first part of the name would be.
    let folder = if &header[257..263] == b"ustar\0" { text(&header[345..500]) } else { "".into() };
    if folder.is_empty() { name.into_owned() } else { format!("{folder}/{name}") }
}

/// Octal digits, or with the first bit set a binary number.
fn number(field: &[u8]) -> io::Result<u64> {
    let damaged = || bad("a number in the archive is damaged");
    if field[0] & 0x80 != 0 {
        let first = u64::from(field[0] & 0x7f);
        return field[1..].iter().try_fold(first, |all, byte| {
            all.checked_mul(256).map(|all| all | u64::from(*byte)).ok_or_else(damaged)
        });
    }
    let digits = text(field);
    let digits = digits.trim();
    if digits.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(digits, 8).map_err(|_| damaged())
}

/// What stands before the first zero byte.
fn text(field: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(field.split(|byte| *byte == 0).next().unwrap_or_default())
}

pub(crate) fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn early() -> io::Error {
    bad("the archive ends early: copy it again")
}
