//! Checkpoints that end their container, and restores of them, with clients that stay connected. Through
//! a Task API client of the test's own: what `ctr` and nerdctl can say of it is less.
//!
//! Not with the reference: it restores no connection.

use std::fs::File;
use std::io::Read;
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
        self.checkpoint_of(shim, id, false)
    }

    fn checkpoint_of(&self, shim: &Shim, id: &str, terminal: bool) -> Result<()> {
        let request = checkpoint_request(id, &json!({ "exit": true, "terminal": terminal }));
        shim.task.call_for::<api::Empty>("Checkpoint", &request, Duration::from_secs(60))?;
        ensure!(shim.wait(id, "")? == 137, "it has not been killed");
        shim.delete(id, "")?;
        Ok(())
    }

    fn restore(&self, shim: &Shim, id: &str) -> Result<()> {
        self.bundle(id, ECHO, &Value::Null)?;
        self.restore_as(shim, id, self.hand.create_request(id))
    }

    fn restore_as(&self, shim: &Shim, id: &str, request: api::CreateTaskRequest) -> Result<()> {
        let request = api::CreateTaskRequest { checkpoint: IMAGES.into(), ..request };
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

/// Writes numbered lines for ever.
const LINES: &[&str] =
    &["sh", "-c", "i=0; while :; do i=$((i+1)); echo line $i; usleep 10000; done"];
/// A log program: appends to a file what comes by descriptor 3, and is ready when 5 is closed.
const LOGGER: &str = "#!/bin/sh\nexec 5>&-\nexec cat <&3 >>/var/tmp/logged\n";

/// Where the output of a task goes.
enum Output {
    Fifo(String, File, Vec<u8>),
    Uri(String, &'static str),
}

impl Output {
    /// Everything so far.
    fn read(&mut self, host: &Host) -> Result<String> {
        let bytes = match self {
            Self::Uri(_, file) => {
                std::fs::read(host.root().join(file.trim_start_matches('/'))).unwrap_or_default()
            }
            Self::Fifo(_, file, all) => {
                let mut chunk = vec![0; 1 << 16];
                while let Ok(count @ 1..) = file.read(&mut chunk) {
                    all.extend_from_slice(&chunk[..count]);
                }
                all.clone()
            }
        };
        // A terminal ends lines in its own way.
        Ok(String::from_utf8(bytes)?.replace("\r\n", "\n"))
    }

    fn name(&self) -> String {
        match self {
            Self::Fifo(name, ..) | Self::Uri(name, _) => name.clone(),
        }
    }
}

/// Options as protobuf: the fields that are used here are booleans.
fn checkpoint_request(id: &str, options: &Value) -> api::CheckpointTaskRequest {
    let numbers = [("exit", 1_u8), ("open_tcp", 2), ("terminal", 4)];
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

#[test]
fn output_goes_on_in_its_place_over_three_checkpoints() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bed = Bed::on(&lab)?;
    std::fs::write(bed.host.root().join("usr/local/bin/log-lines"), LOGGER)?;
    bed.host.run("chmod +x /usr/local/bin/log-lines")?;
    for (kind, terminal) in
        [("fifo", false), ("terminal", true), ("file", false), ("program", false)]
    {
        let mut output = match kind {
            "file" => Output::Uri("file:///var/tmp/lines".into(), "/var/tmp/lines"),
            "program" => Output::Uri("binary:///usr/local/bin/log-lines".into(), "/var/tmp/logged"),
            _ => {
                let (name, file) = bed.hand.fifo(kind)?;
                Output::Fifo(name, file, Vec::new())
            }
        };
        let stdout = output.name();
        let request = || api::CreateTaskRequest {
            stdout: stdout.clone(),
            terminal,
            ..bed.hand.create_request("s")
        };
        let bundle = || -> Result<()> {
            bed.bundle("s", LINES, &Value::Null)?;
            let config = bed.hand.path("/run/by-hand/s/config.json");
            let mut spec: Value = serde_json::from_slice(&std::fs::read(&config)?)?;
            spec["process"]["terminal"] = terminal.into();
            std::fs::write(&config, spec.to_string()).context("write the bundle")
        };
        let mut shim = bed.hand.shim(SHIM, "s", V3)?;
        bundle()?;
        shim.task.call::<api::CreateTaskResponse>("Create", &request())?;
        shim.start("s", "")?;
        for round in 0..3 {
            writes_on(bed.host, &mut output).with_context(|| format!("{kind}, round {round}"))?;
            bed.checkpoint_of(&shim, "s", terminal)?;
            bed.hand.clear_but_rules()?;
            shim = bed.hand.shim(SHIM, "s", V3)?;
            bundle()?;
            bed.restore_as(&shim, "s", request())?;
            bed.host.run(&format!("rm -r {IMAGES}"))?;
        }
        writes_on(bed.host, &mut output).context(kind)?;
        let all = output.read(bed.host)?;
        let lines: Vec<_> = all.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
        for (number, line) in (1..).zip(&lines) {
            ensure!(*line == format!("line {number}\n"), "{kind}: line {number} is {line:?}");
        }
        bed.end(&shim, "s")?;
    }
    Ok(())
}

/// Waits until more lines have come.
fn writes_on(host: &Host, output: &mut Output) -> Result<()> {
    let before = output.read(host)?.lines().count();
    until("lines come", || Ok(output.read(host)?.lines().count() > before + 10))
}
