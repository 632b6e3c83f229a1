//! Create.

use super::{Container, Inner, read_pid};
use crate::containers::Containers;
use crate::error::{Context as _, Error, Result};
use crate::io::{ProcessIo, Setup, Stdio};
use crate::mounts;
use crate::options::TaskOptions;
use crate::reaper::Child;
use crate::runtime::Runtime;
use crate::state::Status;
use crate::strays;
use containerd_shim::protos::api::Mount;
use containerd_shim::protos::events::task::{TaskCreate, TaskIO};
use containerd_shim::protos::protobuf::MessageField;
use ferry_oci::runc::Create;
use log::warn;
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// What Create is given.
pub(crate) struct CreateRequest {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) stdio: Stdio,
    pub(crate) options: TaskOptions,
    /// Images to restore from at Start.
    pub(crate) checkpoint: Option<PathBuf>,
}

impl Container {
    /// Mounts the root file system, opens the streams and lets runc set the container up; or, from
    /// a checkpoint, prepares everything for the restore. Leaves nothing behind if it fails.
    pub(crate) async fn create(
        containers: &Arc<Containers>,
        request: CreateRequest,
    ) -> Result<Arc<Self>> {
        let shares_pids = shares_pids(&request.bundle)?;
        request.options.write(&request.bundle)?;
        let runc = request.options.runc(&containers.namespace);
        runc.find().context("OCI runtime create failed")?;
        mounts::mount(&request.rootfs, &request.bundle, &containers.reaper).await?;
        let runtime = Runtime::new(runc, containers.reaper.clone(), &request.bundle);
        let prepared = prepare(&request, &runtime, &containers.namespace).await;
        let (init, inner) = match prepared {
            Ok(prepared) => prepared,
            Err(err) => {
                undo(&request, &runtime).await;
                return Err(err);
            }
        };
        containers.events.send(created(&request, inner.pid));
        let container = Arc::new(Self {
            id: request.id,
            namespace: containers.namespace.clone(),
            bundle: request.bundle,
            stdio: request.stdio,
            options: request.options,
            runtime,
            events: containers.events.clone(),
            shares_pids,
            op: Default::default(),
            pre_dumps: Default::default(),
            stream: Default::default(),
            inner: Mutex::new(inner),
            exited: watch::Sender::new(None),
        });
        if let Some(init) = init {
            // Before it runs: it may run out of memory at once.
            container.found_init(init.pid() as u32, None);
            container.supervise(init);
        }
        Ok(container)
    }
}

async fn prepare(
    request: &CreateRequest,
    runtime: &Runtime,
    namespace: &str,
) -> Result<(Option<Child>, Inner)> {
    let owner = (request.options.io_uid, request.options.io_gid);
    let restored = request.checkpoint.is_some();
    let setup = Setup { id: &request.id, namespace, owner, restored, reaper: &runtime.reaper };
    let (mut io, child_io) = ProcessIo::open(&request.stdio, &setup).await?;
    let console_socket = io.console_socket();
    let mut inner = Inner {
        status: Status::Pending,
        pid: 0,
        io: None,
        child_io: None,
        checkpoint: request.checkpoint.clone(),
        execs: HashMap::new(),
        cgroup: None,
        oom: None,
        heard: None,
        reserved: None,
    };
    if request.checkpoint.is_some() {
        (inner.io, inner.child_io) = (Some(io), Some(child_io));
        return Ok((None, inner));
    }
    let pid_file = request.bundle.join("init.pid");
    let create = Create {
        id: &request.id,
        bundle: &request.bundle,
        pid_file: &pid_file,
        console_socket: console_socket.as_deref(),
        no_pivot: request.options.no_pivot_root,
        no_new_keyring: request.options.no_new_keyring,
    };
    let window = runtime.reaper.window();
    strays::claim_cgroups(&request.bundle)?;
    runtime.spawn(&create, child_io).await?;
    strays::give_up_claim(&request.bundle);
    io.connect_terminal().await?;
    let pid = read_pid(&pid_file)?;
    inner.status = Status::Created;
    inner.pid = pid as u32;
    inner.io = Some(io);
    Ok((Some(window.adopt(pid)), inner))
}

async fn undo(request: &CreateRequest, runtime: &Runtime) {
    if let Err(err) = runtime.delete(&request.id, true).await {
        warn!("undo create: {err}");
    }
    strays::give_up_claim(&request.bundle);
    if let Err(err) = mounts::umount_async(request.bundle.join("rootfs")).await {
        warn!("undo create: {err}");
    }
}

fn created(request: &CreateRequest, pid: u32) -> TaskCreate {
    let path = |path: &Path| path.to_string_lossy().into_owned();
    TaskCreate {
        container_id: request.id.clone(),
        bundle: path(&request.bundle),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO {
            stdin: request.stdio.stdin.clone(),
            stdout: request.stdio.stdout.clone(),
            stderr: request.stdio.stderr.clone(),
            terminal: request.stdio.terminal,
            ..Default::default()
        }),
        checkpoint: request.checkpoint.as_deref().map(path).unwrap_or_default(),
        pid,
        ..Default::default()
    }
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    linux: Linux,
}

#[derive(Deserialize, Default)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<Namespace>,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

/// Whether the container of `bundle` lives in a pid namespace that is not its own.
fn shares_pids(bundle: &Path) -> Result<bool> {
    let spec = match std::fs::read(bundle.join("config.json")) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("the bundle {} has no config.json", bundle.display());
            return Err(Error::not_found(text));
        }
        spec => spec.context("read the bundle's config")?,
    };
    let spec: Spec = serde_json::from_slice(&spec).context("read the bundle's config")?;
    let own = |namespace: &Namespace| namespace.kind == "pid" && namespace.path.is_empty();
    Ok(!spec.linux.namespaces.iter().any(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_namespace_by_path_or_none_is_shared() {
        let dir = tempfile::tempdir().unwrap();
        let of = |config: &str| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            shares_pids(dir.path()).unwrap()
        };
        assert!(!of(r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#));
        assert!(of(r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#));
        assert!(of(r#"{"linux":{"namespaces":[{"type":"network"}]}}"#));
        assert!(of("{}"));
    }
}
