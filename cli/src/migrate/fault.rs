//! Points at which tests stop a migration to kill something. Compiled in by the feature
//! `fault-points` only.

use ferry_cli::phase::Phase;

/// The clients have been led to the destination, and the container still runs.
pub(crate) const ANNOUNCED: &str = "announced";

/// `ferry checkpoint` has the dump, and the container stands still.
pub(crate) const DUMPED: &str = "dumped";

/// `ferry restore` has started its container, whose address is silent still.
pub(crate) const RESTORED: &str = "restored";

/// The start of a phase: see [`at`].
pub(crate) async fn point(phase: Phase) {
    at(phase.name()).await;
}

/// `FERRY_FAULT=POINT:FILE`: at that point, which is the start of the phase of that name or one of
/// those named here, creates FILE and waits until it is gone.
#[cfg(feature = "fault-points")]
pub(crate) async fn at(point: &str) {
    let Ok(wanted) = std::env::var("FERRY_FAULT") else { return };
    let Some((name, file)) = wanted.split_once(':') else { return };
    // Once: a second pass over the same point is somebody else's loss being settled.
    static STOOD: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    if name != point
        || STOOD.swap(true, std::sync::atomic::Ordering::Relaxed)
        || std::fs::write(file, point).is_err()
    {
        return;
    }
    while std::path::Path::new(file).exists() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// Nothing, in a release.
#[cfg(not(feature = "fault-points"))]
#[expect(clippy::unused_async, reason = "the other build of it waits")]
pub(crate) async fn at(_: &str) {}

/// `FERRY_LIMIT_S`: a shorter limit of the freeze, seconds.
pub(crate) fn limit() -> Option<std::time::Duration> {
    #[cfg(feature = "fault-points")]
    if let Ok(seconds) = std::env::var("FERRY_LIMIT_S") {
        return seconds.parse().ok().map(std::time::Duration::from_secs);
    }
    None
}
