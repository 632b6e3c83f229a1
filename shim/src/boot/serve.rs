//! The shim itself: serves the Task service in both versions, and the Ferry service, until the last
//! container is gone and containerd asks it to end.

use super::log as shim_log;
use crate::containers::Containers;
use crate::events::Events;
use crate::ferry;
use crate::reaper::Reaper;
use crate::service::Service;
use anyhow::{Context as _, Result, ensure};
use containerd_shim::protos::shim_async::create_task;
use containerd_shim::protos::ttrpc::r#async::Server;
use containerd_shim::protos::ttrpc::r#async::transport::Listener;
use containerd_shim::{ExitSignal, Flags};
use log::{error, info, warn};
use nix::sys::prctl::set_child_subreaper;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long the last events may take to reach containerd.
const FLUSH: Duration = Duration::from_secs(5);
/// Names of the Task service. Its messages are the same in both versions.
const TASK: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// Serves until the end. Its working folder is the bundle of the group's first container.
pub(super) fn run(flags: &Flags) -> Result<()> {
    shim_log::init(flags.debug)?;
    // Nobody reads what is printed.
    prepare_and_serve(flags).inspect_err(|err| error!("the shim ends: {err:#}"))
}

fn prepare_and_serve(flags: &Flags) -> Result<()> {
    let listener = listener()?;
    let containerd = std::env::var("TTRPC_ADDRESS").context("TTRPC_ADDRESS is not set")?;
    set_child_subreaper(true).context("become the reaper of the containers")?;
    // The bundle goes before the group's last container does.
    std::env::set_current_dir("/").context("leave the bundle")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the shim's threads")?;
    let served = runtime.block_on(serve(flags, &containerd, listener));
    // A thread may still wait for something that never comes.
    runtime.shutdown_background();
    served
}

/// The socket that `start` has handed over as standard input.
fn listener() -> Result<UnixListener> {
    let stdin = std::io::stdin();
    let kind = std::fs::metadata("/proc/self/fd/0").context("look at standard input")?.file_type();
    ensure!(
        kind.is_socket(),
        "standard input is no socket: containerd starts shims, with the action start"
    );
    let socket: OwnedFd = stdin.as_fd().try_clone_to_owned().context("take the socket")?;
    let null = std::fs::File::open("/dev/null").context("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("leave standard input")?;
    Ok(UnixListener::from(socket))
}

async fn serve(flags: &Flags, containerd: &str, listener: UnixListener) -> Result<()> {
    let socket = Arc::new(Socket::of(&listener));
    let exit = Arc::new(ExitSignal::default());
    exit_on_signal(exit.clone()).context("listen for signals")?;
    // The Go shim writes its stacks then: who asks for them must not end this one. A handler stays.
    signal(SignalKind::user_defined1()).map(drop).context("listen for signals")?;
    let events = Arc::new(Events::start(containerd, &flags.namespace));
    let (its_socket, its_exit) = (socket.clone(), exit.clone());
    let end = move || {
        // Before the answer to who asks for the end: who asks for another task then must not be sent here.
        its_socket.remove();
        its_exit.signal();
    };
    let containers = Containers::new(&flags.namespace, Reaper::start()?, events.clone(), end);
    let mut server = task_server(listener, Service::new(containers.clone()))?;
    server.start().await.context("serve the Task service")?;
    let _ferry = ferry::serve(containers)
        .await
        .inspect_err(|err| warn!("the Ferry service is not available: {err:#}"));
    info!("shim {} serves {}", std::process::id(), flags.id);
    exit.wait().await;
    socket.remove();
    events.flush(FLUSH).await;
    server.shutdown().await.context("end the Task service")
}

fn task_server(listener: UnixListener, service: Service) -> Result<Server> {
    let listener = Listener::try_from(listener).context("use the socket")?;
    let service = Arc::new(service);
    Ok(TASK.into_iter().fold(Server::new().add_listener(listener), |server, name| {
        let service = create_task(service.clone());
        server.register_service(service.into_values().map(|s| (name.to_string(), s)).collect())
    }))
}

/// The socket's file, which goes when nobody serves it any more.
struct Socket {
    path: Option<PathBuf>,
    gone: AtomicBool,
}

impl Socket {
    fn of(listener: &UnixListener) -> Self {
        let address = listener.local_addr().ok();
        let path = address.and_then(|address| address.as_pathname().map(Path::to_owned));
        Self { path, gone: AtomicBool::new(false) }
    }

    /// Nobody is sent here any more. What is there of another shim by then stays.
    fn remove(&self) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(path) = &self.path
            && let Err(err) = std::fs::remove_file(path)
            && err.kind() != std::io::ErrorKind::NotFound
        {
            warn!("remove the socket {}: {err}", path.display());
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
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
