//! When to end: at SIGTERM or SIGINT, or at the end of the input.

use std::io::Read;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static STOP: AtomicBool = AtomicBool::new(false);

/// Whether it is time to end.
pub(crate) fn now() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// For how long it has been time to end, counted from the first call after the request.
pub(crate) fn since() -> Option<Duration> {
    static SEEN: OnceLock<Instant> = OnceLock::new();
    now().then(|| SEEN.get_or_init(Instant::now).elapsed())
}

/// Ends when the input does.
pub(crate) fn at_end_of_input() {
    std::thread::spawn(|| {
        let mut buffer = [0; 256];
        while let Ok(1..) = std::io::stdin().read(&mut buffer) {}
        request();
    });
}

/// Makes it time to end.
pub(crate) fn request() {
    STOP.store(true, Ordering::Relaxed);
}

/// Ends at SIGTERM and SIGINT. Process 1 of a container gets neither without this.
#[expect(unsafe_code, reason = "std has no signals, and nothing but std is linked here")]
pub(crate) fn at_signal() {
    unsafe extern "C" {
        fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    }
    extern "C" fn handler(_: i32) {
        request();
    }
    const SIGINT: i32 = 2;
    const SIGTERM: i32 = 15;
    for number in [SIGINT, SIGTERM] {
        // SAFETY: the handler stores to an atomic, which is safe at any time.
        unsafe { signal(number, handler) };
    }
}
