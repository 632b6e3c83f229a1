//! Where ferry keeps its state on a host. All of it lives on a tmpfs: it speaks of running tasks
//! and ends with them when the host restarts.

use std::path::{Path, PathBuf};

/// Root of ferry's run-time state.
pub const RUN: &str = "/run/ferry";
/// Sockets of the Ferry service, one per shim.
pub const SOCKETS: &str = "/run/ferry/s";
/// Checkpoint images of migrations under way, one folder each.
pub const IMAGES: &str = "/run/ferry/images";
/// Records of migrations that have been decided, one JSON file each.
pub const RECORDS: &str = "/run/ferry/records";
/// File in a container's bundle that names the socket of its Ferry service.
pub const BUNDLE_FILE: &str = "ferry.json";

/// File in a container's bundle that names the migration it is leaving by.
pub const MIGRATION_FILE: &str = "ferry-migration";

/// Where the images of a migration keep the content of inventory.img while a restore waits for it.
pub const INVENTORY_FILE: &str = "inventory.img.held";

/// Page stores of containers that are on their way here or have just come, one folder each.
pub const PAGES: &str = "/run/ferry/pages";

/// Pre-dumps made by `ferry predump`, on a disk: they hold memory. They end with their task all the same.
pub const PRE_DUMPS: &str = "/var/lib/ferry/predumps";

/// Folder of the pre-dumps of container `id`, one folder each in it.
pub fn pre_dumps(namespace: &str, id: &str) -> PathBuf {
    Path::new(PRE_DUMPS).join(format!("{namespace}.{id}"))
}

/// Folder of the FIFOs of container `id`'s terminal, where `ferry restore` has made them. They end with
/// their task.
pub fn terminal(namespace: &str, id: &str) -> PathBuf {
    Path::new(RUN).join("terminals").join(format!("{namespace}.{id}"))
}

/// What outlives its container and the host's run: output that nobody is there for any more, and CRIU's
/// log of a restore that has failed.
const LOGS: &str = "/var/log/ferry";

/// Folder of such logs of container `id`.
pub fn logs(namespace: &str, id: &str) -> PathBuf {
    Path::new(LOGS).join(namespace).join(id)
}

/// Folder in a container's bundle in which CRIU works while it restores a migration.
pub const RESTORE_WORK: &str = "ferry-restore";

/// Folder of the orders for what the dump of `migration` leaves out.
pub fn hide(migration: &str) -> PathBuf {
    Path::new(RUN).join("hide").join(migration)
}

/// Folder of the file systems in memory that wait here for the container of `migration`. Something is
/// mounted on what is in it: never to be removed with its contents.
pub fn tmpfs(migration: &str) -> PathBuf {
    Path::new(RUN).join("tmpfs").join(migration)
}

/// Where the CPU quota of a container that is throttled is written down, by the pid of its init.
pub fn quota_folder(init: u32) -> PathBuf {
    Path::new(RUN).join("quota").join(init.to_string())
}

/// Folder of the page store of container `id`.
pub fn pages(namespace: &str, id: &str) -> PathBuf {
    Path::new(PAGES).join(format!("{namespace}.{id}"))
}

/// Folder of the images of `migration`.
pub fn images(migration: &str) -> PathBuf {
    Path::new(IMAGES).join(migration)
}

/// Record of `migration`.
pub fn record(migration: &str) -> PathBuf {
    Path::new(RECORDS).join(format!("{migration}.json"))
}

/// File that marks the container of `migration` as let run here. Made by whoever decides first: by
/// the restore, or by an agent that finds it undecided and thereby decides against it.
pub fn decided(migration: &str) -> PathBuf {
    Path::new(RECORDS).join(format!("{migration}.decided"))
}

/// File that says of the address of `migration`, an IPv6 one, that this host is to choose it for
/// connections of its own, as the source did.
pub fn preferred(migration: &str) -> PathBuf {
    Path::new(RECORDS).join(format!("{migration}.preferred"))
}

/// Folders in which checkpoints are put together and taken apart, each named `NAMESPACE.ID`. On a disk.
pub const CHECKPOINTS: &str = "/var/lib/ferry/checkpoints";
/// Folder of CRIU's images in one of them.
pub const CHECKPOINT_IMAGES: &str = "images";
/// File in one of them that says that the container it is restored for has run.
pub const CHECKPOINT_STARTED: &str = "started";

/// Folder and id of the `ferry restore` that has brought the folder `images`, if one has. Its address is
/// silent under this id.
pub fn restore_of(images: &Path) -> Option<(&Path, &str)> {
    let folder = images.parent().filter(|_| images.ends_with(CHECKPOINT_IMAGES))?;
    let name = folder.file_name()?.to_str()?;
    let id = name.rsplit_once('.').map(|(_, id)| id).filter(|id| is_migration_id(id))?;
    (folder.parent()? == Path::new(CHECKPOINTS)).then_some((folder, id))
}

/// Name of a file that differs after every start of this host.
pub const EPOCH: &str = "/run/ferry/epoch";

/// Whether `id` is safe in a path as a container's id.
pub fn is_container_id(id: &str) -> bool {
    (1..=76).contains(&id.len())
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Whether `id` is safe in a path and in the name of a firewall table.
pub fn is_migration_id(id: &str) -> bool {
    (8..=64).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Whether `name` is one of a file of a checkpoint, and stays in its folder.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 256
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::{CHECKPOINTS, is_plain_name, restore_of};
    use std::path::Path;

    #[test]
    fn names_of_images_stay_in_their_folder() {
        for good in ["pages-1.img", "descriptors.json", "tmpfs-dev-42.tar.gz.img"] {
            assert!(is_plain_name(good), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "a\0b"] {
            assert!(!is_plain_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_restore_of_ours_is_told_by_where_its_images_are() {
        let of = |folder: &str| {
            let path = Path::new(folder);
            restore_of(path).map(|(folder, id)| (folder.to_owned(), id.to_owned()))
        };
        let folder = format!("{CHECKPOINTS}/k8s.io.0123456789abcdef");
        let found = of(&format!("{folder}/images")).unwrap();
        assert_eq!(found, (folder.clone().into(), "0123456789abcdef".to_owned()));
        for other in [&folder, "/images", "/tmp/k.0123456789abcdef/images", "/x/ns.../images"] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
