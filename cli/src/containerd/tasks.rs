//! Tasks: the running side of containers.

use std::time::Duration;

use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    CheckpointTaskRequest, CreateTaskRequest, DeleteTaskRequest, GetRequest, KillRequest,
    ListPidsRequest, StartRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::types::v1::Status;
use prost::Message as _;
use prost_types::Any;
use serde::{Deserialize, Serialize};

use super::client::{Containerd, Destination, MAX_MESSAGE, QUICK, SLOW};
use super::error::{Doing, Error, Found, Result};
use super::{Mount, TypedBytes};

/// Type of the options that containerd itself looks into when it creates a task.
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
/// Field `criu_image_path` of [`RUNC_OPTIONS`] as a key on the wire: field 10, length-delimited.
const CRIU_IMAGE_PATH: u8 = 10 << 3 | 2;
/// Type of the options of a checkpoint.
const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";
/// How often a task is looked at that should end.
const POLL: Duration = Duration::from_millis(50);
/// How long containerd may take to clean up after a shim; it gives up after 5 s.
const CLEANUP: Duration = Duration::from_secs(8);

/// What the Task API can say of a checkpoint; field by field those of containerd.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct CheckpointOptions {
    /// End the task with it.
    #[prost(bool, tag = "1")]
    pub(crate) exit: bool,
    /// Keep TCP connections, whatever the container says.
    #[prost(bool, tag = "2")]
    pub(crate) open_tcp: bool,
    /// Unix sockets may have their other end outside.
    #[prost(bool, tag = "3")]
    pub(crate) external_unix_sockets: bool,
    /// There is a terminal.
    #[prost(bool, tag = "4")]
    pub(crate) terminal: bool,
    /// Keep file locks.
    #[prost(bool, tag = "5")]
    pub(crate) file_locks: bool,
    /// Namespaces that are restored empty.
    #[prost(string, repeated, tag = "6")]
    pub(crate) empty_namespaces: Vec<String>,
    /// How CRIU treats cgroups.
    #[prost(string, tag = "7")]
    pub(crate) cgroups_mode: String,
    /// Where the images go; if empty, containerd makes a blob of them.
    #[prost(string, tag = "8")]
    pub(crate) image_path: String,
    /// Where CRIU's log and statistics go.
    #[prost(string, tag = "9")]
    pub(crate) work_path: String,
}

impl CheckpointOptions {
    /// With the name of their type, as containerd keeps them in a checkpoint.
    pub(crate) fn to_any(&self) -> Any {
        Any { type_url: CHECKPOINT_OPTIONS.to_owned(), value: self.encode_to_vec() }
    }
}

/// What a task is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TaskStatus {
    /// Its shim gives no answer that has a meaning.
    Unknown,
    /// Not started.
    Created,
    /// Runs.
    Running,
    /// Has ended.
    Stopped,
    /// Frozen.
    Paused,
    /// About to be frozen.
    Pausing,
}

/// The running side of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Task {
    /// Pid of its init; 0 until it is started.
    pub(crate) pid: u32,
    /// What it is doing.
    pub(crate) status: TaskStatus,
    /// Its standard streams.
    pub(crate) stdio: Stdio,
    /// Exit status of its init, once it is stopped.
    pub(crate) exit_status: u32,
}

/// Where a task's standard streams lead: paths of FIFOs, or URIs of log files and log programs; empty
/// for `/dev/null`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stdio {
    /// Standard input.
    pub(crate) stdin: String,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
    /// Whether they are one terminal.
    pub(crate) terminal: bool,
}

