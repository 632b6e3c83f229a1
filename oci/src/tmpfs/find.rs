//! Which file systems can be carried.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use super::{Tmpfs, is_known};

/// The most that are carried.
const MOST: usize = 32;

/// A mount, of `/proc/PID/mountinfo`.
struct Mount<'a> {
    device: &'a str,
    root: &'a str,
    at: &'a str,
    /// It shares what is mounted below it with others, or takes it from them.
    shares: bool,
    kind: &'a str,
    source: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (fields, rest) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(2);
        let (device, root, at) = (fields.next()?, fields.next()?, fields.next()?);
        let shares = fields.nth(1).is_some();
        let mut rest = rest.split(' ');
        let (kind, source, options) = (rest.next()?, rest.next()?, rest.next()?);
        Some(Self { device, root, at, shares, kind, source, options })
    }

    fn is_usual(&self) -> bool {
        self.kind == "tmpfs"
            && self.root == "/"
            && self.at != "/"
            && is_plain(self.at)
            && is_plain(self.source)
            && self.options.split(',').all(is_known)
    }
}

/// File systems in memory that a container has to itself and that are nothing special: with usual
/// options, not shared, none of the host's. `init` is its first process, `all` are all of them: none in
/// a user namespace, or where one has other mounts. Their checksums are empty yet.
///
/// One that is mounted several times is listed with the first mount of the whole: CRIU makes the others
/// from it.
///
/// # Errors
/// When a process cannot be looked at.
pub fn find(init: i32, all: &[i32]) -> io::Result<Vec<Tmpfs>> {
    let link = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}"));
    let init = init.to_string();
    if link(&init, "user")? != link("self", "user")? {
        return Ok(Vec::new());
    }
    let mounts = link(&init, "mnt")?;
    // One that has ended has none.
    if all.iter().any(|pid| link(&pid.to_string(), "mnt").is_ok_and(|other| other != mounts)) {
        return Ok(Vec::new());
    }
    let mounts = |pid: &str| fs::read_to_string(format!("/proc/{pid}/mountinfo"));
    Ok(among(&mounts(&init)?, &mounts("self")?))
}

pub(super) fn among(mountinfo: &str, hosts: &str) -> Vec<Tmpfs> {
    let parse = |text| str::lines(text).filter_map(Mount::parse).collect::<Vec<_>>();
    let (mounts, hosts) = (parse(mountinfo), parse(hosts));
    // One over the other: a path leads to the upper one alone.
    let lone = |mount: &Mount<'_>| mounts.iter().filter(|m| m.at == mount.at).count() == 1;
    let mut devices: BTreeSet<_> = hosts.iter().map(|mount| mount.device).collect();
    devices.extend(mounts.iter().filter(|m| m.shares || !lone(m)).map(|mount| mount.device));
    let mut carried = Vec::new();
    for mount in mounts.iter().filter(|mount| mount.is_usual()) {
        // Each once.
        if carried.len() < MOST && devices.insert(mount.device) {
            carried.push(Tmpfs {
                at: mount.at.to_owned(),
                source: mount.source.to_owned(),
                options: mount.options.to_owned(),
                checksum: String::new(),
            });
        }
    }
    carried
}

/// A word in CRIU's configuration file and between its brackets.
fn is_plain(path: &str) -> bool {
    path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b))
}
