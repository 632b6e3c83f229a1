//! Checkpoints that end their container, and restores of them, with clients that stay connected. Through
//! a Task API client of the test's own: what `ctr` and nerdctl can say of it is less.
//!
//! Not with the reference: it restores no connection.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::by_hand::{ByHand, Shim, any};
use ferry_tests::counter::Counter;
use ferry_tests::ctr::until;
use ferry_tests::task::{V3, api};
use ferry_tests::versions::can_checkpoint;
use ferry_tests::{Host, Lab, skip, task_lab};
use serde_json::{Value, json};

const SHIM: &str = "containerd-shim-ferry-v2";
const IMAGES: &str = "/var/tmp/images";
/// Gives back what it is sent.
const ECHO: &[&str] = &["nc", "-ll", "-p", "7007", "-e", "cat"];
/// A host and a client; none where the runtime has no checkpoint.
fn lab() -> Result<Option<Lab>> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(None);
    }
    task_lab().map(Some)
}

/// A host with a shim of ours, and a client elsewhere.
struct Bed<'a> {
    host: &'a Host,
    hand: ByHand<'a>,
    client: &'a Host,
}

impl<'a> Bed<'a> {
    fn on(lab: &'a Lab) -> Result<Self> {
        let host = lab.host("a");
        Ok(Self { host, hand: ByHand::on(host)?, client: lab.client() })
    }

    /// A bundle that runs `args` in the host's network.
    fn bundle(&self, id: &str, args: &[&str], annotations: &Value) -> Result<()> {
        let bundle = self.hand.bundle(id, args)?;
        let config = self.hand.path(&bundle).join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&config)?)?;
        let namespaces = spec["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
        namespaces.retain(|namespace| namespace["type"] != "network");
        spec["annotations"] = annotations.clone();
        std::fs::write(&config, spec.to_string()).context("write the bundle")
    }

    /// A shim with a server that runs.
    fn server(&self, id: &str, annotations: &Value) -> Result<Shim> {
        let shim = self.hand.shim(SHIM, id, V3)?;
        self.bundle(id, ECHO, annotations)?;
        shim.task.call::<api::CreateTaskResponse>("Create", &self.hand.create_request(id))?;
        shim.start(id, "")?;
        self.host.wait_until("it listens", |host| {
            host.output("ss -Hltn sport = 7007").is_ok_and(|o| !o.stdout.is_empty())
        })?;
        Ok(shim)
    }

    fn connect(&self) -> Result<Counter> {
        Counter::start(self.client, self.host, 7007, "{}")
    }

    /// A checkpoint with exit, and what is left of the task removed.
    fn checkpoint(&self, shim: &Shim, id: &str) -> Result<()> {
        let request = checkpoint_request(id, &json!({ "exit": true }));
        shim.task.call_for::<api::Empty>("Checkpoint", &request, Duration::from_secs(60))?;
        ensure!(shim.wait(id, "")? == 137, "it has not been killed");
        shim.delete(id, "")?;
        Ok(())
    }

    fn restore(&self, shim: &Shim, id: &str) -> Result<()> {
        self.bundle(id, ECHO, &Value::Null)?;
        let request =
            api::CreateTaskRequest { checkpoint: IMAGES.into(), ..self.hand.create_request(id) };
        shim.task.call::<api::CreateTaskResponse>("Create", &request)?;
        shim.start(id, "").context("restore")?;
        Ok(())
    }

    fn tables(&self) -> Result<String> {
        Ok(self.host.run("nft list tables")?.stdout)
    }

    fn end(&self, shim: &Shim, id: &str) -> Result<()> {
        shim.kill(id, "", 9)?;
        shim.wait(id, "")?;
        shim.delete(id, "")?;
        shim.has_not_panicked()?;
        self.host.run(&format!("rm -rf {IMAGES}"))?;
        self.hand.clear()
    }
}

