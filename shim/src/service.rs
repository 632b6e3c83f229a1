//! The Task service: translates requests, and lets nothing be cancelled half-way.

use crate::container::{Container, CreateRequest, ExecRequest, Snapshot};
use crate::containers::Containers;
use crate::error::{Context as _, Error, Result};
use crate::io::Stdio;
use crate::options::{self, TaskOptions};
use crate::reaper::Exit;
use crate::state::Status;
use async_trait::async_trait;
use containerd_shim::api;
use containerd_shim::protos::api::ProcessInfo;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::protos::protobuf::{EnumOrUnknown, Message, MessageField};
use containerd_shim::protos::shim::oci::ProcessDetails;
use containerd_shim::{Task, TtrpcContext, TtrpcResult};
use log::{debug, warn};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// The Task service of this shim.
pub(crate) struct Service {
    containers: Arc<Containers>,
}

impl Service {
    pub(crate) fn new(containers: Arc<Containers>) -> Self {
        Self { containers }
    }

    fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.containers.get(id)
    }
}

/// Runs `work` to its end even if the request is given up by its client: what runc has begun has
/// to be accounted for.
async fn complete<T: Send + 'static>(
    name: &'static str,
    id: &str,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> TtrpcResult<T> {
    debug!("{name} {id}");
    let result = match tokio::spawn(work).await {
        Ok(result) => result,
        Err(err) => Err(Error::internal(format!("{name} has panicked: {err}"))),
    };
    if let Err(err) = &result {
        warn!("{name} {id}: {err}");
    }
    Ok(result?)
}

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        req: api::CreateTaskRequest,
    ) -> TtrpcResult<api::CreateTaskResponse> {
        let containers = self.containers.clone();
        let id = req.id.clone();
        complete("create", &id, async move {
            let container = containers.create(create_request(req)?).await?;
            if let Err(err) = crate::ferry::announce(container.bundle()) {
                warn!("announce the Ferry service: {err:#}");
            }
            let pid = container.snapshot().pid;
            Ok(api::CreateTaskResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        req: api::StartRequest,
    ) -> TtrpcResult<api::StartResponse> {
        let container = self.get(&req.id)?;
        complete("start", &req.id, async move {
            let pid = match req.exec_id.as_str() {
                "" => container.start().await?,
                exec => container.start_exec(exec).await?,
            };
            Ok(api::StartResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        req: api::StateRequest,
    ) -> TtrpcResult<api::StateResponse> {
        let container = self.get(&req.id)?;
        let task = container.snapshot();
        let (id, snapshot, stdio) = match req.exec_id.as_str() {
            "" => (req.id, task, container.stdio().clone()),
            exec => {
                let exec = container.get_exec(exec)?;
                (exec.id().to_string(), frozen_with(exec.snapshot(), task), exec.stdio().clone())
            }
        };
        Ok(api::StateResponse {
            id,
            bundle: container.bundle().to_string_lossy().into_owned(),
            pid: snapshot.pid,
            status: EnumOrUnknown::new(wire(snapshot.status)),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: snapshot.exit.map(|exit| exit.status).unwrap_or_default(),
            exited_at: snapshot.exit.map(|exit| timestamp(exit.at)).unwrap_or_default(),
            exec_id: req.exec_id,
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, req: api::KillRequest) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        complete("kill", &req.id, async move {
            match req.exec_id.as_str() {
                "" => container.kill(req.signal, req.all).await?,
                exec => container.kill_exec(exec, req.signal).await?,
            }
            Ok(api::Empty::default())
        })
        .await
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        req: api::ExecProcessRequest,
    ) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        let id = req.id.clone();
        complete("exec", &id, async move {
            let stdio = Stdio {
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
                terminal: req.terminal,
            };
            let process = req.spec.into_option().unwrap_or_default().value;
            container.exec(ExecRequest { exec_id: req.exec_id, stdio, process }).await?;
            Ok(api::Empty::default())
        })
        .await
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        req: api::WaitRequest,
    ) -> TtrpcResult<api::WaitResponse> {
        let container = self.get(&req.id)?;
        let exit = match req.exec_id.as_str() {
            "" => container.wait().await,
            exec => container.get_exec(exec)?.wait().await,
        };
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        req: api::DeleteRequest,
    ) -> TtrpcResult<api::DeleteResponse> {
        let containers = self.containers.clone();
        let id = req.id.clone();
        complete("delete", &id, async move {
            let snapshot = match req.exec_id.as_str() {
                "" => containers.delete(&req.id).await?,
                exec => containers.get(&req.id)?.delete_exec(exec).await?,
            };
            let exit = snapshot.exit.unwrap_or_else(|| Exit::now(0));
            Ok(api::DeleteResponse {
                pid: snapshot.pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            })
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, req: api::PauseRequest) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        complete("pause", &req.id, async move {
            container.pause().await?;
            Ok(api::Empty::default())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, req: api::ResumeRequest) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        complete("resume", &req.id, async move {
            container.resume().await?;
            Ok(api::Empty::default())
        })
        .await
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        req: api::PidsRequest,
    ) -> TtrpcResult<api::PidsResponse> {
        let container = self.get(&req.id)?;
        let mut pids = container.pids().await?;
        pids.extend(container.unheard_exit());
        let execs: Vec<_> = container
            .execs()
            .iter()
            .map(|exec| (exec.snapshot().pid, exec.id().to_string()))
            .collect();
        let mut processes = Vec::with_capacity(pids.len());
        for pid in pids {
            let exec = execs.iter().find(|(exec, _)| *exec == pid);
            let info = exec.map(|(_, id)| details(id)).transpose()?;
            let info = info.map(MessageField::some).unwrap_or_default();
            processes.push(ProcessInfo { pid, info, ..Default::default() });
        }
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        req: api::CloseIORequest,
    ) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        if req.stdin {
            match req.exec_id.as_str() {
                "" => container.close_stdin(),
                exec => container.get_exec(exec)?.close_stdin(),
            }
        }
        Ok(api::Empty::default())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        req: api::CheckpointTaskRequest,
    ) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        complete("checkpoint", &req.id, async move {
            let options = options::checkpoint(req.options.as_ref())?;
            container.checkpoint_task(&req.path, options).await?;
            Ok(api::Empty::default())
        })
        .await
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        req: api::ConnectRequest,
    ) -> TtrpcResult<api::ConnectResponse> {
        // Without the task too: containerd asks when it comes back.
        let task_pid = self.get(&req.id).map(|container| container.snapshot().pid);
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: task_pid.unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        req: api::ShutdownRequest,
    ) -> TtrpcResult<api::Empty> {
        self.containers.shutdown(&req.id);
        Ok(api::Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        req: api::ResizePtyRequest,
    ) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        let (columns, rows) = (cells("width", req.width)?, cells("height", req.height)?);
        match req.exec_id.as_str() {
            "" => container.resize(columns, rows)?,
            exec => container.get_exec(exec)?.resize(columns, rows)?,
        }
        Ok(api::Empty::default())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        req: api::UpdateTaskRequest,
    ) -> TtrpcResult<api::Empty> {
        let container = self.get(&req.id)?;
        complete("update", &req.id, async move {
            container.update(req.resources.as_ref()).await?;
            Ok(api::Empty::default())
        })
        .await
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        req: api::StatsRequest,
    ) -> TtrpcResult<api::StatsResponse> {
        let stats = MessageField::some(self.get(&req.id)?.stats()?);
        Ok(api::StatsResponse { stats, ..Default::default() })
    }
}

fn create_request(req: api::CreateTaskRequest) -> Result<CreateRequest> {
    if req.id.is_empty() || req.id.contains('/') {
        return Err(Error::invalid_argument(format!("{:?} is not a container id", req.id)));
    }
    if !req.bundle.starts_with('/') {
        let text = format!("the bundle's path {:?} is not absolute", req.bundle);
        return Err(Error::invalid_argument(text));
    }
    if !req.parent_checkpoint.is_empty() {
        return Err(Error::unimplemented("a parent checkpoint is not supported"));
    }
    Ok(CreateRequest {
        options: TaskOptions::decode(req.options.as_ref())?,
        checkpoint: Some(req.checkpoint).filter(|path| !path.is_empty()).map(Into::into),
        id: req.id,
        bundle: req.bundle.into(),
        rootfs: req.rootfs,
        stdio: Stdio {
            stdin: req.stdin,
            stdout: req.stdout,
            stderr: req.stderr,
            terminal: req.terminal,
        },
    })
}

/// A terminal's size in one direction; 0 is unknown.
fn cells(what: &str, count: u32) -> Result<u16> {
    let invalid = |_| Error::invalid_argument(format!("the {what} {count} is above {}", u16::MAX));
    count.try_into().map_err(invalid)
}

fn details(exec_id: &str) -> Result<Any> {
    let details = ProcessDetails { exec_id: exec_id.to_string(), ..Default::default() };
    Ok(Any {
        type_url: "containerd.runc.v1.ProcessDetails".to_string(),
        value: details.write_to_bytes().context("encode a process's details")?,
        ..Default::default()
    })
}

/// An exec is frozen with its container.
fn frozen_with(exec: Snapshot, task: Snapshot) -> Snapshot {
    match (exec.status, task.status) {
        (Status::Running, status @ (Status::Pausing | Status::Paused)) => {
            Snapshot { status, ..exec }
        }
        _ => exec,
    }
}

fn wire(status: Status) -> api::Status {
    match status {
        Status::Created | Status::Pending | Status::Held => api::Status::CREATED,
        Status::Running => api::Status::RUNNING,
        Status::Pausing => api::Status::PAUSING,
        Status::Paused => api::Status::PAUSED,
        Status::Stopped | Status::Deleted => api::Status::STOPPED,
    }
}

/// `at` as protobuf has it.
pub(crate) fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: since.as_secs() as i64,
        nanos: since.subsec_nanos() as i32,
        ..Default::default()
    })
}
