//! A container with an item in it, through a shim that the test starts and asks.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::by_hand::{ByHand, Shim, any, exec_request};
use ferry_tests::task::{V3, api};
use serde_json::Value;

use crate::bed::PLACE;
use crate::item::Item;
use crate::spec;

/// How long something may take that happens by itself.
const SOON: Duration = Duration::from_secs(40);

/// A container that runs.
pub(crate) struct Container {
    pub(crate) hand: &'static ByHand<'static>,
    pub(crate) item: Item,
    pub(crate) id: String,
    program: &'static str,
    shim: Shim,
    /// Its first process, as the host sees it.
    pid: u32,
    /// The other ends of its terminal's streams.
    terminal: Option<[File; 2]>,
}

/// A container whose checkpoint has ended it.
pub(crate) struct Gone {
    pub(crate) hand: &'static ByHand<'static>,
    pub(crate) item: Item,
    pub(crate) id: String,
    pub(crate) program: &'static str,
}

/// The folder of a container's images.
pub(crate) fn images(id: &str) -> String {
    format!("/var/tmp/images-{id}")
}

impl Container {
    /// Starts one with a shim of `program`, and waits until its item is set up and its controls went
    /// as they must.
    pub(crate) fn start(
        hand: &'static ByHand<'static>,
        item: Item,
        id: &str,
        program: &'static str,
    ) -> Result<Self> {
        let container =
            Self::make(hand, item, id, program, "").with_context(|| format!("start {id}"))?;
        let ready = container.hear("ready")?;
        let mut lines = ready.lines();
        let nothing = lines.next().unwrap_or_default();
        ensure!(nothing == "nothing ok", "before any checkpoint: {ready}");
        let change = lines.next().unwrap_or_default();
        ensure!(change.starts_with("change wrong: "), "a change goes unnoticed: {ready}");
        Ok(container)
    }

