//! What CRIU still carries in its images.

use std::collections::HashMap;
use std::iter::Sum;
use std::ops::Add;

use serde::{Deserialize, Serialize};

use super::{Area, VmFlags};

/// Memory that stays in CRIU's images and costs pause by its size. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Carried {
    /// Private anonymous memory that is locked by mlock(2).
    pub mlocked: u64,
    /// Huge pages of hugetlbfs, private and shared.
    pub hugetlb: u64,
    /// Shared anonymous memory, System V segments and memfd; what several processes map counts once.
    pub shared: u64,
    /// Pages of private file mappings that were changed.
    pub file_private: u64,
}

impl Carried {
    /// What is carried of the processes of one container, given the areas of each.
    pub fn of<'a>(processes: impl IntoIterator<Item = &'a [Area]>) -> Self {
        let mut total = Self::default();
        // Of memory that several processes share, the one that has most of it in its tables is asked.
        let mut objects: HashMap<((u32, u32), u64), Self> = HashMap::new();
        for areas in processes {
            let mut shared: HashMap<((u32, u32), u64), Self> = HashMap::new();
            for area in areas {
                let carried = of_area(area);
                if area.perms[3] == b's' {
                    let entry = shared.entry((area.dev, area.inode)).or_default();
                    *entry = *entry + carried;
                } else {
                    total = total + carried;
                }
            }
            for (key, carried) in shared {
                let most = objects.entry(key).or_default();
                if carried.total() > most.total() {
                    *most = carried;
                }
            }
        }
        total + objects.into_values().sum()
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.mlocked + self.hugetlb + self.shared + self.file_private
    }
}

fn of_area(area: &Area) -> Carried {
    let mut carried = Carried::default();
    if area.flags.any_of(VmFlags::HUGETLB) {
        carried.hugetlb = area.hugetlb;
    } else if area.perms[3] == b's' {
        if in_memory(&area.name) {
            carried.shared = area.rss + area.swap;
        }
    } else if !area.anonymous() {
        carried.file_private = area.anonymous + area.swap;
    } else if area.flags.any_of(VmFlags::LOCKED) && area.private() {
        carried.mlocked = area.rss + area.swap;
    }
    carried
}

/// Whether the file of a shared mapping is one that only processes hold.
pub(super) fn in_memory(name: &[u8]) -> bool {
    [b"/dev/zero (deleted)".as_slice(), b"/memfd:", b"/SYSV"].iter().any(|p| name.starts_with(p))
}

impl Add for Carried {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            mlocked: self.mlocked + other.mlocked,
            hugetlb: self.hugetlb + other.hugetlb,
            shared: self.shared + other.shared,
            file_private: self.file_private + other.file_private,
        }
    }
}

impl Sum for Carried {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}
