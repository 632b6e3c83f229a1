//! Threads that map, move, resize and unmap memory of their own without a pause, and count how often
//! the kernel refuses to move it.
//!
//! The kernel joins neighbouring areas of all threads to single mappings, so that these change under
//! everybody who looks at them. None of the calls may fail: each is about memory that came by one call.

use std::ffi::c_void;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{PAGE, Random, SIZE, map, number_seed, prot, remap, write};

static MOVED: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);
/// Error number of the last refusal.
static WHY: AtomicU64 = AtomicU64::new(0);

const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// Most pages of an area.
const MOST: u64 = 24;

/// Starts so many threads.
pub(super) fn start(threads: u64) {
    for thread in 0..threads {
        std::thread::spawn(move || run(Random(number_seed(thread))));
    }
}

/// How many calls have moved or resized memory, how many were refused, and the last error number.
pub(super) fn told() -> String {
    let [moved, refused, why] = [&MOVED, &REFUSED, &WHY].map(|n| n.load(Ordering::Relaxed));
    format!("{moved} {refused} {why}")
}

fn run(mut random: Random) {
    let mut areas = [(0u64, 0u64); 16];
    loop {
        let area = &mut areas[random.below(16) as usize];
        let new = 1 + random.below(MOST);
        match *area {
            (0, _) => *area = (map(0, new, prot("rw"), FLAGS).unwrap(), new),
            (at, pages) => match random.below(8) {
                0 => {
                    // SAFETY: nothing else uses the area.
                    unsafe { libc::munmap(at as *mut c_void, pages as usize * SIZE) };
                    *area = (0, 0);
                }
                1..4 => write(at + random.below(pages) * PAGE, random.next()),
                choice => {
                    let to = (choice < 6).then(|| map(0, new, prot("none"), FLAGS).unwrap());
                    let moved = remap(at, pages, new, to);
                    MOVED.fetch_add(1, Ordering::Relaxed);
                    if moved.is_none() {
                        let error = io::Error::last_os_error().raw_os_error().unwrap_or(0);
                        WHY.store(error.unsigned_abs().into(), Ordering::Relaxed);
                        REFUSED.fetch_add(1, Ordering::Relaxed);
                    }
                    // After a refusal parts of it may be gone, as of the place it was to go to.
                    *area = moved.map_or((0, 0), |at| (at, new));
                }
            },
        }
    }
}
