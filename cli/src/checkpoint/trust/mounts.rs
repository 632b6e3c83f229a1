//! Every mount in the images is one of the spec, or one that runc adds by itself.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use ferry_oci::criu::images::Asked;
use serde_json::Value;

use super::super::spec::{Allowed, MASKED, PROTECTED, Want, list, text, want};

const READ_ONLY: u32 = libc::MS_RDONLY as u32;
/// Flags that a mount may have. Others make CRIU's mount(2) another call: a bind, a move, a remount.
const FLAGS: u32 = (libc::MS_RDONLY
    | libc::MS_NOSUID
    | libc::MS_NODEV
    | libc::MS_NOEXEC
    | libc::MS_SYNCHRONOUS
    | libc::MS_DIRSYNC
    | libc::MS_NOATIME
    | libc::MS_NODIRATIME
    | libc::MS_RELATIME
    | libc::MS_STRICTATIME
    | libc::MS_UNBINDABLE
    | libc::MS_PRIVATE
    | libc::MS_SLAVE
    | libc::MS_SHARED) as u32;
/// Options of a spec with their flags, and what takes them back.
const OPTIONS: [(&str, &str, u32); 4] = [
    ("ro", "rw", READ_ONLY),
    ("nosuid", "suid", libc::MS_NOSUID as u32),
    ("nodev", "dev", libc::MS_NODEV as u32),
    ("noexec", "exec", libc::MS_NOEXEC as u32),
];
/// What runc puts over files that are to be hidden.
const NULL: &str = "/dev/null";
/// Where it puts a terminal.
const CONSOLE: &str = "/dev/console";
/// What mounts show that are of no device: CRIU makes them anew.
const CGROUPS: [&str; 2] = ["cgroup", "cgroup2"];

/// A mount of the spec.
struct Given<'a> {
    target: String,
    kind: &'a str,
    bind: bool,
    flags: u32,
}

/// What `mounts` have that a container of `spec` has not.
pub(super) fn check(spec: &Value, mounts: &[Asked], found: &mut Vec<Want>) {
    let given: Vec<Given<'_>> = list(&spec["mounts"]).map(Given::new).collect();
    let mut refuse = |mount: &Asked, why: &str| {
        let Asked { kind, source, target, .. } = mount;
        let what = format!("the mount of {source} ({kind}) at {target}{why}");
        want(found, Allowed::Mounts, what);
    };
    let mut places = BTreeMap::new();
    for mount in mounts {
        if places.insert(mount.target.as_str(), mount).is_some() {
            refuse(mount, ", where another one is");
        }
    }
    for mount in mounts {
        if mount.odd || !is_plain(&mount.target) || !is_plain(&mount.root) {
            refuse(mount, ", which is deleted or in no place");
        } else if used_flags(mount) & !FLAGS != 0 {
            refuse(mount, " with flags that are no mount's own");
        } else if mount.target == "/" {
            let open = spec["root"]["readonly"] == true && !is_read_only(mount);
            if mount.key.is_some() || open {
                refuse(mount, ", which can be written or comes from outside");
            }
        } else if above(&places, &mount.target).is_none_or(|above| above.id != mount.parent) {
            refuse(mount, ", below or above of where it should be");
        } else if mount.key.is_none() && mounts.iter().any(|other| is_source(other, mount)) {
            refuse(mount, ", of files that are the host's or the root's");
        } else if let Err(why) = fits(spec, &given, mount) {
            refuse(mount, why);
        }
    }
    for (key, paths) in [("maskedPaths", &MASKED[..]), ("readonlyPaths", &PROTECTED[..])] {
        let wanted = paths.iter().filter(|path| list(&spec["linux"][key]).any(|p| p == *path));
        for path in wanted.filter(|path| !places.contains_key(**path)) {
            let shown = above(&places, path).is_some_and(|above| above.target != "/");
            // Where it was dumped it may have been missing.
            if shown && Path::new(path).exists() {
                want(found, Allowed::Mounts, format!("an open {path}"));
            }
        }
    }
}

