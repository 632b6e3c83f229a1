//! Every method in every state. A container is led through all of its states; in each, first all is
//! asked that leaves it there.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::by_hand::{ByHand, IDLE, Shim, exec_request};
use ferry_tests::task::api::{self, Status};
use ferry_tests::task::{Task, V2, V3};
use ferry_tests::versions::can_checkpoint;

use crate::asked::{EXEC_METHODS, METHODS, ask, short};
use crate::{Answers, SHIMS, compare};

const SIGKILL: u32 = 9;

/// Asks and writes down.
struct Asker<'a> {
    shim: &'a Shim,
    answers: Answers,
}

impl Asker<'_> {
    fn note(&mut self, method: &str, state: &str, answer: String) {
        println!("  {method}, {state}: {answer}");
        self.answers.push((format!("{method}, {state}"), answer));
    }

    /// Asks one method of a container, or of its exec.
    fn one(&mut self, method: &str, state: &str, id: &str, exec: &str) {
        let answer = ask(self.shim, method, id, exec);
        self.note(method, state, answer);
    }

    /// Asks every method that leaves container `id` as it is, and looks if it does.
    fn all(&mut self, state: &str, id: &str, leave: &[&str], status: Option<Status>) -> Result<()> {
        for method in METHODS.into_iter().filter(|method| !leave.contains(method)) {
            self.one(method, state, id, "");
        }
        match status {
            Some(status) => self.shim.wait_for_status(id, "", status),
            None => Ok(()),
        }
        .with_context(|| format!("after all was asked of a task that is {state}"))
    }

    fn all_of_exec(&mut self, state: &str, id: &str, exec: &str, leave: &[&str]) {
        for method in EXEC_METHODS.into_iter().filter(|method| !leave.contains(method)) {
            self.one(method, state, id, exec);
        }
    }
}

/// Through all states of a container.
fn tasks(hand: &ByHand<'_>, shim: &Shim, id: &str) -> Result<Answers> {
    let mut asker = Asker { shim, answers: Answers::new() };
    asker.all("unknown id", "none", &["Create", "Shutdown"], None)?;

    let create = hand.create_request(id);
    asker.note(
        "Create",
        "success",
        short(shim.task.call::<api::CreateTaskResponse>("Create", &create)),
    );
    asker.all("created", id, &["Start", "Delete"], Some(Status::CREATED))?;
    asker.one("Start", "created", id, "");
    asker.all("running", id, &["Pause"], Some(Status::RUNNING))?;
    asker.one("Pause", "running", id, "");
    asker.all("paused", id, &["Resume", "Checkpoint"], Some(Status::PAUSED))?;
    asker.one("Checkpoint", "paused", id, "");
    asker.one("Resume", "paused", id, "");
    shim.kill(id, "", SIGKILL)?;
    asker.note("Wait", "killed", format!("{:?}", shim.wait(id, "")));
    asker.all("stopped", id, &["Delete"], Some(Status::STOPPED))?;
    asker.one("Delete", "stopped", id, "");
    asker.all("deleted", id, &["Create", "Shutdown"], None)?;
    Ok(asker.answers)
}

/// Further containers: killed where they may be, and from a checkpoint.
fn more_tasks(hand: &ByHand<'_>, shim: &Shim) -> Result<Answers> {
    let mut asker = Asker { shim, answers: Answers::new() };
    hand.create(shim, "created", IDLE)?;
    asker.one("Delete", "created", "created", "");
    hand.create(shim, "killed", IDLE)?;
    asker.note("Kill", "created, KILL", short(shim.kill("killed", "", SIGKILL)));
    shim.wait_for_status("killed", "", Status::STOPPED)?;
    asker.note("Delete", "killed before its start", format!("{:?}", shim.delete("killed", "")));

    hand.create(shim, "paused", IDLE)?;
    shim.start("paused", "")?;
    let images = "/tmp/images-of-paused";
    let request = api::CheckpointTaskRequest {
        id: "paused".into(),
        path: images.into(),
        ..Default::default()
    };
    asker.note(
        "Checkpoint",
        "success",
        short(shim.task.call::<api::Empty>("Checkpoint", &request)),
    );
    ask(shim, "Pause", "paused", "");
    asker.note("Kill", "paused, KILL", short(shim.kill("paused", "", SIGKILL)));
    if !can_checkpoint()? && !is_ferry(shim) {
        // The reference leaves it to the runtime to thaw what it kills, and crun does not.
        ask(shim, "Resume", "paused", "");
    }
    shim.wait_for_status("paused", "", Status::STOPPED)?;
    asker.note("Delete", "killed while paused", format!("{:?}", shim.delete("paused", "")));

    if !can_checkpoint()? {
        return Ok(asker.answers);
    }
    for id in ["unrestored", "restored"] {
        hand.bundle(id, IDLE)?;
        let request =
            api::CreateTaskRequest { checkpoint: images.into(), ..hand.create_request(id) };
        let created = shim.task.call::<api::CreateTaskResponse>("Create", &request);
        if id == "unrestored" {
            asker.note("Create", "from a checkpoint", short(created));
            asker.all("to be restored", id, &["Start", "Delete"], Some(Status::CREATED))?;
            asker.one("Delete", "to be restored", id, "");
        } else {
            created?;
            asker.one("Start", "to be restored", id, "");
            asker.one("State", "restored", id, "");
            shim.kill(id, "", SIGKILL)?;
            asker.note("Wait", "restored and killed", format!("{:?}", shim.wait(id, "")));
            asker.one("Delete", "restored and killed", id, "");
        }
    }
    Ok(asker.answers)
}

