//! A caller's connection is a lease: when it ends before the commit, the shim rolls back.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::warn;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use ttrpc::r#async::TtrpcContext;
use ttrpc::security_extension::{AcceptHook, ConnectionDataExt, HookError, HookOutput};

use super::moves::Moves;

/// Key of the lease among the data of a connection.
const KEY: &str = "lease";

/// A connection, as a migration remembers it.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    alive: Arc<AtomicBool>,
}

impl Lease {
    /// The lease that a request came under.
    pub(super) fn of(context: &TtrpcContext) -> Self {
        let token = context.connection_data.get_typed::<Token>(KEY);
        token.map_or_else(Self::ended, |token| Self { alive: token.alive.clone() })
    }

    /// A lease that has ended: nothing is held under it.
    fn ended() -> Self {
        Self { alive: Arc::default() }
    }

    /// Whether the connection is still there.
    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }
}

/// Lives as long as its connection.
struct Token {
    alive: Arc<AtomicBool>,
    ended: UnboundedSender<()>,
}

impl Drop for Token {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Release);
        let _ = self.ended.send(());
    }
}

/// Gives each connection its token.
#[derive(Debug)]
pub(super) struct Hook {
    ended: UnboundedSender<()>,
}

impl AcceptHook for Hook {
    fn on_accept(&self, _: RawFd) -> Result<HookOutput, HookError> {
        let alive = Arc::new(AtomicBool::new(true));
        let token = Token { alive, ended: self.ended.clone() };
        let mut output = HookOutput { data: Default::default(), payload_transform: None };
        output.data.insert(KEY.to_owned(), Box::new(token));
        Ok(output)
    }
}

/// The hook, and word of each connection that has ended.
pub(super) fn hook() -> (Hook, UnboundedReceiver<()>) {
    let (ended, receiver) = unbounded_channel();
    (Hook { ended }, receiver)
}

/// Rolls back what was held under connections that have ended.
pub(super) fn watch(mut ended: UnboundedReceiver<()>, moves: Arc<Moves>) {
    tokio::spawn(async move {
        while ended.recv().await.is_some() {
            for (id, a_move) in moves.all() {
                // Each by itself: one may be in the middle of a dump.
                tokio::spawn(async move {
                    if let Err(error) = a_move.lease_ended().await {
                        warn!("roll back the migration of {id}: {error}");
                    }
                });
            }
        }
    });
}
