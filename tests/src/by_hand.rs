//! Shims that a test starts itself and asks in containerd's place: every state can be reached and
//! every answer seen, with nothing in between.

use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::{self, Message as _, well_known_types::any::Any};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::events::Recorder;
use crate::task::{self, Refusal, Task, api};
use crate::versions::{Containerd, chosen};
use crate::{Host, Job};

/// Folder of the bundles on the host. Not containerd's: it would take them for its own.
const BUNDLES: &str = "/run/by-hand";
/// The containers' root file system. It has to lie on a real disk for CRIU.
const ROOTFS: &str = "/var/lib/containerd/by-hand";
/// containerd's socket.
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// The containerd namespace that the shims are told.
const NAMESPACE: &str = "by-hand";
/// What runc calls the namespace's folder.
const RUNC: &str = "/run/containerd/runc/by-hand";
const SOON: Duration = Duration::from_secs(30);

/// A process that does nothing, and that a dump does not disturb.
pub const IDLE: &[&str] = &["tail", "-f", "/dev/null"];

/// A host whose shims are started by the test.
pub struct ByHand<'a> {
    /// The host.
    pub host: &'a Host,
    /// What the shims report.
    pub events: Recorder,
    spec: Value,
}

/// A shim without containerd.
pub struct Shim {
    /// The connection to it.
    pub task: Task,
    /// Its process, as the host sees it.
    pub pid: u32,
    /// Its socket, as this machine sees it.
    pub socket: PathBuf,
    /// The bundle that it was started in.
    pub bundle: String,
    log: Job,
}

impl<'a> ByHand<'a> {
    /// Prepares `host`.
    ///
    /// # Errors
    /// When the host cannot do that.
    pub fn on(host: &'a Host) -> Result<Self> {
        host.run(&format!(
            "set -e; mkdir -p {BUNDLES} {ROOTFS}; cd {ROOTFS}; mkdir -p bin dev etc proc root sys tmp; \
             cp /bin/busybox bin; chroot . /bin/busybox --install -s /bin; \
             rm -f {BUNDLES}/config.json; runc spec --bundle {BUNDLES}"
        ))?;
        let folder = host.root().join(BUNDLES.trim_start_matches('/'));
        let events = Recorder::start(&folder.join("events.sock"))?;
        let spec = std::fs::read(folder.join("config.json")).context("read runc's example")?;
        let spec = serde_json::from_slice(&spec).context("decode runc's example")?;
        Ok(Self { host, events, spec })
    }

