//! containerd-shim-ferry-v2: runs containers through runc, and moves them.
//!
//! ```text
//!   containerd ── ttrpc ──> service ──> containers ──> container ──> runtime ──> runc
//!       ^                                                  │            │
//!       └────────────────── events <───────────────────────┘         reaper
//!   ferry ──────── ttrpc ──> ferry ──────────────────────────^
//! ```
//! One shim process serves one container, in the Task service that containerd knows (`service`)
//! and, on a socket of its own, in the Ferry service (`ferry`).

mod cleanup;
mod container;
mod containers;
mod error;
mod events;
mod ferry;
mod io;
mod mounts;
mod options;
mod reaper;
mod runtime;
mod service;
mod state;

use containerd_shim::api::DeleteResponse;
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::util::write_str_to_file;
use containerd_shim::{Config, ExitSignal, Flags, Shim, StartOpts};
use containers::Containers;
use events::Events;
use ferry::FerryGuard;
use log::{info, warn};
use reaper::Reaper;
use service::Service;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::signal::unix::{SignalKind, signal};

/// How long the last events may take to reach containerd.
const FLUSH: Duration = Duration::from_secs(5);

/// What one run of the binary knows.
struct FerryShim {
    id: String,
    namespace: String,
    bundle: PathBuf,
    socket: String,
    exit: Arc<ExitSignal>,
    serving: OnceLock<Serving>,
}

/// What lives while the shim serves.
struct Serving {
    events: Arc<Events>,
    _ferry: Option<FerryGuard>,
}

#[async_trait::async_trait]
impl Shim for FerryShim {
    type T = Service;

    async fn new(_runtime_id: &str, flags: &Flags, _config: &mut Config) -> Self {
        let bundle = match flags.bundle.as_str() {
            "" => std::env::current_dir().unwrap_or_default(),
            bundle => bundle.into(),
        };
        Self {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            bundle,
            socket: flags.socket.clone(),
            exit: Arc::default(),
            serving: OnceLock::new(),
        }
    }

    async fn start_shim(&mut self, opts: StartOpts) -> containerd_shim::Result<String> {
        let grouping = opts.id.clone();
        let address = containerd_shim::spawn(opts, &grouping, Vec::new()).await?;
        write_str_to_file("address", &address).await?;
        Ok(address)
    }

    async fn delete_shim(&mut self) -> containerd_shim::Result<DeleteResponse> {
        // containerd may run it in the bundle, or beside it.
        let bundle = match self.bundle.file_name() {
            Some(name) if name == self.id.as_str() => self.bundle.clone(),
            _ => self.bundle.parent().unwrap_or(Path::new("/")).join(&self.id),
        };
        let (namespace, id) = (self.namespace.clone(), self.id.clone());
        let cleanup =
            tokio::task::spawn_blocking(move || cleanup::cleanup(&namespace, &id, &bundle));
        Ok(DeleteResponse {
            pid: cleanup.await.unwrap_or_default(),
            exit_status: cleanup::KILLED,
            exited_at: service::timestamp(SystemTime::now()),
            ..Default::default()
        })
    }

    async fn wait(&mut self) {
        self.exit.wait().await;
        if let Some(serving) = self.serving.take() {
            serving.events.flush(FLUSH).await;
        }
        // Here and not by the crate: it reads the socket's name in the bundle, which containerd
        // may have removed by then.
        let path = self.socket.strip_prefix("unix://").unwrap_or(&self.socket);
        if let Err(err) = std::fs::remove_file(path)
            && err.kind() != std::io::ErrorKind::NotFound
        {
            warn!("remove the socket {path}: {err}");
        }
    }

    async fn create_task_service(&self, publisher: RemotePublisher) -> Service {
        match self.serve(&publisher.address).await {
            Ok(service) => service,
            Err(err) => {
                // There is nobody to report to but the process that started this one.
                eprintln!("{err:#}");
                std::process::exit(1);
            }
        }
    }
}

impl FerryShim {
    async fn serve(&self, containerd: &str) -> anyhow::Result<Service> {
        // Signals for containerd's process group are not for the containers.
        if let Err(err) = nix::unistd::setpgid(nix::unistd::Pid::this(), nix::unistd::Pid::this()) {
            warn!("leave containerd's process group: {err}");
        }
        exit_on_signal(self.exit.clone())?;
        let events = Arc::new(Events::start(containerd, &self.namespace));
        let reaper = Reaper::start()?;
        let exit = self.exit.clone();
        let containers = Containers::new(&self.namespace, reaper, events.clone(), exit);
        let ferry = match ferry::serve(containers.clone()).await {
            Ok(guard) => Some(guard),
            Err(err) => {
                warn!("the Ferry service is not available: {err:#}");
                None
            }
        };
        let _ = self.serving.set(Serving { events, _ferry: ferry });
        Ok(Service::new(containers))
    }
}

/// SIGTERM and SIGINT end the shim in order, as they end the Go shim.
fn exit_on_signal(exit: Arc<ExitSignal>) -> std::io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let exit = exit.clone();
        tokio::spawn(async move {
            if signals.recv().await.is_some() {
                info!("ended by signal {}", kind.as_raw_value());
                exit.signal();
            }
        });
    }
    Ok(())
}

fn main() {
    // runc has started it in CRIU's place.
    if ferry_oci::criu::wrapper::is_called() {
        eprintln!("{}", ferry_oci::criu::wrapper::run());
        std::process::exit(1);
    }
    serve();
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn serve() {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    if containerd_shim::parse(&args).is_ok_and(|flags| flags.version) {
        println!("containerd-shim-ferry-v2 {}", env!("CARGO_PKG_VERSION"));
        return;
    }
    // All children are waited for by our own reaper. It has to be said here: the crate listens for
    // SIGCHLD before it asks the shim for its configuration.
    let config = Config { no_reaper: true, ..Default::default() };
    containerd_shim::run::<FerryShim>("io.containerd.ferry.v2", Some(config)).await;
}