/// Options as protobuf: the fields that are used here are booleans.
fn checkpoint_request(id: &str, options: &Value) -> api::CheckpointTaskRequest {
    let numbers = [("exit", 1_u8), ("open_tcp", 2)];
    let set = numbers.iter().filter(|(name, _)| options[name] == true);
    let mut packed = any("containerd.runc.v1.CheckpointOptions", &Value::Null);
    packed.value = set.flat_map(|(_, number)| [number << 3, 1]).collect();
    api::CheckpointTaskRequest {
        id: id.into(),
        path: IMAGES.into(),
        options: Some(packed).into(),
        ..Default::default()
    }
}

#[test]
fn a_client_stays_connected_over_checkpoints_that_end_the_container() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bed = Bed::on(&lab)?;
    let mut shim = bed.server("s", &Value::Null)?;
    let mut client = bed.connect()?;
    for round in 0..3 {
        client.goes_on()?;
        bed.checkpoint(&shim, "s")?;
        let tables = bed.tables()?;
        ensure!(tables.contains("ferry_checkpoint_"), "round {round}: no lock: {tables}");
        // Long enough for what the client sends again.
        std::thread::sleep(Duration::from_secs(2));
        ensure!(!client.has_ended()?, "round {round}: it was reset: {}", client.stderr());
        bed.hand.clear_but_rules()?;
        shim = bed.hand.shim(SHIM, "s", V3)?;
        bed.restore(&shim, "s")?;
        client.goes_on().with_context(|| format!("round {round}"))?;
        ensure!(bed.tables()?.trim().is_empty(), "round {round}: {}", bed.tables()?);
        bed.host.run(&format!("rm -r {IMAGES}"))?;
    }
    client.stop()?;
    bed.end(&shim, "s")
}

#[test]
fn without_the_lock_the_client_would_be_reset() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bed = Bed::on(&lab)?;
    let shim = bed.server("s", &Value::Null)?;
    let mut client = bed.connect()?;
    bed.checkpoint(&shim, "s")?;
    bed.host.run("nft flush ruleset")?;
    until("the client is reset", || client.has_ended())?;
    ensure!(client.stderr().contains("ConnectionResetError"), "{}", client.stderr());
    bed.hand.clear()
}

#[test]
fn a_container_may_want_no_connections_kept() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bed = Bed::on(&lab)?;
    let shim = bed.server("s", &json!({ "io.ferry.open-tcp": "false" }))?;
    let mut client = bed.connect()?;
    let ask = |options: Value| {
        let request = checkpoint_request("s", &options);
        shim.task.call_for::<api::Empty>("Checkpoint", &request, Duration::from_secs(60))
    };
    let refused = ask(json!({ "exit": true })).err().context("it was dumped")?;
    ensure!(format!("{refused}").contains("Connected TCP socket"), "{refused}");
    client.goes_on().context("after a refused dump")?;
    ensure!(bed.tables()?.trim().is_empty(), "{}", bed.tables()?);
    bed.host.run(&format!("rm -rf {IMAGES}"))?;
    // Who asks for it has them.
    ask(json!({ "open_tcp": true }))?;
    client.goes_on().context("after a dump")?;
    client.stop()?;
    bed.end(&shim, "s")
}

#[test]
fn a_dump_that_fails_leaves_the_container_running_and_its_client_connected() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bed = Bed::on(&lab)?;
    let shim = bed.server("s", &Value::Null)?;
    let mut client = bed.connect()?;
    // CRIU cannot write there.
    bed.host.run(&format!("mkdir {IMAGES} {IMAGES}/core-1.img"))?;
    let request = checkpoint_request("s", &json!({ "exit": true }));
    let failed = shim.task.call_for::<api::Empty>("Checkpoint", &request, Duration::from_secs(60));
    let failed = failed.err().context("it was dumped")?;
    ensure!(format!("{failed}").contains("dump failed"), "{failed}");
    client.goes_on()?;
    ensure!(bed.tables()?.trim().is_empty(), "{}", bed.tables()?);
    client.stop()?;
    bed.end(&shim, "s")
}