    /// Makes the bundle of a container that runs `args`; its path on the host.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn bundle(&self, id: &str, args: &[&str]) -> Result<String> {
        let bundle = format!("{BUNDLES}/{id}");
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(args);
        spec["process"]["terminal"] = json!(false);
        spec["root"] = json!({ "path": "rootfs" });
        spec["linux"]["cgroupsPath"] = json!(format!("/{NAMESPACE}/{id}"));
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            // As containerd's clients have it.
            mounts.retain(|mount| mount["type"] != "cgroup");
        }
        let folder = self.path(&bundle);
        // containerd makes both.
        for name in ["rootfs", "work"] {
            std::fs::create_dir_all(folder.join(name)).context("make a bundle")?;
        }
        let spec = serde_json::to_vec(&spec).context("encode a bundle's configuration")?;
        std::fs::write(folder.join("config.json"), spec)
            .context("write a bundle's configuration")?;
        Ok(bundle)
    }

    /// Starts the shim `program` for the container `id`, whose bundle is made.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn shim(&self, program: &str, id: &str, service: &'static str) -> Result<Shim> {
        let bundle = self.bundle(id, IDLE)?;
        let log = self.path(&format!("{bundle}/log"));
        mkfifo(&log, Mode::from_bits_truncate(0o700)).context("make the log's FIFO")?;
        let log = self.host.spawn(&format!("exec cat {bundle}/log"))?;
        // The shell stays: the shim looks at its parent, which has to be one of the host.
        let params = self.params(id)?.write_to_bytes().context("encode the start's parameters")?;
        std::fs::write(self.path(&format!("{bundle}/params")), params).context("write them")?;
        let start = self.host.output(&format!(
            "cd {bundle} && TTRPC_ADDRESS={BUNDLES}/events.sock {program} -namespace {NAMESPACE} \
             -id {id} -address {CONTAINERD} -publish-binary /bin/false start <params; exit $?"
        ))?;
        let start = start.checked(&format!("{program} start"))?;
        let socket = task::socket(self.host, start.stdout.as_bytes())?;
        let task = Task::connect(&socket, service)?;
        let request = api::ConnectRequest { id: id.into(), ..Default::default() };
        let answer: api::ConnectResponse = task.call("Connect", &request)?;
        Ok(Shim { task, pid: answer.shim_pid, socket, bundle, log })
    }

    /// What containerd from 2.3 on sends to `start`; nothing for an earlier one.
    fn params(&self, id: &str) -> Result<BootstrapParams> {
        if ![Containerd::V2_3, Containerd::V2_4].contains(&chosen()?.0) {
            return Ok(BootstrapParams::default());
        }
        Ok(BootstrapParams {
            instance_id: id.into(),
            namespace: NAMESPACE.into(),
            containerd_grpc_address: CONTAINERD.into(),
            containerd_ttrpc_address: format!("{BUNDLES}/events.sock"),
            containerd_binary: "/bin/false".into(),
            ..Default::default()
        })
    }

    /// A path of the host, as this machine sees it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.host.root().join(path.trim_start_matches('/'))
    }

    /// A request to create a container from its bundle, with the root file system as a mount and
    /// without streams.
    pub fn create_request(&self, id: &str) -> api::CreateTaskRequest {
        let root = api::Mount {
            type_: "bind".into(),
            source: ROOTFS.into(),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        };
        api::CreateTaskRequest {
            id: id.into(),
            bundle: format!("{BUNDLES}/{id}"),
            rootfs: vec![root],
            ..Default::default()
        }
    }

    /// Makes a bundle and creates its container.
    ///
    /// # Errors
    /// What the shim says.
    pub fn create(&self, shim: &Shim, id: &str, args: &[&str]) -> Result<u32> {
        self.bundle(id, args)?;
        let created: api::CreateTaskResponse = shim
            .task
            .call("Create", &self.create_request(id))
            .with_context(|| format!("create {id}"))?;
        Ok(created.pid)
    }

    /// What the `delete` action of `program` answers for container `id`, whose shim is gone.
    ///
    /// # Errors
    /// When it fails.
    pub fn delete(&self, program: &str, id: &str) -> Result<api::DeleteResponse> {
        let answer = format!("{BUNDLES}/{id}.deleted");
        let done = self.host.run(&format!(
            "cd {BUNDLES}/{id} && TTRPC_ADDRESS={BUNDLES}/events.sock {program} -namespace \
             {NAMESPACE} -id {id} -address /run/containerd/containerd.sock -publish-binary /bin/false \
             -bundle {BUNDLES}/{id} delete >{answer}; exit $?"
        ))?;
        print!("{}", done.stderr);
        let answer = std::fs::read(self.path(&answer)).context("read the answer")?;
        protobuf::Message::parse_from_bytes(&answer).context("decode the answer")
    }

    /// Ends all shims and containers and removes what they have left, whatever that is. Their bundles
    /// are gone.
    ///
    /// # Errors
    /// When the host cannot do that.
    pub fn clear(&self) -> Result<()> {
        self.clear_but_rules()?;
        self.host.run("nft flush ruleset").map(drop)
    }

    /// [`Self::clear`], but for the firewall's rules.
    ///
    /// # Errors
    /// As there.
    pub fn clear_but_rules(&self) -> Result<()> {
        let script = format!(
            "pkill -9 -x containerd-shim; pkill -9 -x 'criu|runc'; \
             for id in $(ls {RUNC} 2>/dev/null); do runc --root {RUNC} delete -f $id 2>/dev/null; done; \
             pkill -9 -x tail; \
             while pgrep -x 'containerd-shim|criu|runc|tail' >/dev/null; do sleep 0.1; done; \
             for mount in $(grep -oE '({BUNDLES}|{RUNC})/[^ ]*' /proc/mounts | tac); do umount -l $mount; done; \
             find {BUNDLES} -mindepth 1 -maxdepth 1 -type d -exec rm -rf {{}} +; \
             find /sys/fs/cgroup -depth -type d -path '*/{NAMESPACE}/*' -exec rmdir {{}} ';'; \
             rm -rf {RUNC} /tmp/images-* /run/containerd/s/*"
        );
        self.host.run(&script).map(drop)
    }

    /// Makes a FIFO that is open for reading already; its name on the host, and its other end.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn fifo(&self, name: &str) -> Result<(String, std::fs::File)> {
        let name = format!("{BUNDLES}/{name}");
        let path = self.path(&name);
        mkfifo(&path, Mode::from_bits_truncate(0o700)).with_context(|| format!("make {name}"))?;
        // For both, or the end would be there before the shim has opened it.
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(&path)
            .with_context(|| format!("open {name}"))?;
        Ok((name, file))
    }
}

