//! How much memory the processes of a container need where they go.

use std::io;

use serde::{Deserialize, Serialize};

use super::carried::in_memory;
use super::{Area, Carried, Layout};

/// Anonymous and shared memory of the processes of one container, in memory or swapped. Pages of files
/// that can be read again do not count. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// What they use together: a page that several share counts once. CRIU restores it so.
    pub once: u64,
    /// The same, but of what they share copy-on-write each has its own: a restore from the page store
    /// fills every process for itself.
    pub each: u64,
    /// What of it stays in CRIU's images in any case.
    pub carried: Carried,
}

impl Usage {
    /// Reads the memory of the processes `pids`; those that end meanwhile do not count. Takes about
    /// 12 ms for each GB that is resident.
    ///
    /// # Errors
    /// When what the kernel prints is not understood.
    pub fn read(pids: impl IntoIterator<Item = i32>) -> io::Result<Self> {
        let mut layouts = Vec::new();
        for pid in pids {
            match Layout::read(pid) {
                Ok(layout) => layouts.push(layout),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self::of(layouts.iter().map(|layout| layout.areas.as_slice())))
    }

    /// The same of areas that were read with their sizes, those of each process.
    pub fn of<'a>(processes: impl IntoIterator<Item = &'a [Area]>) -> Self {
        let processes: Vec<_> = processes.into_iter().collect();
        let mut usage = Self { carried: Carried::of(processes.iter().copied()), ..Self::default() };
        for area in processes.into_iter().flatten() {
            let share = share(area);
            usage.once += share;
            usage.each += if area.hideable() { area.rss + area.swap } else { share };
        }
        usage
    }
}

/// What falls to this process of the area's memory, as if each page were divided among those who have it.
fn share(area: &Area) -> u64 {
    let resident = match area.perms[3] {
        b's' if in_memory(&area.name) => area.pss,
        b's' => return 0,
        _ if area.anonymous() => area.pss,
        // Of a file that is mapped privately only the pages that were changed.
        _ => area.pss.min(area.anonymous),
    };
    resident + area.swap_pss
}
