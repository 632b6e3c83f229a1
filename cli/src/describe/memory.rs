//! How much memory a container needs where it goes, and what of it CRIU carries in the pause.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use ferry_oci::pages::areas::Usage;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

/// How the memory gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// All of it in CRIU's images.
    Images,
    /// Through the page store, as far as CRIU lets it.
    Store {
        /// Left out of CRIU's dump; if not, it is in the images besides.
        hidden: bool,
    },
}

/// The memory of a container. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct MemoryFacts {
    /// Of its processes.
    pub(crate) usage: Usage,
    /// Files in its own tmpfs mounts.
    pub(crate) tmpfs: u64,
    /// Those in mounts with more than CRIU is spared to pack ([`PACKED`]).
    pub(crate) tmpfs_packed: u64,
    /// Its memory limit, as it will be where it goes.
    pub(crate) limit: Option<u64>,
}

/// One kind of memory that CRIU carries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Carried {
    /// `shared`, `mlocked`, `hugetlb`, `file-private`, `tmpfs`, `private`.
    pub(crate) kind: &'static str,
    /// How much of it there is.
    pub(crate) bytes: u64,
    /// What it adds to the pause for dump and restore, roughly; the time on the wire comes on top.
    pub(crate) ms: f64,
}

/// What a MB adds to dump and restore, ms.
struct Cost {
    dump: f64,
    restore: f64,
}

impl Cost {
    fn of(&self, bytes: u64) -> f64 {
        (self.dump + self.restore) * bytes as f64 / f64::from(1 << 20)
    }
}

/// Measured on two busy CPUs with images on tmpfs, kernel 6.18, CRIU 4.2.1: the least of six moves each
/// with 16 and 272 MB, by `cargo test -p ferry-tests --test carried measure -- --ignored --nocapture`.
const PRIVATE: Cost = Cost { dump: 0.6, restore: 0.9 };
const SHARED: Cost = Cost { dump: 0.8, restore: 1.2 };
const FILE: Cost = Cost { dump: 0.6, restore: 1.5 };
/// Not measured: read, sent and written as shared memory is.
const TMPFS: Cost = SHARED;
/// By the real tar, with gzip, of what does not compress: between 8 and 56 MB.
const TMPFS_PACKED: Cost = Cost { dump: 25.0, restore: 5.5 };

/// Most bytes in a tmpfs mount that the fast tar takes as they are.
const PACKED: u64 = 8 << 20;

/// Costs below that in sum are not worth a word, ms.
const WORTH: f64 = 1.0;

impl MemoryFacts {
    /// Gathers them for the container of `spec` and its processes, of which `init` is the first.
    ///
    /// # Errors
    /// When the kernel's texts are not understood, or `init` is gone.
    pub(crate) fn gather(spec: &Spec, init: u32, pids: &[u32]) -> Result<Self> {
        let pids = pids.iter().map(|pid| pid.cast_signed());
        let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo"))
            .context("read the container's mounts")?;
        let root = format!("/proc/{init}/root");
        let files: Vec<u64> = tmpfs(&mounts).values().map(|at| used(&root, at)).collect();
        Ok(Self {
            usage: Usage::read(pids).context("read the container's memory")?,
            tmpfs: files.iter().sum(),
            tmpfs_packed: files.iter().filter(|bytes| **bytes > PACKED).sum(),
            limit: limit(spec),
        })
    }

    /// What its processes and its tmpfs mounts take when they are restored.
    pub(crate) fn restored(&self, way: Way) -> u64 {
        self.tmpfs
            + match way {
                Way::Images => self.usage.once,
                Way::Store { .. } => self.usage.each,
            }
    }

    /// What lies in CRIU's images.
    pub(crate) fn in_images(&self, way: Way) -> u64 {
        self.tmpfs
            + match way {
                Way::Images | Way::Store { hidden: false } => self.usage.once,
                Way::Store { hidden: true } => self.usage.carried.total(),
            }
    }

    /// What CRIU carries in the pause and what that costs. Nothing when it does not matter.
    pub(crate) fn carried(&self, way: Way) -> Vec<Carried> {
        let carried = &self.usage.carried;
        let private = self.usage.once.saturating_sub(carried.total());
        let (private, cost) = match way {
            Way::Images => (private, PRIVATE),
            Way::Store { hidden: false } => (private, Cost { restore: 0.0, ..PRIVATE }),
            Way::Store { hidden: true } => (0, PRIVATE),
        };
        let plain = self.tmpfs.saturating_sub(self.tmpfs_packed);
        let tmpfs = TMPFS.of(plain) + TMPFS_PACKED.of(self.tmpfs_packed);
        let all = [
            ("private", private, cost.of(private)),
            ("shared", carried.shared, SHARED.of(carried.shared)),
            ("mlocked", carried.mlocked, PRIVATE.of(carried.mlocked)),
            ("hugetlb", carried.hugetlb, PRIVATE.of(carried.hugetlb)),
            ("file-private", carried.file_private, FILE.of(carried.file_private)),
            ("tmpfs", self.tmpfs, tmpfs),
        ];
        let parts = all.into_iter().filter(|(_, bytes, _)| *bytes > 0);
        let parts: Vec<_> = parts.map(|(kind, bytes, ms)| Carried { kind, bytes, ms }).collect();
        let sum: f64 = parts.iter().map(|part| part.ms).sum();
        if sum < WORTH { Vec::new() } else { parts }
    }
}

