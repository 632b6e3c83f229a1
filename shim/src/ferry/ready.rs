//! What this machine does otherwise while a pause is near.

use ferry_oci::awake::Awake;
use ferry_oci::breakpoints::Breakpoints;
use ferry_oci::fast::Fast;
use log::warn;

/// A machine that is ready for a pause; as ever again when dropped.
#[derive(Default)]
pub(super) struct Ready {
    awake: Option<Awake>,
    breakpoints: Option<Breakpoints>,
}

impl Ready {
    /// All that takes its time: before the freeze.
    pub(super) async fn prepare(fast: &[Fast]) -> Self {
        let mut ready = Self::default();
        if fast.contains(&Fast::Breakpoints) {
            let kept = tokio::task::spawn_blocking(Breakpoints::keep_ready).await;
            ready.breakpoints = kept
                .map_err(std::io::Error::other)
                .and_then(|event| event)
                .inspect_err(|error| warn!("be ready for breakpoints: {error}"))
                .ok();
        }
        ready
    }

    /// From now on idle processors stay awake: it costs power. Where the kernel refuses, they sleep
    /// as ever.
    pub(super) fn wake(&mut self, fast: &[Fast]) {
        if fast.contains(&Fast::Awake) {
            let kept = Awake::keep();
            self.awake = kept.inspect_err(|error| warn!("keep the processors awake: {error}")).ok();
        }
    }

    /// They may sleep again.
    pub(super) fn rest(&mut self) {
        self.awake = None;
    }
}