impl Shim {
    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.stdout()
    }

    /// Starts container `id`, or its exec `exec` where that is not empty.
    ///
    /// # Errors
    /// What the shim says.
    pub fn start(&self, id: &str, exec: &str) -> Result<u32, Refusal> {
        let request =
            api::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.call("Start", &request).map(|answer: api::StartResponse| answer.pid)
    }

    /// Sends a signal to container `id`, or to its exec.
    ///
    /// # Errors
    /// What the shim says.
    pub fn kill(&self, id: &str, exec: &str, signal: u32) -> Result<(), Refusal> {
        let (id, exec_id) = (id.into(), exec.into());
        let request = api::KillRequest { id, exec_id, signal, ..Default::default() };
        self.task.call("Kill", &request).map(|_: api::Empty| ())
    }

    /// Waits for the end of container `id`, or of its exec; the exit code.
    ///
    /// # Errors
    /// What the shim says.
    pub fn wait(&self, id: &str, exec: &str) -> Result<u32, Refusal> {
        let request =
            api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.call("Wait", &request).map(|answer: api::WaitResponse| answer.exit_status)
    }

    /// Removes container `id`, or its exec; the exit code.
    ///
    /// # Errors
    /// What the shim says.
    pub fn delete(&self, id: &str, exec: &str) -> Result<u32, Refusal> {
        let request =
            api::DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.call("Delete", &request).map(|answer: api::DeleteResponse| answer.exit_status)
    }

    /// What State says of container `id`, or of its exec.
    ///
    /// # Errors
    /// What the shim says.
    pub fn state(&self, id: &str, exec: &str) -> Result<api::StateResponse, Refusal> {
        let request =
            api::StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.call("State", &request)
    }

    /// Waits until the status of `id`, or of its exec, is `expected`.
    ///
    /// # Errors
    /// When it does not come to that.
    pub fn wait_for_status(&self, id: &str, exec: &str, expected: api::Status) -> Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.state(id, exec)?.status.enum_value();
            if status == Ok(expected) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{id} {exec} is {status:?} and not {expected:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Fails if it has panicked.
    ///
    /// # Errors
    /// With its log.
    pub fn has_not_panicked(&self) -> Result<()> {
        let log = self.log();
        ensure!(!log.contains("panicked"), "the shim has panicked: {log}");
        Ok(())
    }
}

/// A request for an exec of `args`, without streams.
pub fn exec_request(id: &str, exec: &str, args: &[&str]) -> api::ExecProcessRequest {
    let process =
        json!({ "args": args, "cwd": "/", "env": [format!("PATH={}", crate::exec::PATH)] });
    api::ExecProcessRequest {
        id: id.into(),
        exec_id: exec.into(),
        spec: Some(any("types.containerd.io/opencontainers/runtime-spec/1/Process", &process))
            .into(),
        ..Default::default()
    }
}

/// `value` as containerd packs what has no protobuf type.
pub fn any(type_url: &str, value: &Value) -> Any {
    let value = value.to_string().into_bytes();
    Any { type_url: type_url.into(), value, ..Default::default() }
}
