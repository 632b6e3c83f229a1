//! The order of what is done to one container.

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Two locks in one: what waits for the start of an exec, which takes as long as its log program and runc
/// want, must not be waited for by a signal. A lock alone would have it queue behind the writer.
#[derive(Default)]
pub(super) struct Ops {
    /// Held for reading while an exec is being started.
    starts: RwLock<()>,
    state: RwLock<()>,
}

impl Ops {
    /// For what changes the state: nothing else goes on meanwhile.
    pub(super) async fn write(&self) -> (RwLockWriteGuard<'_, ()>, RwLockWriteGuard<'_, ()>) {
        let starts = self.starts.write().await;
        (starts, self.state.write().await)
    }

    /// For what only needs the state to stay.
    pub(super) async fn read(&self) -> RwLockReadGuard<'_, ()> {
        self.state.read().await
    }

    /// For the start of an exec: the state stays too.
    pub(super) async fn start_exec(&self) -> RwLockReadGuard<'_, ()> {
        self.starts.read().await
    }
}
