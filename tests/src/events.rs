//! What shims report, recorded in containerd's place and in their order.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::events::task::{
    TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM,
    TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{self, Server, TtrpcContext};
use containerd_shim_protos::{Events, create_events};

/// One event of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The end of its topic: `create`, `exec-added`, ...
    pub topic: String,
    /// The container.
    pub container: String,
    /// The exec that it is about; empty for the container's first process.
    pub exec: String,
    /// The process, where it says one.
    pub pid: u32,
    /// The exit code, where it says one.
    pub status: u32,
}

/// Receives the events of shims that are told its address. It ends when dropped.
pub struct Recorder {
    server: Option<Server>,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    events: Mutex<Vec<Event>>,
    more: Condvar,
}

impl Recorder {
    /// Listens on the socket at `path`, as this machine sees it.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn start(path: &Path) -> Result<Self> {
        let seen = Arc::new(Seen::default());
        let service = create_events(seen.clone());
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .context("listen for events")?
            .register_service(service);
        server.start().context("serve events")?;
        Ok(Self { server: Some(server), seen })
    }

    /// All events of `container` so far.
    pub fn of(&self, container: &str) -> Vec<Event> {
        let events = self.seen.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().filter(|event| event.container == container).cloned().collect()
    }

    /// The topics of `container` so far; those of an exec with its id.
    pub fn topics(&self, container: &str) -> Vec<String> {
        let name = |event: Event| match event.exec.as_str() {
            "" => event.topic,
            exec => format!("{} {exec}", event.topic),
        };
        self.of(container).into_iter().map(name).collect()
    }

    /// Waits until `done` holds for the events of `container`.
    ///
    /// # Errors
    /// With what there was when `patience` was over.
    pub fn wait_for(
        &self,
        container: &str,
        patience: Duration,
        done: impl Fn(&[Event]) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            if done(&self.of(container)) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("events of {container} in {patience:?}: {:?}", self.topics(container));
            }
            let events = self.seen.events.lock().unwrap_or_else(PoisonError::into_inner);
            let a_moment = left.min(Duration::from_millis(100));
            drop(self.seen.more.wait_timeout(events, a_moment));
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.server.take().into_iter().for_each(Server::shutdown);
    }
}

impl Events for Seen {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        if let Some(event) = decode(request.envelope()) {
            self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            self.more.notify_all();
        }
        Ok(Empty::new())
    }
}

/// The container, the exec, the process and its exit code.
type Fields = (String, String, u32, u32);

fn decode(envelope: &Envelope) -> Option<Event> {
    let topic = envelope.topic().strip_prefix("/tasks/")?.to_owned();
    let value = envelope.event().value.as_slice();
    let (container, exec, pid, status) = match topic.as_str() {
        "create" => of(value, |e: TaskCreate| (e.container_id, String::new(), e.pid, 0)),
        "start" => of(value, |e: TaskStart| (e.container_id, String::new(), e.pid, 0)),
        "delete" => of(value, |e: TaskDelete| (e.container_id, e.id, e.pid, e.exit_status)),
        "exit" => of(value, |e: TaskExit| (e.container_id, e.id, e.pid, e.exit_status)),
        "exec-added" => of(value, |e: TaskExecAdded| (e.container_id, e.exec_id, 0, 0)),
        "exec-started" => of(value, |e: TaskExecStarted| (e.container_id, e.exec_id, e.pid, 0)),
        "paused" => of(value, |e: TaskPaused| (e.container_id, String::new(), 0, 0)),
        "resumed" => of(value, |e: TaskResumed| (e.container_id, String::new(), 0, 0)),
        "oom" => of(value, |e: TaskOOM| (e.container_id, String::new(), 0, 0)),
        "checkpointed" => of(value, |e: TaskCheckpointed| (e.container_id, String::new(), 0, 0)),
        _ => None,
    }?;
    // The first process is named after its container.
    let exec = if exec == container { String::new() } else { exec };
    Some(Event { topic, container, exec, pid, status })
}

fn of<M: Message>(value: &[u8], fields: impl FnOnce(M) -> Fields) -> Option<Fields> {
    M::parse_from_bytes(value).ok().map(fields)
}

/// How often each exit code was reported, by exec.
pub fn exits(events: &[Event]) -> HashMap<&str, Vec<u32>> {
    let mut exits: HashMap<&str, Vec<u32>> = HashMap::new();
    for event in events.iter().filter(|event| event.topic == "exit") {
        exits.entry(&event.exec).or_default().push(event.status);
    }
    exits
}
