//! Namespaces: which are the container's own.

use super::super::super::ImageError;
use super::super::super::decode::{bare_records, fields, records};
use super::super::process::{IDS_MAGIC, tree};
use super::super::summary::INVENTORY_MAGIC;
use super::super::{ReadError, Source, files, must};

/// Fields of a task's namespaces, and the names that a spec has for them.
const KINDS: [(u64, &str); 8] = [
    (5, "pid"),
    (6, "network"),
    (7, "ipc"),
    (8, "uts"),
    (9, "mount"),
    (10, "user"),
    (11, "cgroup"),
    (12, "time"),
];
/// Begins of the names of files that tell of a network.
const NETWORK: [&str; 10] = [
    "netns-",
    "netdev-",
    "ifaddr-",
    "route-",
    "route6-",
    "rule-",
    "iptables-",
    "ip6tables-",
    "nftables-",
    "netns-ct-",
];

/// Namespaces of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// The kinds of which it has one of its own, as a spec names them.
    pub private: Vec<&'static str>,
    /// Number of its mount namespace.
    pub mount: u32,
    /// Who is, or looks, in a namespace that is not the init's, in words.
    pub others: Vec<String>,
}

type Ids = [u32; KINDS.len()];

impl Namespaces {
    /// Whether the container has a namespace of `kind` of its own.
    pub fn is_private(&self, kind: &str) -> bool {
        self.private.contains(&kind)
    }

    pub(super) fn read(source: &mut dyn Source) -> Result<Self, ReadError> {
        let host = must(source, "inventory.img", of_inventory)?;
        let tree = must(source, "pstree.img", tree)?;
        let root = tree.iter().find(|process| process.ppid == 0).map_or(0, |process| process.pid);
        let init = must(source, &format!("ids-{root}.img"), of_ids)?;
        let differs = |a: &Ids, b: &Ids| -> Vec<&'static str> {
            let both = KINDS.iter().zip(a.iter().zip(b));
            both.filter(|(_, (a, b))| a != b).map(|(kind, _)| kind.1).collect()
        };
        let mut found = Self { private: differs(&init, &host), mount: init[4], others: Vec::new() };
        let own = format!("mountpoints-{}.img", found.mount);
        for name in source.names() {
            let Some(stem) = name.strip_suffix(".img") else { continue };
            if let Some(pid) = stem.strip_prefix("ids-") {
                let ids = must(source, &name, of_ids)?;
                for kind in differs(&ids, &init) {
                    found.others.push(format!("process {pid} in a {kind} namespace of its own"));
                }
            }
            if stem.starts_with("mountpoints-") && name != own {
                found.others.push(format!("mounts of another namespace ({name})"));
            }
            if NETWORK.iter().any(|begin| stem.starts_with(begin)) {
                found.others.push(format!("the setup of a network ({name})"));
            }
        }
        let opened = super::image(source, "files.img", files::namespaces)?.unwrap_or_default();
        if let Some(id) = opened.iter().find(|id| !init.contains(id)) {
            found.others.push(format!("an open namespace that is not its own ({id})"));
        }
        Ok(found)
    }
}

fn of_inventory(image: &[u8]) -> Result<Ids, ImageError> {
    let mut records = bare_records(image, INVENTORY_MAGIC)?;
    let record = records.next().ok_or(ImageError::Format("an empty inventory"))??;
    let mut found = None;
    for field in fields(record) {
        let field = field?;
        if field.number == 3 {
            // A second one adds to the first.
            of_message(field.message(), found.get_or_insert_default())?;
        }
    }
    found.ok_or(ImageError::Format("an inventory without CRIU's own namespaces"))
}

fn of_ids(image: &[u8]) -> Result<Ids, ImageError> {
    let mut records = records(image, IDS_MAGIC)?;
    let mut ids = Ids::default();
    of_message(records.next().ok_or(ImageError::Format("an empty ids image"))??, &mut ids)?;
    Ok(ids)
}

fn of_message(message: &[u8], ids: &mut Ids) -> Result<(), ImageError> {
    for field in fields(message) {
        let field = field?;
        if let Some(index) = KINDS.iter().position(|kind| kind.0 == field.number) {
            ids[index] = field.number32();
        }
    }
    Ok(())
}
