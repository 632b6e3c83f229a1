//! The order of events.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use ferry_tests::by_hand::{ByHand, IDLE, Shim, exec_request};
use ferry_tests::task::api;
use ferry_tests::versions::can_checkpoint;

use crate::{Answers, SHIMS, compare};

const SIGKILL: u32 = 9;
const SOON: Duration = Duration::from_secs(30);
/// How often what may race is done.
const TIMES: u32 = 20;

/// One shim, and the containers it had.
struct Stage<'a> {
    hand: &'a ByHand<'a>,
    shim: &'a Shim,
}

impl Stage<'_> {
    /// Runs `args`, does something with it, then ends and removes it; the order of its events.
    fn run(&self, id: &str, args: &[&str], then: impl Fn(&str) -> Result<()>) -> Result<String> {
        self.hand.create(self.shim, id, args)?;
        self.shim.start(id, "")?;
        then(id)?;
        // It may have ended by itself.
        let _ = self.shim.kill(id, "", SIGKILL);
        self.shim.wait(id, "")?;
        self.shim.delete(id, "")?;
        self.order(id)
    }

    /// The events of `id`, once the last of them is there.
    fn order(&self, id: &str) -> Result<String> {
        let deleted = |events: &[ferry_tests::events::Event]| {
            events.iter().any(|event| event.topic == "delete")
        };
        self.hand.events.wait_for(id, SOON, deleted)?;
        Ok(self.hand.events.topics(id).join(" "))
    }

    fn exec(&self, id: &str, exec: &str, args: &[&str]) -> Result<()> {
        self.shim.task.call::<api::Empty>("Exec", &exec_request(id, exec, args))?;
        self.shim.start(id, exec)?;
        Ok(())
    }

    fn call(
        &self,
        method: &str,
        request: &dyn ferry_tests::task::protobuf::MessageDyn,
    ) -> Result<()> {
        self.shim.task.call::<api::Empty>(method, request).map(drop).context(method.to_owned())
    }
}

fn killed(stage: &Stage<'_>) -> Result<String> {
    stage.run("killed", IDLE, |_| Ok(()))
}

/// It may end before its start is answered.
fn short(stage: &Stage<'_>) -> Result<String> {
    let run = |n: u32| stage.run(&format!("short-{n}"), &["true"], |_| Ok(()));
    let orders: BTreeSet<String> = (0..TIMES).map(run).collect::<Result<_>>()?;
    Ok(Vec::from_iter(orders).join(" or "))
}

fn exec(stage: &Stage<'_>) -> Result<String> {
    stage.run("exec", IDLE, |id| {
        stage.exec(id, "e", IDLE)?;
        stage.shim.kill(id, "e", SIGKILL)?;
        stage.shim.wait(id, "e")?;
        stage.shim.delete(id, "e").map(drop).context("delete the exec")
    })
}

fn short_execs(stage: &Stage<'_>) -> Result<String> {
    let run = |n: u32| {
        stage.run(&format!("short-exec-{n}"), IDLE, |id| {
            stage.exec(id, "e", &["true"])?;
            stage.shim.wait(id, "e").map(drop).context("wait for the exec")
        })
    };
    let orders: BTreeSet<String> = (0..TIMES / 4).map(run).collect::<Result<_>>()?;
    Ok(Vec::from_iter(orders).join(" or "))
}

/// The end of the task is the last one.
fn killed_with_execs(stage: &Stage<'_>) -> Result<String> {
    stage.run("with-exec", IDLE, |id| stage.exec(id, "e", IDLE))
}

fn paused(stage: &Stage<'_>) -> Result<String> {
    stage.run("paused", IDLE, |id| {
        stage.call("Pause", &api::PauseRequest { id: id.into(), ..Default::default() })?;
        stage.call("Resume", &api::ResumeRequest { id: id.into(), ..Default::default() })
    })
}

fn checkpointed(stage: &Stage<'_>) -> Result<String> {
    stage.run("checkpointed", IDLE, |id| {
        let path = "/tmp/images-of-events".into();
        let request = api::CheckpointTaskRequest { id: id.into(), path, ..Default::default() };
        stage.call("Checkpoint", &request)
    })
}

