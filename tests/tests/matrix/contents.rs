//! What the answers hold: pids, streams, exit codes and times.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::shim::oci::ProcessDetails;
use ferry_tests::by_hand::{ByHand, IDLE, Shim, exec_request};
use ferry_tests::task::api;
use ferry_tests::task::protobuf::well_known_types::timestamp::Timestamp;
use ferry_tests::task::protobuf::{Message, MessageField};

use crate::states::both;
use crate::{Answers, SHIMS};

const SIGKILL: u32 = 9;
/// How long ago an exit of this test may be.
const RECENT: u64 = 120;
const ID: &str = "contents";
const EXEC: &str = "e";

/// A container with streams of its own, and an exec with others.
struct Subject<'a> {
    shim: &'a Shim,
    bundle: String,
    /// Standard output of both.
    stdout: [String; 2],
    pids: [u32; 2],
}

impl Subject<'_> {
    /// State's answer in words; what differs from run to run is compared with what is known.
    fn state(&self, exec: &str) -> Result<String> {
        let state = self.shim.state(ID, exec)?;
        let n = usize::from(!exec.is_empty());
        let id = if exec.is_empty() { ID } else { exec };
        Ok(format!(
            "{:?}, its id {}, its pid {}, its bundle {}, its streams {}, code {}, ended {}",
            state.status.enum_value().ok(),
            state.id == id,
            state.pid == self.pids[n],
            state.bundle == self.bundle,
            (state.stdin.as_str(), &state.stdout, &state.stderr, state.terminal)
                == ("", &self.stdout[n], &self.stdout[n], false),
            state.exit_status,
            is_recent(&state.exited_at),
        ))
    }

    /// Who the processes are.
    fn pids(&self) -> Result<String> {
        let request = api::PidsRequest { id: ID.into(), ..Default::default() };
        let answer: api::PidsResponse = self.shim.task.call("Pids", &request)?;
        let name = |process: &api::ProcessInfo| match process.info.as_ref() {
            Some(info) => {
                let details = ProcessDetails::parse_from_bytes(&info.value);
                let exec = details.map(|details| details.exec_id).unwrap_or_default();
                format!("{} {exec} {}", info.type_url, process.pid == self.pids[1])
            }
            None => format!("no details {}", process.pid == self.pids[0]),
        };
        let mut names: Vec<_> = answer.processes.iter().map(name).collect();
        names.sort_unstable();
        Ok(names.join(", "))
    }

    fn connect(&self) -> Result<String> {
        let request = api::ConnectRequest { id: ID.into(), ..Default::default() };
        let answer: api::ConnectResponse = self.shim.task.call("Connect", &request)?;
        let (shim, task) = (answer.shim_pid == self.shim.pid, answer.task_pid == self.pids[0]);
        Ok(format!("its shim {shim}, its task {task}"))
    }

    /// Kills it and removes it: what Wait, State and Delete say of its end.
    fn end(&self, exec: &str) -> Result<[String; 3]> {
        let n = usize::from(!exec.is_empty());
        self.shim.kill(ID, exec, SIGKILL)?;
        let request =
            api::WaitRequest { id: ID.into(), exec_id: exec.into(), ..Default::default() };
        let waited: api::WaitResponse = self.shim.task.call("Wait", &request)?;
        let state = self.state(exec)?;
        let same = self.shim.state(ID, exec)?.exited_at == waited.exited_at;
        let request =
            api::DeleteRequest { id: ID.into(), exec_id: exec.into(), ..Default::default() };
        let deleted: api::DeleteResponse = self.shim.task.call("Delete", &request)?;
        Ok([
            format!("code {}, recent {}", waited.exit_status, is_recent(&waited.exited_at)),
            format!("{state}, as Wait says {same}"),
            format!(
                "its pid {}, code {}, as Wait says {}",
                deleted.pid == self.pids[n],
                deleted.exit_status,
                deleted.exited_at == waited.exited_at
            ),
        ])
    }
}

fn is_recent(at: &MessageField<Timestamp>) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let at = at.as_ref().and_then(|at| u64::try_from(at.seconds).ok()).map(Duration::from_secs);
    at.is_some_and(|at| now.abs_diff(at).as_secs() < RECENT)
}

fn contents(hand: &ByHand<'_>, shim: &Shim) -> Result<Answers> {
    let fifo = |name: &str| hand.fifo(&format!("{ID}.{}.{name}", shim.pid));
    // Their other ends stay open until the end.
    let ((task, _task), (exec, _exec)) = (fifo("task")?, fifo("exec")?);
    let bundle = hand.bundle(ID, IDLE)?;
    let mut request = hand.create_request(ID);
    (request.stdout, request.stderr) = (task.clone(), task.clone());
    let created: api::CreateTaskResponse = shim.task.call("Create", &request).context("create")?;
    let mut subject = Subject { shim, bundle, stdout: [task, exec], pids: [created.pid, 0] };
    let mut answers = Answers::new();
    let mut note = |case: &str, answer: String| {
        println!("  {case}: {answer}");
        answers.push((case.to_owned(), answer));
    };
    note("State, created", subject.state("")?);
    note("Start", format!("its pid {}", shim.start(ID, "")? == created.pid));
    note("State, running", subject.state("")?);
    let mut request = exec_request(ID, EXEC, IDLE);
    (request.stdout, request.stderr) = (subject.stdout[1].clone(), subject.stdout[1].clone());
    shim.task.call::<api::Empty>("Exec", &request).context("exec")?;
    note("State, created exec", subject.state(EXEC)?);
    subject.pids[1] = shim.start(ID, EXEC)?;
    note("State, running exec", subject.state(EXEC)?);
    note("Pids", subject.pids()?);
    note("Connect", subject.connect()?);
    for (what, exec) in [("exec", EXEC), ("task", "")] {
        let [waited, state, deleted] = subject.end(exec)?;
        note(&format!("Wait, killed {what}"), waited);
        note(&format!("State, killed {what}"), state);
        note(&format!("Delete, killed {what}"), deleted);
    }
    Ok(answers)
}

#[test]
fn answers_hold_the_same() -> Result<()> {
    both("contents", crate::service()?, contents)
}

/// Waits until the shim's log has `text`.
fn until_logged(shim: &Shim, text: &str) -> Result<()> {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !shim.log().contains(text) {
        ensure!(std::time::Instant::now() < deadline, "no {text:?} in {:?}", shim.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn the_log_reaches_its_fifo_and_has_more_lines_for_debugging() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    for debug in [false, true] {
        let program = format!("{}{}", SHIMS[0], if debug { " -debug" } else { "" });
        let shim = hand.shim(&program, "logged", crate::service()?)?;
        ensure!(shim.delete("none", "").is_err(), "there is no such container");
        until_logged(&shim, "level=warn msg=\"delete none: ")?;
        // The line before it.
        let more = shim.log().contains("level=debug msg=\"delete none\"");
        ensure!(more == debug, "-debug {debug}: {}", shim.log());
        hand.clear()?;
    }
    Ok(())
}