/// For a person: `12 MiB shared (about 9 ms), 1 MiB mlocked (about 1 ms)`. What costs less than half a
/// millisecond is left out.
pub(crate) fn told(parts: &[Carried]) -> String {
    let mut parts: Vec<_> = parts.iter().filter(|part| part.ms >= WORTH / 2.0).collect();
    parts.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let tell = |part: &&Carried| {
        let mib = part.bytes.div_ceil(1 << 20);
        format!("{mib} MiB {} (about {:.0} ms)", part.kind, part.ms.max(1.0))
    };
    parts.iter().map(tell).collect::<Vec<_>>().join(", ")
}

fn limit(spec: &Spec) -> Option<u64> {
    let limit = spec.linux().as_ref()?.resources().as_ref()?.memory().as_ref()?.limit()?;
    // -1 is none, and so is 0.
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// Where tmpfs mounts of one's own are, by device: of `/proc/PID/mountinfo`, whose fourth field is the
/// part of the file system that is mounted.
fn tmpfs(mountinfo: &str) -> BTreeMap<&str, &str> {
    let mut found = BTreeMap::new();
    for line in mountinfo.lines() {
        let mut fields = line.split(' ').skip(2);
        let (Some(device), Some("/"), Some(at)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if line.split_once(" - ").is_some_and(|(_, rest)| rest.starts_with("tmpfs ")) {
            found.entry(device).or_insert(at);
        }
    }
    found
}

/// Bytes of files in the file system that is mounted at `at` below `root`.
fn used(root: &str, at: &str) -> u64 {
    let path = Path::new(root).join(at.trim_start_matches('/').replace("\\040", " "));
    nix::sys::statvfs::statvfs(&path)
        .map_or(0, |s| s.blocks().saturating_sub(s.blocks_free()) * s.fragment_size())
}

#[cfg(test)]
mod tests {
    use ferry_oci::pages::areas::Carried as Kinds;

    use super::*;

    const MB: u64 = 1 << 20;

    fn facts() -> MemoryFacts {
        let carried = Kinds { mlocked: MB, shared: 12 * MB, ..Kinds::default() };
        let usage = Usage { once: 100 * MB, each: 300 * MB, carried };
        MemoryFacts { usage, tmpfs: 5 * MB, tmpfs_packed: 0, limit: None }
    }

    #[test]
    fn what_criu_carries_is_named_by_kind_with_its_cost() {
        let hidden = facts().carried(Way::Store { hidden: true });
        let kinds: Vec<_> = hidden.iter().map(|part| (part.kind, part.bytes / MB)).collect();
        assert_eq!(kinds, [("shared", 12), ("mlocked", 1), ("tmpfs", 5)]);
        let shared = SHARED.of(12 * MB);
        assert!((hidden[0].ms - shared).abs() < 1e-9);
        assert!(told(&hidden).starts_with(&format!("12 MiB shared (about {shared:.0} ms), ")));
        let packed = MemoryFacts { tmpfs_packed: 5 * MB, ..facts() };
        assert!(packed.carried(Way::Images)[3].ms > 10.0 * hidden[2].ms);
        let all = facts().carried(Way::Images);
        assert_eq!((all[0].kind, all[0].bytes / MB), ("private", 87));
        let dumped = facts().carried(Way::Store { hidden: false });
        assert!(dumped[0].kind == "private" && dumped[0].ms < all[0].ms);
    }

    #[test]
    fn what_costs_nothing_is_not_named() {
        let mut facts = facts();
        facts.usage.carried = Kinds { shared: MB / 8, ..Kinds::default() };
        facts.tmpfs = MB / 8;
        assert_eq!(facts.carried(Way::Store { hidden: true }), []);
        assert_eq!(told(&[]), "");
    }

    #[test]
    fn memory_is_needed_for_each_only_where_it_is_not_shared_again() {
        let facts = facts();
        let store = Way::Store { hidden: true };
        assert_eq!([facts.restored(Way::Images), facts.restored(store)], [105 * MB, 305 * MB]);
        let dumped = Way::Store { hidden: false };
        assert_eq!([facts.in_images(store), facts.in_images(dumped)], [18 * MB, 105 * MB]);
    }

    #[test]
    fn only_whole_tmpfs_mounts_count_and_each_once() {
        let text = "\
21 1 0:5 / /proc rw - proc proc rw
22 1 0:40 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k
23 1 0:41 / /dev/shm rw - tmpfs shm rw
24 1 0:41 / /again rw - tmpfs shm rw
25 1 0:19 /hosts /etc/hosts rw - tmpfs tmpfs rw
";
        let found: Vec<_> = tmpfs(text).into_iter().collect();
        assert_eq!(found, [("0:40", "/dev"), ("0:41", "/dev/shm")]);
    }

    #[test]
    fn a_limit_is_a_number_above_zero() {
        let of = |limit: &str| {
            let json = format!(
                r#"{{"ociVersion":"1.0.0","linux":{{"resources":{{"memory":{{"limit":{limit}}}}}}}}}"#
            );
            limit_of(&json)
        };
        assert_eq!([of("1048576"), of("-1"), of("0")], [Some(MB), None, None]);
        assert_eq!(limit_of(r#"{"ociVersion":"1.0.0"}"#), None);
    }

    fn limit_of(json: &str) -> Option<u64> {
        limit(&serde_json::from_str(json).unwrap())
    }
}
