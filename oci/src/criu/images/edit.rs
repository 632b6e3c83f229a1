//! Changes to CRIU's images for a host that lacks what they name: mounts that somebody outside brought, and
//! permissions of the root folder, which every engine gives it anew.

use super::super::ImageError;
use super::super::decode::{Field, encode, fields, image, records};
use super::files::FILES_MAGIC;
use super::mounts::{MNTS_MAGIC, TMPFS};

/// Mounts that somebody outside brought, and what becomes of them.
#[derive(Debug, Clone, Copy)]
pub struct Outside<'a> {
    /// Where files are mounted whose place is to be taken by those below the mounts.
    pub files: &'a [&'a str],
    /// Where whole file systems in memory are mounted that are to be the container's own.
    pub tmpfs: &'a [&'a str],
}

/// What [`take_in`] has made of an image of mounts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TakenIn {
    /// The image.
    pub image: Vec<u8>,
    /// The file systems in memory: where each is mounted, and the name of the image that CRIU takes its
    /// files from, a tar packed with gzip.
    pub tmpfs: Vec<(String, String)>,
    /// Where file systems in memory are mounted that are the container's own, before or by now.
    pub own: Vec<String>,
}

/// Changes an image of mounts (`mountpoints-*.img`): those of `outside` are no longer external.
///
/// # Errors
/// When it is no such image, or shows only a part of a file system that is to be the container's own.
pub fn take_in(mountpoints: &[u8], outside: Outside) -> Result<TakenIn, ImageError> {
    /// Numbers of the fields that make a mount external.
    const EXTERNAL: [u64; 2] = [13, 18];
    let (mut kept, mut tmpfs, mut in_memory) = (Vec::new(), Vec::new(), Vec::new());
    for record in records(mountpoints, MNTS_MAGIC)? {
        let record = record?;
        let all = fields(record).collect::<Result<Vec<_>, _>>()?;
        let text = |number| {
            let mut found = all.iter().rev().filter(|field| field.number == number);
            found.next().map(Field::text).unwrap_or_default()
        };
        let number = |number| {
            let mut found = all.iter().rev().filter(|field| field.number == number);
            found.next().map_or(0, Field::number32)
        };
        let is_external = all.iter().any(|field| EXTERNAL.contains(&field.number));
        // Without the dot that CRIU puts before it.
        let target = text(7).trim_start_matches('.').to_owned();
        if is_external && outside.files.contains(&target.as_str()) {
            continue;
        }
        let whole = u64::from(number(1)) == TMPFS && text(6) == "/";
        let becomes_own = is_external && outside.tmpfs.contains(&target.as_str());
        if whole && (becomes_own || !is_external) {
            in_memory.push(target.clone());
        }
        if !becomes_own {
            kept.push(record.to_vec());
            continue;
        }
        if !whole {
            return Err(ImageError::Format("the mount is no whole file system in memory"));
        }
        tmpfs.push((target, format!("tmpfs-dev-{}.tar.gz.img", number(3))));
        let own = all.iter().filter(|field| !EXTERNAL.contains(&field.number));
        kept.push(own.flat_map(encode::field).collect());
    }
    Ok(TakenIn { image: image(MNTS_MAGIC, &kept), tmpfs, own: in_memory })
}

/// Changes the image of files (`files.img`): the root folder may have any permissions.
///
/// # Errors
/// When it is no such image.
pub fn take_any_root(files: &[u8]) -> Result<Vec<u8>, ImageError> {
    /// Number of the field of a plain file, and in it those of its path and its permissions.
    const FILE: u64 = 3;
    const PATH: u64 = 6;
    const MODE: u64 = 10;
    let mut changed = Vec::new();
    for record in records(files, FILES_MAGIC)? {
        let mut all = Vec::new();
        for field in fields(record?) {
            let field = field?;
            let inner = fields(if field.number == FILE { field.message() } else { &[] });
            let inner = inner.collect::<Result<Vec<_>, _>>()?;
            let is_root = |inner: &Field<'_>| inner.number == PATH && inner.message() == b"/";
            if !inner.iter().any(is_root) {
                all.extend(encode::field(&field));
                continue;
            }
            let rest = inner.iter().filter(|inner| inner.number != MODE);
            let rest: Vec<u8> = rest.flat_map(encode::field).collect();
            all.extend(encode::bytes(FILE, &rest));
        }
        changed.push(all);
    }
    Ok(image(FILES_MAGIC, &changed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use encode::{bytes, message, number};

    #[test]
    fn only_the_root_folder_may_have_any_permissions() {
        let file = |path: &str, mode: Option<u64>| {
            let mut fields = vec![number(1, 7), number(2, 0), bytes(6, path.as_bytes())];
            fields.extend(mode.map(|mode| number(10, mode)));
            message(&[number(1, 1), number(2, 7), bytes(3, &message(&fields))])
        };
        let pipe = message(&[number(1, 2), bytes(18, b"\x08\x03"), vec![0x9d, 1, 1, 2, 3, 4]]);
        let before = [file("/", Some(0o40755)), file("/etc", Some(0o40755)), pipe.clone()];
        let after = [file("/", None), file("/etc", Some(0o40755)), pipe];
        let taken = take_any_root(&image(FILES_MAGIC, &before)).unwrap();
        assert_eq!(taken, image(FILES_MAGIC, &after));
        assert!(take_any_root(b"no image").is_err());
    }

    fn mount(kind: u64, device: u64, root: &str, target: &str, key: &str) -> Vec<u8> {
        let mut all = vec![number(1, kind), number(3, device), bytes(6, root.as_bytes())];
        all.push(bytes(7, target.as_bytes()));
        if !key.is_empty() {
            all.extend([number(13, 1), bytes(18, key.as_bytes())]);
        }
        all.push(bytes(9, b"size=64k"));
        message(&all)
    }

    const OUTSIDE: Outside = Outside { files: &["/etc/hosts"], tmpfs: &["/dev/shm"] };

    #[test]
    fn files_of_elsewhere_go_and_memory_becomes_the_containers_own() {
        let root = mount(17, 9, "/", "./", "/");
        let inner = mount(5, 7, "/", "./etc/hosts", "");
        let shm = mount(5, 300, "/", "./dev/shm", "/dev/shm");
        let hosts = mount(0, 8, "/h", "./etc/hosts", "/etc/hosts");
        let other = mount(0, 8, "/x", "./etc/other", "/etc/other");
        let before = image(MNTS_MAGIC, &[root.clone(), inner.clone(), shm, hosts, other.clone()]);
        let taken = take_in(&before, OUTSIDE).unwrap();
        let own = mount(5, 300, "/", "./dev/shm", "");
        assert_eq!(taken.image, image(MNTS_MAGIC, &[root, inner, own, other]));
        assert_eq!(taken.own, ["/etc/hosts", "/dev/shm"]);
        assert_eq!(taken.tmpfs, [("/dev/shm".to_owned(), "tmpfs-dev-300.tar.gz.img".to_owned())]);
    }

    #[test]
    fn a_part_of_a_file_system_is_not_made_the_containers_own() {
        for bad in [
            mount(5, 300, "/part", "./dev/shm", "/dev/shm"),
            mount(17, 300, "/", "./dev/shm", "/dev/shm"),
        ] {
            assert!(take_in(&image(MNTS_MAGIC, &[bad]), OUTSIDE).is_err());
        }
        assert!(take_in(b"no image", OUTSIDE).is_err());
    }
}
