//! Points at which tests stop a migration to kill something. Compiled in by the feature
//! `fault-points` only.

use ferry_cli::phase::Phase;

/// `FERRY_FAULT=PHASE:FILE`: at the start of that phase, creates FILE and waits until it is gone.
#[cfg(feature = "fault-points")]
pub(crate) async fn point(phase: Phase) {
    let Ok(wanted) = std::env::var("FERRY_FAULT") else { return };
    let Some((name, file)) = wanted.split_once(':') else { return };
    // Once: a second pass over the same phase is somebody else's loss being settled.
    static STOOD: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    if name != phase.name()
        || STOOD.swap(true, std::sync::atomic::Ordering::Relaxed)
        || std::fs::write(file, phase.name()).is_err()
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
pub(crate) async fn point(_: Phase) {}
