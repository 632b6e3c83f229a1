//! One request of each method, and what it is answered in short.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ferry_tests::by_hand::{Shim, any, exec_request};
use ferry_tests::task::protobuf::MessageDyn;
use ferry_tests::task::{Refusal, api};
use serde_json::json;

/// All methods, those first that change nothing.
pub(crate) const METHODS: [&str; 17] = [
    "State",
    "Pids",
    "Stats",
    "Connect",
    "Wait",
    "ResizePty",
    "CloseIO",
    "Update",
    "Create",
    "Exec",
    "Kill",
    "Pause",
    "Resume",
    "Checkpoint",
    "Start",
    "Delete",
    "Shutdown",
];
/// The methods that an exec can be named to.
pub(crate) const EXEC_METHODS: [&str; 8] =
    ["State", "Wait", "ResizePty", "CloseIO", "Exec", "Kill", "Start", "Delete"];

/// How long Wait is waited for.
const A_MOMENT: Duration = Duration::from_millis(500);
/// How long anything else may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// A signal that does nothing to a process that runs.
const SIGCONT: u32 = 18;

/// Asks `method` of container `id`, of its exec where one is named. "ok", or the code of the refusal;
/// a refusal without a text is none.
pub(crate) fn ask(shim: &Shim, method: &str, id: &str, exec: &str) -> String {
    let request = request(shim, method, id, exec);
    let limit = if method == "Wait" { A_MOMENT } else { PATIENCE };
    let payload = request.write_to_bytes_dyn().expect("encode a request");
    match shim.task.raw(method, payload, limit) {
        Err(Refusal::Nothing) if method == "Wait" => "waits".into(),
        answer => short(answer),
    }
}

/// An answer in short.
pub(crate) fn short<T>(answer: Result<T, Refusal>) -> String {
    match answer {
        Ok(_) => "ok".into(),
        Err(Refusal::Status(code, text)) if text.trim().is_empty() => {
            format!("{code:?} without text")
        }
        Err(refusal) => {
            println!("    {refusal}");
            refusal.code()
        }
    }
}

fn request(shim: &Shim, method: &str, id: &str, exec: &str) -> Box<dyn MessageDyn> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let (id, exec_id) = (id.to_owned(), exec.to_owned());
    match method {
        "State" => Box::new(api::StateRequest { id, exec_id, ..Default::default() }),
        "Pids" => Box::new(api::PidsRequest { id, ..Default::default() }),
        "Stats" => Box::new(api::StatsRequest { id, ..Default::default() }),
        "Connect" => Box::new(api::ConnectRequest { id, ..Default::default() }),
        "Wait" => Box::new(api::WaitRequest { id, exec_id, ..Default::default() }),
        "ResizePty" => {
            let (width, height) = (80, 24);
            Box::new(api::ResizePtyRequest { id, exec_id, width, height, ..Default::default() })
        }
        "CloseIO" => {
            Box::new(api::CloseIORequest { id, exec_id, stdin: true, ..Default::default() })
        }
        "Update" => {
            let limit = json!({ "pids": { "limit": 100 } });
            let kind = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
            let resources = Some(any(kind, &limit)).into();
            Box::new(api::UpdateTaskRequest { id, resources, ..Default::default() })
        }
        // Without mounts: a second one over the first is not what is asked here.
        "Create" => {
            let bundle = shim.bundle.clone();
            Box::new(api::CreateTaskRequest { id, bundle, ..Default::default() })
        }
        "Exec" if exec.is_empty() => {
            let exec = format!("asked-{}", COUNT.fetch_add(1, Ordering::Relaxed));
            Box::new(exec_request(&id, &exec, &["true"]))
        }
        "Exec" => Box::new(exec_request(&id, exec, &["true"])),
        "Kill" => Box::new(api::KillRequest { id, exec_id, signal: SIGCONT, ..Default::default() }),
        "Pause" => Box::new(api::PauseRequest { id, ..Default::default() }),
        "Resume" => Box::new(api::ResumeRequest { id, ..Default::default() }),
        "Checkpoint" => {
            let path = format!("/tmp/images-{}", COUNT.fetch_add(1, Ordering::Relaxed));
            Box::new(api::CheckpointTaskRequest { id, path, ..Default::default() })
        }
        "Start" => Box::new(api::StartRequest { id, exec_id, ..Default::default() }),
        "Delete" => Box::new(api::DeleteRequest { id, exec_id, ..Default::default() }),
        "Shutdown" => Box::new(api::ShutdownRequest { id, ..Default::default() }),
        other => panic!("{other} is no method"),
    }
}

/// A valid request of `method`, as it goes over the wire.
pub(crate) fn bytes(shim: &Shim, method: &str, id: &str, exec: &str) -> Vec<u8> {
    request(shim, method, id, exec).write_to_bytes_dyn().expect("encode a request")
}