/// Whether `mount` is one of the spec or of runc's; why not.
fn fits(spec: &Value, given: &[Given<'_>], mount: &Asked) -> Result<(), &'static str> {
    let target = mount.target.as_str();
    let listed = |key: &str| list(&spec["linux"][key]).any(|path| path == target);
    let there = given.iter().rfind(|given| given.target == target);
    let under = |kinds: &[&str]| {
        let mut over = given.iter().filter(|given| Path::new(target).starts_with(&given.target));
        over.rfind(|given| given.target != target && kinds.contains(&given.kind))
    };
    if let Some(key) = &mount.key {
        if key == NULL && listed("maskedPaths") {
            return Ok(());
        }
        let bind = there.filter(|there| there.bind).or_else(|| under(&CGROUPS));
        let bind = bind.filter(|_| key == target).ok_or(", which the container has not")?;
        return bind.allows(mount);
    }
    let kind = mount.kind.as_str();
    if mount.root == "/" && kind == "tmpfs" && listed("maskedPaths") && is_read_only(mount) {
        return Ok(());
    }
    if let Some(over) = under(&["proc", "sysfs"]).filter(|over| over.kind == kind)
        && (listed("readonlyPaths") || listed("maskedPaths"))
    {
        let own = target.strip_prefix(&over.target) == Some(mount.root.as_str());
        let closed = own && mount.flags & READ_ONLY != 0;
        return closed.then_some(()).ok_or(", which can be written");
    }
    if target == CONSOLE && kind == "devpts" && spec["process"]["terminal"] == true {
        return Ok(());
    }
    let there = there.filter(|there| !there.bind).ok_or(", which the container has not")?;
    match mount.root.as_str() {
        "/" if there.kind == kind || there.kind == "cgroup" && kind == "cgroup2" => {
            there.allows(mount)
        }
        // Version 1: the hierarchies are below.
        "/" if there.kind == "cgroup" && kind == "tmpfs" => Ok(()),
        _ => Err(", which the container has not"),
    }
}

impl<'a> Given<'a> {
    fn new(mount: &'a Value) -> Self {
        let kind = text(&mount["type"]);
        let mut flags = 0;
        for option in list(&mount["options"]).map(text) {
            for (set, cleared, flag) in OPTIONS {
                // The last one counts.
                flags = if option == set { flags | flag } else { flags };
                flags = if option == cleared { flags & !flag } else { flags };
            }
        }
        let has = |name: &str| list(&mount["options"]).any(|option| option == name);
        let bind = kind == "bind" || has("bind") || has("rbind");
        Self { target: clean(text(&mount["destination"])), kind, bind, flags }
    }

    /// A mount may do less than what the spec says, not more.
    fn allows(&self, mount: &Asked) -> Result<(), &'static str> {
        (self.flags & !used_flags(mount) == 0)
            .then_some(())
            .ok_or(", which can do more than the container's")
    }
}

/// Flags with which CRIU would mount. What has a key, or is the root, has its file system already.
fn used_flags(mount: &Asked) -> u32 {
    let made = mount.key.is_none() && mount.target != "/";
    mount.flags | if made { mount.file_system_flags } else { 0 }
}

fn is_read_only(mount: &Asked) -> bool {
    (mount.flags | mount.file_system_flags) & READ_ONLY != 0
}

/// The mount on which something at `target` has to be.
fn above<'a>(places: &BTreeMap<&str, &'a Asked>, target: &str) -> Option<&'a Asked> {
    Path::new(target).ancestors().skip(1).find_map(|path| places.get(path.to_str()?).copied())
}

/// Whether CRIU would bind `mount` from files of `other` that are not of its making: the container's root
/// or something of the host.
fn is_source(other: &Asked, mount: &Asked) -> bool {
    let files = other.target == "/" || other.key.is_some();
    let within = other.target == "/" || Path::new(&mount.root).starts_with(&other.root);
    files && other.device == mount.device && within
}

/// An absolute path that leads where it says.
fn is_plain(path: &str) -> bool {
    path.starts_with('/') && clean(path) == path
}

/// A path without what changes nothing. One with `..` in it is none that a mount has.
fn clean(path: &str) -> String {
    let parts = Path::new(path).components().filter(|part| !matches!(part, Component::CurDir));
    let parts: Vec<_> = parts.map(|part| part.as_os_str().to_string_lossy()).collect();
    match parts.iter().any(|part| part == "..") {
        true => String::new(),
        false => parts.join("/").replacen("//", "/", 1),
    }
}
