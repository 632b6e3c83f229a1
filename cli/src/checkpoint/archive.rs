//! CRIU's images as an archive. One that comes from elsewhere is not trusted: it holds plain files,
//! and nothing of it leaves its folder.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::paths::is_plain_name;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::untar::{self, Kind, Reader};

/// A file that is read into memory is not longer, bytes.
const MAX_FOUND: u64 = 16 << 20;

/// Writes the files of `dir`, which has no folders. The same files give the same bytes.
///
/// # Errors
/// When one cannot be read, or `out` does not take it.
pub(super) fn pack(dir: &Path, out: impl Write) -> io::Result<()> {
    let mut names = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    let mut builder = Builder::new(out);
    for name in names {
        let file = File::open(dir.join(&name))?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::other(format!("{} is no file", Path::new(&name).display())));
        }
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_size(meta.len());
        builder.append_data(&mut header, &name, file)?;
    }
    builder.into_inner()?.flush()
}

/// Digest, as `sha256:<hex>`, and length of what `write` writes.
///
/// # Errors
/// When it cannot.
pub(super) fn digest(
    write: impl Fn(&mut dyn Write) -> io::Result<()>,
) -> io::Result<(String, u64)> {
    let mut sum = Sum::default();
    write(&mut sum)?;
    Ok((name(&sum.hash.finalize()), sum.length))
}

/// Digest of bytes, as `sha256:<hex>`.
pub(super) fn digest_of(bytes: &[u8]) -> String {
    name(&Sha256::digest(bytes))
}

fn name(hash: &[u8]) -> String {
    hash.iter().fold("sha256:".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}

#[derive(Default)]
struct Sum {
    hash: Sha256,
    length: u64,
}

impl Write for Sum {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the files of an archive into the folder `dir`, which is there and empty.
///
/// # Errors
/// For anything but plain files with plain names, a name that comes twice, and an archive that breaks off.
pub(super) fn unpack(input: impl Read + Send + 'static, dir: &Path) -> Result<()> {
    let mut reader = Reader::new(untar::through(input));
    while let Some(entry) = reader.next().context("read the archive")? {
        match entry.kind {
            // The folder itself.
            Kind::Folder if entry.name.is_empty() => {}
            Kind::File => extract(&mut reader, dir, &entry.name)?,
            other => bail!("{:?} of the archive is no plain file but a {other:?}", entry.name),
        }
    }
    Ok(())
}

/// Writes the entry that `reader` is at into `dir` as the file `name`.
///
/// # Errors
/// When it is no plain name, or one that is there; when the archive breaks off or there is no room.
pub(super) fn extract(reader: &mut Reader, dir: &Path, name: &str) -> Result<()> {
    ensure!(is_plain_name(name), "{name:?} of the archive is no name of an image");
    let path = dir.join(name);
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("create {}", path.display()))?;
    reader.copy(&mut file).with_context(|| format!("write {}", path.display()))
}

/// The file `wanted` of an archive, if it has it; the archive is read no further.
///
/// # Errors
/// When it is longer than [`MAX_FOUND`], or the archive breaks off before it.
pub(super) fn find(input: impl Read + Send + 'static, wanted: &str) -> Result<Option<Vec<u8>>> {
    let mut reader = Reader::new(untar::through(input));
    while let Some(entry) = reader.next().context("read the archive")? {
        if entry.name == wanted && entry.kind == Kind::File {
            ensure!(entry.size <= MAX_FOUND, "{wanted} of the archive is too long");
            return reader.content().context("read the archive").map(Some);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(bytes: &[u8]) -> io::Cursor<Vec<u8>> {
        io::Cursor::new(bytes.to_vec())
    }

    fn header(kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(size);
        header
    }

    /// An archive of one entry, with a name that a builder would refuse.
    fn archive(name: &str, kind: EntryType, content: &[u8]) -> Vec<u8> {
        let mut header = header(kind, content.len() as u64);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        if kind.is_symlink() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        let mut builder = Builder::new(Vec::new());
        builder.append(&header, content).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn what_was_packed_is_unpacked_and_the_digest_is_that_of_the_bytes() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let large = vec![7; 3 << 20];
        fs::write(from.path().join("pages-1.img"), &large).unwrap();
        fs::write(from.path().join("descriptors.json"), "[]").unwrap();
        let mut bytes = Vec::new();
        pack(from.path(), &mut bytes).unwrap();
        let packed = digest(|out| pack(from.path(), out)).unwrap();
        assert_eq!(packed, (digest_of(&bytes), bytes.len() as u64));
        assert_eq!(find(cursor(&bytes), "descriptors.json").unwrap(), Some(b"[]".into()));
        assert_eq!(find(cursor(&bytes), "ferry.json").unwrap(), None);
        unpack(cursor(&bytes), to.path()).unwrap();
        assert_eq!(fs::read(to.path().join("pages-1.img")).unwrap(), large);
        assert_eq!(fs::read(to.path().join("descriptors.json")).unwrap(), b"[]");
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
        // Broken off in the middle.
        let to = tempfile::tempdir().unwrap();
        assert!(unpack(cursor(&bytes[..bytes.len() / 2]), to.path()).is_err());
    }

    #[test]
    fn nothing_leaves_the_folder() {
        let to = tempfile::tempdir().unwrap();
        let inside = to.path().join("inside");
        fs::create_dir(&inside).unwrap();
        for name in ["../x", "/x", "a/b", "..", ".hidden", "a/../../x"] {
            let bytes = archive(name, EntryType::Regular, b"content");
            assert!(unpack(cursor(&bytes), &inside).is_err(), "{name}");
        }
        for kind in [EntryType::Symlink, EntryType::Link, EntryType::Fifo, EntryType::Char] {
            assert!(unpack(cursor(&archive("x", kind, b"")), &inside).is_err(), "{kind:?}");
        }
        assert_eq!(fs::read_dir(&inside).unwrap().count(), 0);
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_name_comes_once_and_the_folder_itself_is_no_file() {
        let to = tempfile::tempdir().unwrap();
        let mut both = archive("./", EntryType::Directory, b"");
        both.truncate(512);
        let mut one = archive("x", EntryType::Regular, b"1");
        one.truncate(1024);
        both.extend(&one);
        both.extend(archive("./x", EntryType::Regular, b"2"));
        let error = unpack(cursor(&both), to.path()).unwrap_err();
        assert!(format!("{error:#}").contains("exists"), "{error:#}");
        assert_eq!(fs::read(to.path().join("x")).unwrap(), b"1");
    }
}