    fn make(
        hand: &'static ByHand<'static>,
        item: Item,
        id: &str,
        program: &'static str,
        checkpoint: &str,
    ) -> Result<Self> {
        let place = format!("{PLACE}/{id}");
        hand.host.run(&format!(
            "mkdir -p {place}/upper/ctl {place}/bind; rm -rf {place}/work; mkdir {place}/work; \
             chmod 777 {place}/upper/ctl"
        ))?;
        let shim = hand.shim(program, id, V3)?;
        spec::write(hand, id, item)?;
        let root = api::Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("lowerdir={PLACE}/lower"),
                format!("upperdir={place}/upper"),
                format!("workdir={place}/work"),
            ],
            ..Default::default()
        };
        let mut request = api::CreateTaskRequest {
            rootfs: vec![root],
            checkpoint: checkpoint.into(),
            ..hand.create_request(id)
        };
        let mut terminal = None;
        if item.terminal {
            let hosts = if checkpoint.is_empty() { "first" } else { "restored" };
            let (stdin, input) = hand.fifo(&format!("{id}-{hosts}-in"))?;
            let (stdout, output) = hand.fifo(&format!("{id}-{hosts}-out"))?;
            request = api::CreateTaskRequest { stdin, stdout, terminal: true, ..request };
            terminal = Some([input, output]);
        }
        shim.task.call::<api::CreateTaskResponse>("Create", &request).context("create")?;
        let pid = shim.start(id, "").context("start")?;
        Ok(Self { hand, item, id: id.into(), program, shim, pid, terminal })
    }

    /// A checkpoint that ends it; nothing of its shim is left.
    pub(crate) fn checkpoint(self) -> Result<Gone> {
        let (id, shim) = (&self.id, &self.shim);
        let mut options = any("containerd.runc.v1.CheckpointOptions", &Value::Null);
        let (exit, open_tcp, terminal, file_locks) = (1_u8, 2, 4, 5);
        let mut asked = vec![exit, open_tcp];
        asked.extend(self.item.locks.then_some(file_locks));
        asked.extend(self.item.terminal.then_some(terminal));
        // All of them are booleans.
        options.value = asked.iter().flat_map(|number| [number << 3, 1]).collect();
        let request = api::CheckpointTaskRequest {
            id: id.clone(),
            path: images(id),
            options: Some(options).into(),
            ..Default::default()
        };
        let limit = Duration::from_secs(60);
        shim.task.call_for::<api::Empty>("Checkpoint", &request, limit).context("checkpoint")?;
        let code = shim.wait(id, "")?;
        ensure!(code == 137, "its exit code is {code}");
        shim.delete(id, "")?;
        let request = api::ShutdownRequest { id: id.clone(), ..Default::default() };
        // It may be gone before it answers.
        let _ = shim.task.call_for::<api::Empty>("Shutdown", &request, Duration::from_secs(5));
        let process = self.hand.path(&format!("/proc/{}", shim.pid));
        self.hand.host.wait_until("its shim has ended", |_| !process.exists())?;
        shim.has_not_panicked()?;
        self.hand.host.run(&format!("umount -q {0}/rootfs; rm -r {0}", shim.bundle))?;
        let Self { hand, item, id, program, .. } = self;
        Ok(Gone { hand, item, id, program })
    }

    /// Has the item look at itself.
    pub(crate) fn look(&mut self) -> Result<()> {
        if self.item.exec {
            self.exec_now().context("a process in the container")?;
        }
        let ask = self.word("ask");
        fs::write(&ask, "").with_context(|| format!("ask by {}", ask.display()))?;
        if let Some([input, output]) = &mut self.terminal {
            input.write_all(b"typed\n").context("type")?;
            survived(output).context("read from the terminal")?;
        }
        let answer = self.hear("answer")?;
        ensure!(answer == "ok", "{answer}");
        Ok(())
    }

    /// Ends and removes it.
    pub(crate) fn end(self) -> Result<()> {
        self.shim.kill(&self.id, "", 9)?;
        self.shim.wait(&self.id, "")?;
        self.shim.delete(&self.id, "")?;
        self.shim.has_not_panicked()
    }

    /// Runs a process in the container that writes what its clocks say.
    fn exec_now(&self) -> Result<()> {
        let request = exec_request(&self.id, "now", &["/ferry-survive", "now", "/ctl/now"]);
        self.shim.task.call::<api::Empty>("Exec", &request)?;
        self.shim.start(&self.id, "now")?;
        let code = self.shim.wait(&self.id, "now")?;
        self.shim.delete(&self.id, "now")?;
        ensure!(code == 0, "its exit code is {code}");
        Ok(())
    }

    /// A file by which the item is spoken to, as this machine sees it.
    fn word(&self, name: &str) -> PathBuf {
        self.hand.path(&format!("/proc/{}/root/ctl/{name}", self.pid))
    }

    fn hear(&self, name: &str) -> Result<String> {
        let (path, deadline) = (self.word(name), Instant::now() + SOON);
        loop {
            if let Ok(text) = fs::read_to_string(&path) {
                fs::remove_file(&path).context("take its answer away")?;
                return Ok(text);
            }
            let status = self.shim.state(&self.id, "")?.status.enum_value();
            if status != Ok(api::Status::RUNNING) || Instant::now() > deadline {
                bail!("{}: no {name}; it is {status:?}", self.id);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Gone {
    /// Create with the checkpoint, and start.
    pub(crate) fn restore(self) -> Result<Container> {
        let Self { hand, item, id, program } = self;
        let images = images(&id);
        let container = Container::make(hand, item, &id, program, &images).context("restore")?;
        hand.host.run(&format!("rm -r {images}"))?;
        Ok(container)
    }
}

/// Waits until the item has written to its terminal.
pub(crate) fn survived(output: &mut File) -> Result<()> {
    let (mut seen, deadline) = (Vec::new(), Instant::now() + SOON);
    let mut bytes = [0; 256];
    while !String::from_utf8_lossy(&seen).contains("survived") {
        // It does not block, and says so when there is nothing.
        match output.read(&mut bytes) {
            Ok(length) => seen.extend(&bytes[..length]),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(_) => bail!("it says {:?}", String::from_utf8_lossy(&seen)),
        }
    }
    Ok(())
}
