//! Mount options as in fstab(5).

use crate::error::{Error, Result};
use nix::mount::MsFlags;
use nix::sys::statvfs::{FsFlags, statvfs};
use std::path::Path;

/// What a list of options comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) flags: MsFlags,
    /// What the file system itself reads.
    pub(super) data: Vec<String>,
    /// The source is a file, to be seen as a device.
    pub(super) looped: bool,
    /// That device is read and written around the cache.
    pub(super) direct: bool,
    /// Ids that owners are shifted by: users, groups.
    pub(super) users: Option<(String, String)>,
}

impl Options {
    pub(super) fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            data: vec![],
            looped: false,
            direct: false,
            users: None,
        };
        let (mut uids, mut gids) = (None, None);
        for option in options {
            if option.starts_with("X-containerd.") {
                let text = format!("option {option:?} is one for containerd's mount manager");
                return Err(Error::invalid_argument(text));
            }
            match (flag(option), option.split_once('=')) {
                (Some((true, flag)), _) => parsed.flags |= flag,
                (Some((false, flag)), _) => parsed.flags &= !flag,
                (_, Some(("uidmap", ids))) => uids = Some(ids.to_string()),
                (_, Some(("gidmap", ids))) => gids = Some(ids.to_string()),
                _ if option == "loop" => parsed.looped = true,
                _ => parsed.data.push(option.clone()),
            }
        }
        if parsed.looped {
            let count = parsed.data.len();
            parsed.data.retain(|option| option != "direct-io");
            parsed.direct = parsed.data.len() < count;
        }
        parsed.users = uids.zip(gids);
        Ok(parsed)
    }
}

/// The flag that an option sets (true) or clears.
fn flag(option: &str) -> Option<(bool, MsFlags)> {
    Some(match option {
        "async" => (false, MsFlags::MS_SYNCHRONOUS),
        "atime" => (false, MsFlags::MS_NOATIME),
        "bind" => (true, MsFlags::MS_BIND),
        "dev" => (false, MsFlags::MS_NODEV),
        "diratime" => (false, MsFlags::MS_NODIRATIME),
        "dirsync" => (true, MsFlags::MS_DIRSYNC),
        "exec" => (false, MsFlags::MS_NOEXEC),
        "mand" => (true, MsFlags::MS_MANDLOCK),
        "noatime" => (true, MsFlags::MS_NOATIME),
        "nodev" => (true, MsFlags::MS_NODEV),
        "nodiratime" => (true, MsFlags::MS_NODIRATIME),
        "noexec" => (true, MsFlags::MS_NOEXEC),
        "nomand" => (false, MsFlags::MS_MANDLOCK),
        "norelatime" => (false, MsFlags::MS_RELATIME),
        "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
        "nosuid" => (true, MsFlags::MS_NOSUID),
        "rbind" => (true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        "relatime" => (true, MsFlags::MS_RELATIME),
        "remount" => (true, MsFlags::MS_REMOUNT),
        "ro" => (true, MsFlags::MS_RDONLY),
        "rw" => (false, MsFlags::MS_RDONLY),
        "strictatime" => (true, MsFlags::MS_STRICTATIME),
        "suid" => (false, MsFlags::MS_NOSUID),
        "sync" => (true, MsFlags::MS_SYNCHRONOUS),
        _ => return None,
    })
}

/// The flags of the mount at `path` that must be named again when it is remounted: inside a user
/// namespace they cannot be taken away.
pub(super) fn locked(path: &Path) -> MsFlags {
    let users = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let everybody: Vec<_> = users.split_whitespace().collect();
    if everybody == ["0", "0", "4294967295"] {
        return MsFlags::empty();
    }
    let now = statvfs(path).map(|stat| stat.flags()).unwrap_or(FsFlags::empty());
    let pairs = [
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let set = pairs.into_iter().filter(|(stat, _)| now.contains(*stat));
    set.fold(MsFlags::empty(), |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Options> {
        Options::parse(&options.iter().map(|option| option.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_told_from_data() {
        let options = parse(&["rbind", "ro", "nosuid", "suid", "size=10m", "index=off"]).unwrap();
        assert_eq!(options.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
        assert_eq!(options.data, ["size=10m", "index=off"]);
        assert!(!options.looped && options.users.is_none());
    }

    #[test]
    fn devices_and_owners_are_no_data() {
        let options = parse(&["loop", "direct-io", "uidmap=0:1000:1", "gidmap=0:2:3"]).unwrap();
        assert!(options.looped && options.direct && options.data.is_empty());
        assert_eq!(options.users, Some(("0:1000:1".into(), "0:2:3".into())));
        // One without the other shifts nothing, as in containerd.
        assert_eq!(parse(&["uidmap=0:1000:1"]).unwrap().users, None);
        assert_eq!(parse(&["direct-io"]).unwrap().data, ["direct-io"]);
    }

    #[test]
    fn options_for_the_mount_manager_are_refused() {
        let err = parse(&["X-containerd.mkdir.path=/x"]).unwrap_err();
        assert!(err.to_string().contains("X-containerd.mkdir.path=/x"), "{err}");
    }
}