impl Containerd {
    /// The task of container `id`, if it has one.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn task(&self, id: &str) -> Result<Option<Task>> {
        let request = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
        let answer = self.tasks().get(self.request(request, QUICK)).await;
        let answer = answer.doing(|| format!("read the task of container {id}")).found()?;
        Ok(answer.and_then(|a| a.into_inner().process).map(|p| Task {
            pid: p.pid,
            status: p.status().into(),
            exit_status: p.exit_status,
            stdio: Stdio {
                stdin: p.stdin,
                stdout: p.stdout,
                stderr: p.stderr,
                terminal: p.terminal,
            },
        }))
    }

    /// Deletes a task that is stopped or was never started; one that is not there is fine.
    ///
    /// containerd cleans up after a shim that was killed, and forgets the task when that is done. A task
    /// that is deleted meanwhile is forgotten at once, with its bundle still there for a while or for
    /// ever, and no other task can have its name: this waits until it is clean.
    ///
    /// # Errors
    /// [`Error::Call`] while it runs; with which code is up to the shim.
    pub(crate) async fn delete_task(&self, id: &str) -> Result<()> {
        let start = tokio::time::Instant::now();
        while start.elapsed() < CLEANUP && self.has_lost_its_shim(id).await {
            tokio::time::sleep(POLL).await;
        }
        let request = DeleteTaskRequest { container_id: id.to_owned() };
        let answer = self.tasks().delete(self.request(request, SLOW)).await;
        answer.doing(|| format!("delete the task of container {id}")).found().map(drop)
    }

    /// Whether containerd knows the task, and not its shim. Asked for the task itself, it denies it as soon
    /// as the shim is gone.
    async fn has_lost_its_shim(&self, id: &str) -> bool {
        let request = ListPidsRequest { container_id: id.to_owned() };
        let answer = self.tasks().list_pids(self.request(request, QUICK)).await;
        answer.is_err_and(|status| status.message().contains("ttrpc: closed"))
    }

    /// Checkpoints a task as [`CheckpointOptions`] say, which name where the images go.
    ///
    /// # Errors
    /// [`Error::Call`] with CRIU's first error.
    pub(crate) async fn checkpoint_task(
        &self,
        id: &str,
        options: &CheckpointOptions,
    ) -> Result<()> {
        let request = CheckpointTaskRequest {
            container_id: id.to_owned(),
            parent_checkpoint: String::new(),
            options: Some(options.to_any()),
        };
        let answer = self.tasks().checkpoint(self.request(request, SLOW)).await;
        answer.doing(|| format!("checkpoint container {id}")).map(drop)
    }

    /// Sends SIGKILL to every process of the task; one that is not there is fine.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn kill_task(&self, id: &str) -> Result<()> {
        let request = KillRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
            signal: libc::SIGKILL.unsigned_abs(),
            all: true,
        };
        let answer = self.tasks().kill(self.request(request, QUICK)).await;
        answer.doing(|| format!("kill the task of container {id}")).found().map(drop)
    }

    /// Kills a task, whatever it is doing, and deletes it, within `patience`. One that is not there is
    /// fine.
    ///
    /// # Errors
    /// [`Error::Call`] with what the last attempt failed with.
    pub(crate) async fn end_task(&self, id: &str, patience: Duration) -> Result<()> {
        let deadline = tokio::time::Instant::now() + patience;
        let killed = self.kill_task(id).await;
        loop {
            let Err(error) = self.delete_task(id).await else {
                return Ok(());
            };
            if tokio::time::Instant::now() >= deadline {
                // What kept it from dying says more than that it could not be deleted.
                return Err(killed.err().unwrap_or(error));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

impl Destination {
    /// Creates the task of container `id` without starting it; the shim finds `criu_image_path` as the
    /// checkpoint to restore from. `runtime_options` are those of the container's record.
    ///
    /// Gives the pid, which is 0 for a task that is to be restored.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn create_task(
        &self,
        id: &str,
        rootfs: &[Mount],
        stdio: &Stdio,
        runtime_options: Option<&TypedBytes>,
        criu_image_path: &str,
    ) -> Result<u32> {
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: rootfs.iter().cloned().map(Into::into).collect(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            checkpoint: None,
            options: Some(restore_options(runtime_options, criu_image_path)),
            runtime_path: String::new(),
        };
        let answer = self.leased.tasks().create(self.leased.request(request, SLOW)).await;
        Ok(answer.doing(|| format!("create the task of container {id}"))?.into_inner().pid)
    }

    /// Starts a task that was created.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn start_task(&self, id: &str) -> Result<u32> {
        let request = StartRequest { container_id: id.to_owned(), exec_id: String::new() };
        let answer = self.leased.tasks().start(self.leased.request(request, SLOW)).await;
        Ok(answer.doing(|| format!("start the task of container {id}"))?.into_inner().pid)
    }
}

/// The options of a container's runtime with the path of a checkpoint in them. containerd takes nothing
/// but [`RUNC_OPTIONS`] here; options of another type stay with the container's record.
///
/// A field that is appended to an encoded message replaces what it had, so nothing has to be
/// decoded, and fields that this program does not know are kept.
fn restore_options(runtime: Option<&TypedBytes>, criu_image_path: &str) -> Any {
    let name = |url: &str| url.rsplit('/').next() == Some(RUNC_OPTIONS);
    let mut value = match runtime {
        Some(options) if name(&options.type_url) => options.value.clone(),
        _ => Vec::new(),
    };
    value.push(CRIU_IMAGE_PATH);
    // Into a growing buffer nothing can fail.
    prost::encode_length_delimiter(criu_image_path.len(), &mut value).unwrap_or_default();
    value.extend_from_slice(criu_image_path.as_bytes());
    Any { type_url: RUNC_OPTIONS.to_owned(), value }
}

impl From<Status> for TaskStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::Unknown => Self::Unknown,
            Status::Created => Self::Created,
            Status::Running => Self::Running,
            Status::Stopped => Self::Stopped,
            Status::Paused => Self::Paused,
            Status::Pausing => Self::Pausing,
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct RuncOptions {
        #[prost(string, tag = "6")]
        binary_name: String,
        #[prost(bool, tag = "9")]
        systemd_cgroup: bool,
        #[prost(string, tag = "10")]
        criu_image_path: String,
    }

    #[test]
    fn the_checkpoint_is_added_to_the_options_of_the_container() {
        let own = RuncOptions {
            binary_name: "crun".into(),
            systemd_cgroup: true,
            criu_image_path: "/old".into(),
        };
        let long = format!("/run/{}", "x".repeat(300));
        for url in [RUNC_OPTIONS.to_owned(), format!("types.containerd.io/{RUNC_OPTIONS}")] {
            let bytes = TypedBytes { type_url: url, value: own.encode_to_vec() };
            let any = restore_options(Some(&bytes), &long);
            let got = RuncOptions::decode(any.value.as_slice()).unwrap();
            assert_eq!(any.type_url, RUNC_OPTIONS);
            assert_eq!(got, RuncOptions { criu_image_path: long.clone(), ..own.clone() });
        }
    }

    #[test]
    fn options_of_another_type_are_left_where_they_are() {
        let other = TypedBytes { type_url: "runtimeoptions.v1.Options".into(), value: vec![9; 9] };
        for options in [None, Some(&other)] {
            let any = restore_options(options, "/run/x");
            let got = RuncOptions::decode(any.value.as_slice()).unwrap();
            assert_eq!(got, RuncOptions { criu_image_path: "/run/x".into(), ..Default::default() });
        }
    }
}
