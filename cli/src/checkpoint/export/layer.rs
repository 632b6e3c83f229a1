//! A layer of the OCI in podman's two pieces: what is there, and a list of what is not any more.

use std::io::{self, Read, Write};

use tar::{Archive, Builder};

/// What a file is called that stands for one that is gone.
const WHITEOUT: &[u8] = b".wh.";
/// What stands for all that was in a folder.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What was found in a layer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Split {
    /// How many entries were written.
    pub(super) files: usize,
    /// Paths of what is gone, from the root.
    pub(super) deleted: Vec<String>,
}

/// Copies the files of `layer`, a plain tar, to `out`.
///
/// # Errors
/// When it cannot be read or written, or has what podman's pieces cannot say.
pub(super) fn split(layer: impl Read, out: impl Write) -> io::Result<Split> {
    let (mut archive, mut builder) = (Archive::new(layer), Builder::new(out));
    let mut split = Split::default();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path_bytes().into_owned();
        let path = path.strip_prefix(b"./").unwrap_or(&path).to_vec();
        let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let (folder, name) = path.split_at(at);
        if name == OPAQUE {
            let text = format!("{} is an opaque folder", String::from_utf8_lossy(folder));
            return Err(io::Error::other(text));
        }
        if let Some(name) = name.strip_prefix(WHITEOUT) {
            let gone = [b"/", folder, name].concat();
            let gone = String::from_utf8(gone);
            split
                .deleted
                .push(gone.map_err(|_| io::Error::other("a deleted file's name is no text"))?);
            continue;
        }
        let mut extensions = Vec::new();
        if let Some(all) = entry.pax_extensions()? {
            for extension in all {
                let extension = extension?;
                let key = extension.key().map_err(io::Error::other)?.to_owned();
                extensions.push((key, extension.value_bytes().to_owned()));
            }
        }
        builder.append_pax_extensions(
            extensions.iter().map(|(key, value)| (key.as_str(), value.as_slice())),
        )?;
        builder.append(&entry.header().clone(), &mut entry)?;
        split.files += 1;
    }
    builder.into_inner()?.flush()?;
    Ok(split)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tar::{EntryType, Header};

    fn layer(names: &[&str]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for name in names {
            let mut header = Header::new_ustar();
            header.set_entry_type(EntryType::Regular);
            header.set_mode(0o4755);
            header.set_size(4);
            // As containerd writes what does not fit into a header.
            let attribute = ("SCHILY.xattr.user.x", b"y".as_slice());
            let long = ("path", name.as_bytes());
            builder.append_pax_extensions([long, attribute]).unwrap();
            header.set_path("short").unwrap();
            header.set_cksum();
            builder.append(&header, b"text".as_slice()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn what_is_there_and_what_is_gone_are_told_apart() {
        let long = format!("etc/{}/file", "x".repeat(200));
        let mut out = Vec::new();
        let names = ["etc/new", "etc/.wh.old", &long, ".wh.top"];
        let found = split(layer(&names).as_slice(), &mut out).unwrap();
        assert_eq!(found.deleted, ["/etc/old", "/top"]);
        assert_eq!(found.files, 2);
        let mut names = Vec::new();
        for entry in Archive::new(out.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            names.push(String::from_utf8(entry.path_bytes().into_owned()).unwrap());
            assert_eq!(entry.header().mode().unwrap(), 0o4755);
            let extensions = entry.pax_extensions().unwrap().unwrap();
            let keys: Vec<_> = extensions.map(|e| e.unwrap().key().unwrap().to_owned()).collect();
            assert!(keys.contains(&"SCHILY.xattr.user.x".to_owned()), "{keys:?}");
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            assert_eq!(text, "text");
        }
        assert_eq!(names, ["etc/new", &long]);
    }

    #[test]
    fn what_podman_cannot_say_is_an_error() {
        let opaque = layer(&["etc/.wh..wh..opq"]);
        let error = split(opaque.as_slice(), io::sink()).unwrap_err();
        assert!(error.to_string().contains("opaque"), "{error}");
    }
}