/// Through all states of an exec.
fn execs(hand: &ByHand<'_>, shim: &Shim) -> Result<Answers> {
    let mut asker = Asker { shim, answers: Answers::new() };
    let id = "execs";
    hand.create(shim, id, IDLE)?;
    shim.start(id, "")?;
    asker.all_of_exec("unknown exec", id, "none", &["Exec"]);
    let exec = |exec: &str, args: &[&str]| {
        shim.task.call::<api::Empty>("Exec", &exec_request(id, exec, args))
    };
    asker.note("Exec", "success", short(exec("e", IDLE)));
    asker.all_of_exec("created exec", id, "e", &["Start", "Delete"]);
    asker.one("Start", "created exec", id, "e");
    asker.all_of_exec("running exec", id, "e", &[]);
    shim.wait_for_status(id, "e", Status::RUNNING)?;
    shim.kill(id, "e", SIGKILL)?;
    asker.note("Wait", "killed exec", format!("{:?}", shim.wait(id, "e")));
    asker.all_of_exec("stopped exec", id, "e", &["Delete"]);
    asker.one("Delete", "stopped exec", id, "e");
    asker.all_of_exec("deleted exec", id, "e", &["Exec"]);

    exec("f", IDLE)?;
    asker.one("Delete", "created exec", id, "f");
    asker.note("Exec", "id without a name", short(exec("", &["true"])));
    let _ = shim.kill(id, "", SIGKILL);
    asker.note("Wait", "init whose exec was started twice", short(shim.wait(id, "")));
    // Where it has not crashed.
    let _ = shim.delete(id, "");
    Ok(asker.answers)
}

/// Execs that cannot start.
fn failed_execs(hand: &ByHand<'_>, shim: &Shim) -> Result<Answers> {
    let mut asker = Asker { shim, answers: Answers::new() };
    let id = "failed";
    let exec = |exec: &str, args: &[&str]| {
        shim.task.call::<api::Empty>("Exec", &exec_request(id, exec, args))
    };
    hand.create(shim, id, IDLE)?;
    exec("early", IDLE)?;
    asker.one("Start", "exec of a created task", id, "early");
    asker.one("Start", "created task with an exec", id, "");
    exec("bad", &["/no/such/program"])?;
    asker.one("Start", "exec of no program", id, "bad");
    asker.one("State", "exec of no program", id, "bad");
    asker.one("Delete", "exec of no program", id, "bad");
    for name in ["frozen", "later"] {
        exec(name, IDLE)?;
    }
    shim.start(id, "frozen")?;
    ask(shim, "Pause", id, "");
    asker.note("State", "exec of a paused task", format!("{:?}", shim.state(id, "frozen")?.status));
    asker.one("Start", "exec of a paused task", id, "later");
    ask(shim, "Resume", id, "");
    shim.kill(id, "frozen", SIGKILL)?;
    asker.note("Wait", "exec that was frozen", format!("{:?}", shim.wait(id, "frozen")));
    shim.kill(id, "early", SIGKILL)?;
    shim.wait(id, "early")?;
    asker.note("Kill", "init after failed execs", short(shim.kill(id, "", SIGKILL)));
    let end = shim.wait_for_status(id, "", Status::STOPPED);
    asker.note(
        "State",
        "killed after failed execs",
        if end.is_ok() { "ok".into() } else { "connection lost".into() },
    );
    asker.one("Start", "exec of a stopped task", id, "later");
    asker.one("Exec", "exec of a stopped task", id, "new");
    asker.one("Delete", "exec of a stopped task", id, "frozen");
    asker.one("Delete", "stopped, with an exec", id, "");
    Ok(asker.answers)
}