fn restored(stage: &Stage<'_>) -> Result<String> {
    let id = "restored";
    stage.hand.bundle(id, IDLE)?;
    let checkpoint = "/tmp/images-of-events".into();
    let request = api::CreateTaskRequest { checkpoint, ..stage.hand.create_request(id) };
    stage.shim.task.call::<api::CreateTaskResponse>("Create", &request)?;
    stage.shim.start(id, "")?;
    stage.shim.kill(id, "", SIGKILL)?;
    stage.shim.wait(id, "")?;
    stage.shim.delete(id, "")?;
    stage.order(id)
}

fn never_started(stage: &Stage<'_>) -> Result<String> {
    stage.hand.create(stage.shim, "created", IDLE)?;
    stage.shim.delete("created", "")?;
    // What comes after the delete counts too.
    std::thread::sleep(Duration::from_millis(500));
    stage.order("created")
}

/// Somebody is in its root for longer than an unmount is tried: the task stays, with its exit code, and is
/// removed, once, by whoever asks again.
fn busy(stage: &Stage<'_>) -> Result<String> {
    let id = "busy";
    stage.hand.create(stage.shim, id, &["sh", "-c", "exit 7"])?;
    stage.shim.start(id, "")?;
    stage.shim.wait(id, "")?;
    let inside = format!("cd /run/by-hand/{id}/rootfs && echo inside && exec sleep 1000");
    let mut inside = stage.hand.host.spawn(&inside)?;
    inside.wait_for("inside", SOON)?;
    let refused = stage.shim.delete(id, "").is_err();
    let state = stage.shim.state(id, "")?;
    let kept = state.status.enum_value() == Ok(api::Status::STOPPED) && state.exit_status == 7;
    inside.stop()?;
    let code = stage.shim.delete(id, "")?;
    let order = stage.order(id)?;
    Ok(format!("{order}, refused {refused}, kept {kept}, exit code {code}"))
}

/// Its place among the others is not fixed: the kernel tells of it, and of the exit, on its own.
fn out_of_memory(stage: &Stage<'_>) -> Result<String> {
    let id = "oom";
    let bundle = stage.hand.bundle(id, &["sh", "-c", "sleep 0.3; exec tail /dev/zero"])?;
    let config = stage.hand.path(&bundle).join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&config)?)?;
    spec["linux"]["resources"]["memory"]["limit"] = (32 << 20).into();
    std::fs::write(&config, spec.to_string())?;
    let request = stage.hand.create_request(id);
    stage.shim.task.call::<api::CreateTaskResponse>("Create", &request)?;
    stage.shim.start(id, "")?;
    stage.shim.wait(id, "")?;
    let heard = |events: &[ferry_tests::events::Event]| events.iter().any(|e| e.topic == "oom");
    let heard = stage.hand.events.wait_for(id, Duration::from_secs(5), heard).is_ok();
    stage.shim.delete(id, "")?;
    let rest: Vec<_> =
        stage.order(id)?.split(' ').filter(|t| *t != "oom").map(str::to_owned).collect();
    Ok(format!("{}, {}", rest.join(" "), if heard { "and oom" } else { "no oom" }))
}

type Order = (&'static str, fn(&Stage<'_>) -> Result<String>);

const ORDERS: [Order; 11] = [
    ("killed", killed),
    ("ends at once", short),
    ("exec killed", exec),
    ("exec ends at once", short_execs),
    ("killed with an exec", killed_with_execs),
    ("paused and resumed", paused),
    ("checkpointed", checkpointed),
    ("restored", restored),
    ("deleted before its start", never_started),
    ("deleted while its root is busy", busy),
    ("out of memory", out_of_memory),
];

#[test]
fn events_come_in_the_same_order() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let mut both = [Answers::new(), Answers::new()];
    for (program, of) in SHIMS.into_iter().zip(&mut both) {
        println!("{program}:");
        // Events are told apart by container: a recorder for each shim.
        let hand = ByHand::on(lab.host("a"))?;
        let shim = hand.shim(program, "shim", crate::service()?)?;
        let stage = Stage { hand: &hand, shim: &shim };
        for (case, run) in ORDERS {
            if !can_checkpoint()? && ["checkpointed", "restored"].contains(&case) {
                continue;
            }
            let order = run(&stage).unwrap_or_else(|err| format!("{err:#}"));
            println!("  {case}: {order}");
            of.push((case.to_owned(), order));
        }
        shim.has_not_panicked()?;
        hand.clear()?;
        hand.host.run("rm /run/by-hand/events.sock")?;
    }
    compare("order of events", both)
}
