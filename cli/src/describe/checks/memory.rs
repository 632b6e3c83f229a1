//! Whether there is memory enough where a container is to go.

use super::{Blocker, Facts, block};
use crate::describe::container::ContainerFacts;
use crate::describe::memory::{MemoryFacts, Way};

/// Memory that is left to the destination beside the container's, bytes.
const MEMORY_MARGIN: u64 = 64 << 20;
/// Less than that is not worth to be named as the reason, bytes.
const COPIES_WORTH: u64 = 1 << 20;

/// Memory of the host, of its tmpfs for images, and of the container's own limit.
pub(super) fn check(facts: &Facts<'_>, found: &mut Vec<Blocker>) {
    let (memory, room, way) = (&facts.container.memory, facts.room, facts.way);
    let (why, or_stop) = copies(memory, way);
    let images = memory.in_images(way);
    // The images lie there until the restore is done.
    let needed = memory.restored(way) + images + MEMORY_MARGIN;
    if room.memory_available < needed {
        let what = format!(
            "the destination has {} MiB of memory available, {} MiB are needed{why}",
            room.memory_available >> 20,
            mib(needed)
        );
        block(found, "memory", what, &format!("free memory there{or_stop}"));
    }
    limit(facts.container, way, found);
    let images = images + MEMORY_MARGIN;
    if room.images_free < images {
        let what = format!(
            "/run of the destination has {} MiB free, the images need {} MiB",
            room.images_free >> 20,
            mib(images)
        );
        block(found, "images-space", what, "mount -o remount,size=... /run");
    }
}

/// The container's own limit.
pub(super) fn limit(container: &ContainerFacts, way: Way, found: &mut Vec<Blocker>) {
    let memory = &container.memory;
    if let Some(limit) = memory.limit
        && memory.restored(way) > limit
    {
        let (why, or_stop) = copies(memory, way);
        let what = format!(
            "{} needs {} MiB where it goes{why}, its memory limit is {} MiB",
            container.id,
            mib(memory.restored(way)),
            limit >> 20
        );
        block(found, "memory-limit", what, &format!("raise the limit{or_stop}"));
    }
}

/// Why it needs more than it has now, and what else helps then: what becomes several pages of one, since
/// processes that share it are filled each for itself.
fn copies(memory: &MemoryFacts, way: Way) -> (String, &'static str) {
    let copies = memory.restored(way).saturating_sub(memory.restored(Way::Images));
    if copies < COPIES_WORTH {
        return (String::new(), "");
    }
    let why = format!(
        " ({} MiB of them for pages that its processes share now and will not share then)",
        mib(copies)
    );
    (why, ", or move it with --mode stop, which keeps them shared")
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
