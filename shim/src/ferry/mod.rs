//! The Ferry service: what a migration needs of one container on this host.
//!
//! ```text
//!   lease.rs        a caller's connection; its end rolls back
//!   service.rs      the ttrpc methods: find the container, run the move, answer
//!   moves.rs        one container's migration: phases, and which order is legal
//!   source.rs       freeze ─ dump ─ commit ─ retire, and thaw
//!   netns.rs        the lock of a network namespace given by path
//!   destination.rs  restore held ─ release, and abort
//!   ready.rs        what the machine does otherwise while a pause is near
//! ```
//! `oci/proto/ferry.proto` documents the methods and their order.

mod destination;
mod lease;
mod moves;
mod netns;
mod ready;
mod service;
mod source;

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use ferry_oci::api::ferry_ttrpc::create_ferry;
use ferry_oci::paths;
use ttrpc::r#async::Server;

use crate::containers::Containers;

/// Ends the service, and removes its socket, when dropped.
pub(crate) struct FerryGuard {
    // Behind a lock only because ttrpc's server cannot be shared between threads.
    _server: Mutex<Server>,
    socket: PathBuf,
}

impl Drop for FerryGuard {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Starts the service.
pub(crate) async fn serve(containers: Arc<Containers>) -> Result<FerryGuard> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(paths::SOCKETS)
        .with_context(|| format!("create {}", paths::SOCKETS))?;
    let socket = socket();
    // One that a shim with the same pid left behind when it was killed.
    let _ = std::fs::remove_file(&socket);
    let (hook, ended) = lease::hook();
    let moves = Arc::new(moves::Moves::default());
    lease::watch(ended, moves.clone());
    let service = Arc::new(service::FerryService { containers, moves });
    let mut server = Server::new()
        .bind(&format!("unix://{}", socket.display()))
        .with_context(|| format!("bind {}", socket.display()))?
        .set_accept_hook(hook)
        .register_service(create_ferry(service));
    // Only root may connect.
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
    server.start().await.context("start the Ferry service")?;
    Ok(FerryGuard { _server: Mutex::new(server), socket })
}

/// Names the service's socket in the bundle.
pub(crate) fn announce(bundle: &Path) -> Result<()> {
    let announcement = serde_json::json!({
        "version": ferry_oci::PROTOCOL,
        "socket": socket(),
        "shim_pid": std::process::id(),
    });
    let path = bundle.join(paths::BUNDLE_FILE);
    std::fs::write(&path, announcement.to_string())
        .with_context(|| format!("write {}", path.display()))
}

/// The service's socket of the shim `pid`.
pub(crate) fn socket_of(pid: u32) -> PathBuf {
    Path::new(paths::SOCKETS).join(format!("{pid}.sock"))
}

fn socket() -> PathBuf {
    socket_of(std::process::id())
}