/// Requests that are wrong in themselves.
fn wrong(hand: &ByHand<'_>, shim: &Shim) -> Result<Answers> {
    let mut asker = Asker { shim, answers: Answers::new() };
    let id = "wrong";
    let other =
        || Some(ferry_tests::by_hand::any("some.other.Type", &serde_json::json!({}))).into();
    hand.bundle(id, IDLE)?;
    let create = |change: &dyn Fn(&mut api::CreateTaskRequest)| {
        let mut request = hand.create_request(id);
        change(&mut request);
        short(shim.task.call::<api::CreateTaskResponse>("Create", &request))
    };
    asker.note("Create", "options of another type", create(&|r| r.options = other()));
    asker.note("Create", "bundle that is not there", create(&|r| r.bundle = "/none".into()));
    asker.note("Create", "program that is not there", {
        hand.bundle(id, &["/no/such/program"])?;
        let answer = create(&|_| {});
        hand.bundle(id, IDLE)?;
        answer
    });
    asker.note("Create", "again after a failure", create(&|_| {}));
    shim.start(id, "")?;
    asker.note("Kill", "signal 1000", short(shim.kill(id, "", 1000)));
    let mut request = api::CheckpointTaskRequest { id: id.into(), ..Default::default() };
    request.path = "/tmp/images-of-wrong".into();
    request.options = other();
    asker.note(
        "Checkpoint",
        "options of another type",
        short(shim.task.call::<api::Empty>("Checkpoint", &request)),
    );
    let nothing = api::UpdateTaskRequest { id: id.into(), ..Default::default() };
    let request = api::UpdateTaskRequest { resources: other(), ..nothing.clone() };
    asker.note(
        "Update",
        "resources of another type",
        short(shim.task.call::<api::Empty>("Update", &request)),
    );
    let payload = vec![0xff; 10];
    let limit = Duration::from_secs(10);
    asker.note("State", "no protobuf", short(shim.task.raw("State", payload, limit)));
    asker.note("Unknown", "no such method", short(shim.task.raw("Unknown", Vec::new(), limit)));
    // From here on the reference may have crashed.
    let mut request = exec_request(id, "e", &[]);
    request.spec = None.into();
    asker.note("Exec", "no process", short(shim.task.call::<api::Empty>("Exec", &request)));
    asker.one("Start", "no process", id, "e");
    let answer = short(shim.task.call::<api::Empty>("Update", &nothing));
    asker.note("Update", "no resources", answer);
    let _ = shim.kill(id, "", SIGKILL);
    let _ = shim.wait(id, "");
    let _ = shim.delete(id, "");
    Ok(asker.answers)
}

/// Its first container is called as the shim is.
fn is_ferry(shim: &Shim) -> bool {
    shim.bundle.ends_with("ferry-v2")
}

/// With no container left, Shutdown ends the shim and its socket is gone.
fn end(hand: &ByHand<'_>, shim: &Shim) -> Result<()> {
    let answer = ask(shim, "Shutdown", "", "");
    // The newest reference may be gone before it has answered.
    let gone = answer == "connection lost" && !is_ferry(shim);
    ensure!(answer == "ok" || gone, "Shutdown without a container: {answer}");
    hand.host.wait_until("the shim has ended", |h| {
        h.output(&format!("test -e /proc/{}", shim.pid)).is_ok_and(|o| !o.status.success())
    })?;
    ensure!(!shim.socket.exists(), "{} is left", shim.socket.display());
    Ok(())
}

type Part = fn(&ByHand<'_>, &Shim) -> Result<Answers>;

/// Does `part` with both shims, and compares.
pub(crate) fn both(area: &str, service: &'static str, part: Part) -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    let mut answers = [Answers::new(), Answers::new()];
    for (program, answers) in SHIMS.into_iter().zip(&mut answers) {
        println!("{program}:");
        let id = program.trim_start_matches("containerd-shim-");
        let shim = hand.shim(program, id, service)?;
        *answers = part(&hand, &shim).with_context(|| format!("{program}: {}", shim.log()))?;
        // The reference may have crashed: the answers show where.
        if program != SHIMS[0] && answers.iter().any(|(_, answer)| answer == "connection lost") {
            hand.clear()?;
            continue;
        }
        shim.has_not_panicked()?;
        end(&hand, &shim).with_context(|| format!("{program}: {}", shim.log()))?;
        hand.clear()?;
    }
    compare(area, answers)
}

#[test]
fn every_method_answers_alike_in_every_state_of_a_task() -> Result<()> {
    both("task", crate::service()?, |hand, shim| {
        let id = shim.bundle.rsplit('/').next().unwrap_or_default();
        let mut answers = tasks(hand, shim, id)?;
        answers.extend(more_tasks(hand, shim)?);
        Ok(answers)
    })
}

#[test]
fn every_method_answers_alike_in_every_state_of_an_exec() -> Result<()> {
    both("exec", crate::service()?, execs)
}

#[test]
fn execs_that_cannot_start_are_refused_alike() -> Result<()> {
    both("failed exec", crate::service()?, failed_execs)
}

#[test]
fn wrong_requests_are_refused_alike() -> Result<()> {
    both("wrong request", crate::service()?, wrong)
}

#[test]
fn the_service_answers_to_its_older_name_too() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    // Not with the reference, which has the name of its containerd alone.
    let shim = hand.shim(SHIMS[0], "t", V2)?;
    hand.create(&shim, "t", IDLE)?;
    shim.start("t", "")?;
    let newer = Task::connect(&shim.socket, V3)?;
    let request = api::StateRequest { id: "t".into(), ..Default::default() };
    let state: api::StateResponse = newer.call("State", &request)?;
    ensure!(state.status.enum_value() == Ok(Status::RUNNING), "{state}");
    shim.kill("t", "", SIGKILL)?;
    ensure!(shim.wait("t", "")? == 128 + SIGKILL);
    shim.delete("t", "")?;
    Ok(())
}
