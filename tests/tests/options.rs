//! The options of a checkpoint through the Task API: what each does to the dump, and that the restore follows
//! it without being told. With a client of the test's own, since `ctr` has no way to say most of them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use ferry_tests::by_hand::{ByHand, IDLE, Shim, any};
use ferry_tests::ctr::{FERRY, PYTHON, remove, status, until, wait_for_status};
use ferry_tests::tally::refused;
use ferry_tests::task::{Refusal, V3, api};
use ferry_tests::{Host, Job, Lab};
use serde_json::{Value, json};

const SHIM: &str = "containerd-shim-ferry-v2";
const ID: &str = "s";
const IMAGES: &str = "/var/tmp/images";
const WORK: &str = "/var/tmp/work";
/// A root file system with python3, on a real disk.
const ROOT: &str = "/var/lib/containerd/python";
/// A folder that the container has at the same path.
const SHARED: &str = "/var/tmp/shared";

/// Sends numbers to a socket of the host.
const SENDS: &str = "import socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.connect('/var/tmp/shared/outside')
n = 0
while True:
    n += 1
    s.send(str(n).encode())
    time.sleep(0.02)
";
/// Prints them.
const RECEIVES: &str = "import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind('/var/tmp/shared/outside')
while True:
    print(s.recv(64).decode(), flush=True)
";

/// The process outside.
struct Outside(Job);

impl Outside {
    fn start(host: &Host) -> Result<Self> {
        std::fs::create_dir_all(host.root().join("var/tmp/shared"))?;
        std::fs::write(host.root().join("var/tmp/shared/receives.py"), RECEIVES)?;
        let job = host.spawn(&format!("exec python3 {SHARED}/receives.py"))?;
        let socket = host.root().join("var/tmp/shared/outside");
        host.wait_until("it receives", |_| socket.exists())?;
        Ok(Self(job))
    }

    /// How many numbers have come; fails unless each is one more than the one before.
    fn received(&self) -> Result<usize> {
        let text = self.0.stdout();
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.enumerate().try_fold(0, |_, (n, line)| {
            ensure!(line.trim() == (n + 1).to_string(), "number {} is {line:?}", n + 1);
            Ok(n + 1)
        })
    }

    fn goes_on(&self) -> Result<()> {
        let before = self.received()?;
        until("more numbers come", || Ok(self.received()? > before + 5))
    }
}

/// A host whose shims are started by the test.
struct Bed<'a> {
    host: &'a Host,
    hand: ByHand<'a>,
    /// Changes the bundle's configuration.
    spec: fn(&mut Value) -> Result<()>,
    root: Option<&'static str>,
    args: &'static [&'static str],
}

impl Bed<'_> {
    /// Its bundle, and what it is created with.
    fn create_request(&self) -> Result<api::CreateTaskRequest> {
        let bundle = self.hand.bundle(ID, self.args)?;
        let config = self.hand.path(&bundle).join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&config)?)?;
        (self.spec)(&mut spec)?;
        std::fs::write(&config, spec.to_string()).context("write the bundle")?;
        let mut request = self.hand.create_request(ID);
        for (mount, root) in request.rootfs.iter_mut().zip(self.root) {
            mount.source = root.to_owned();
        }
        Ok(request)
    }

    /// A shim whose container runs.
    fn start(&self) -> Result<Shim> {
        let shim = self.hand.shim(SHIM, ID, V3)?;
        shim.task.call::<api::CreateTaskResponse>("Create", &self.create_request()?)?;
        shim.start(ID, "")?;
        Ok(shim)
    }

    /// The container as its images have it, in a shim of its own; the one before is gone.
    fn restore(&self) -> Result<Shim> {
        self.hand.clear_but_rules()?;
        let shim = self.hand.shim(SHIM, ID, V3)?;
        let request =
            api::CreateTaskRequest { checkpoint: IMAGES.into(), ..self.create_request()? };
        shim.task.call::<api::CreateTaskResponse>("Create", &request)?;
        shim.start(ID, "").context("restore")?;
        Ok(shim)
    }

    /// What the images say of how they were made.
    fn record(&self) -> Result<Value> {
        let record = std::fs::read(self.hand.path(&format!("{IMAGES}/ferry.json")))?;
        Ok(serde_json::from_slice::<Value>(&record)?["options"].clone())
    }
}

fn dump(shim: &Shim, options: &CheckpointOptions) -> Result<(), Refusal> {
    let mut packed = any("containerd.runc.v1.CheckpointOptions", &Value::Null);
    packed.value = options.write_to_bytes().map_err(|err| Refusal::Lost(err.to_string()))?;
    let request = api::CheckpointTaskRequest {
        id: ID.into(),
        path: IMAGES.into(),
        options: Some(packed).into(),
        ..Default::default()
    };
    shim.task.call_for::<api::Empty>("Checkpoint", &request, Duration::from_secs(60)).map(drop)
}

/// A dump after which the container has ended.
fn dump_and_end(shim: &Shim, options: CheckpointOptions) -> Result<()> {
    dump(shim, &CheckpointOptions { exit: true, ..options })?;
    ensure!(shim.wait(ID, "")? == 137, "it has not been killed");
    shim.delete(ID, "")?;
    Ok(())
}

/// In the host's network, with the shared folder.
fn in_host_s_network(spec: &mut Value) -> Result<()> {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
    namespaces.retain(|namespace| namespace["type"] != "network");
    let shared = json!({
        "destination": SHARED, "type": "bind", "source": SHARED, "options": ["rbind", "rw"],
    });
    spec["mounts"].as_array_mut().context("no mounts")?.push(shared);
    Ok(())
}

#[test]
fn a_datagram_socket_with_its_peer_outside_is_kept_where_that_is_asked_for() -> Result<()> {
    let lab = Lab::start(1)?;
    let host = lab.host("a");
    host.run(&format!(
        "mkdir -p {ROOT} && ctr run --rm --runtime {FERRY} \
         --mount type=bind,src={ROOT},dst=/out,options=rbind:rw {PYTHON} fill \
         sh -c 'cp -a /bin /sbin /lib /lib64 /usr /etc /out && mkdir /out/proc /out/dev /out/sys /out/tmp'"
    ))?;
    let outside = Outside::start(host)?;
    let bed = Bed {
        host,
        hand: ByHand::on(host)?,
        spec: in_host_s_network,
        root: Some(ROOT),
        args: &["python3", "-c", SENDS],
    };
    let shim = bed.start()?;
    outside.goes_on()?;

    let refusal = dump(&shim, &CheckpointOptions::default()).err().context("it was dumped")?;
    let refusal = refusal.to_string();
    ensure!(refusal.contains("a unix socket is connected to a process outside"), "{refusal}");
    outside.goes_on().context("after a refused dump")?;

    host.run(&format!("rm -rf {IMAGES}"))?;
    let options = CheckpointOptions {
        external_unix_sockets: true,
        work_path: WORK.into(),
        cgroups_mode: "ignore".into(),
        ..Default::default()
    };
    dump_and_end(&shim, options)?;
    let record = bed.record()?;
    ensure!(record["ext_unix_sk"] == true && record["manage_cgroups"] == "ignore", "{record}");
    // CRIU's log is where it was asked for, and only there.
    host.run(&format!("grep -q 'Dumping finished successfully' {WORK}/dump.log"))?;
    ensure!(!host.output(&format!("ls {IMAGES}/dump.log"))?.status.success(), "it has two logs");
    let before = outside.received()?;
    let shim = bed.restore()?;
    outside.goes_on().context("after a restore")?;
    ensure!(outside.received()? > before, "nothing has come");
    // Its cgroups are its own, whoever has made them.
    let pid = shim.state(ID, "")?.pid;
    let cgroups = host.run(&format!("cat /proc/{pid}/cgroup"))?.stdout;
    ensure!(cgroups.contains("/by-hand/s"), "{cgroups}");
    shim.has_not_panicked()
}

#[test]
fn the_command_keeps_such_a_socket_too() -> Result<()> {
    let lab = Lab::start(1)?;
    let host = lab.host("a");
    let outside = Outside::start(host)?;
    std::fs::write(host.root().join("var/tmp/shared/sends.py"), SENDS)?;
    host.run(&format!(
        "ctr run -d --null-io --net-host --mount type=bind,src={SHARED},dst={SHARED},options=rbind:rw \
         --runtime {FERRY} {PYTHON} t python3 {SHARED}/sends.py"
    ))?;
    outside.goes_on()?;
    let refusal = refused(host, "ferry checkpoint t kept --exit")?;
    for part in ["a unix socket is connected to a process outside", "t runs as before"] {
        ensure!(refusal.contains(part), "no {part:?} in {refusal}");
    }
    ensure!(status(host, "t")? == "RUNNING", "it is {}", status(host, "t")?);
    outside.goes_on().context("after a refused checkpoint")?;
    host.run("ferry checkpoint t kept --external-unix-sockets --exit")?;
    wait_for_status(host, "t", "STOPPED")?;
    let told = host.run("ferry inspect kept")?.stdout;
    ensure!(told.contains("unix sockets with an end outside"), "{told}");
    host.run("ferry restore kept")?;
    outside.goes_on().context("after a restore")?;
    host.run("ferry discard kept")?;
    remove(host, "t").map(drop)
}

#[test]
fn a_namespace_that_is_to_be_empty_comes_back_empty() -> Result<()> {
    /// An address in the container's own network.
    const ADDRESS: &str = "10.9.9.9";
    let lab = Lab::start(1)?;
    let host = lab.host("a");
    let bed = Bed { host, hand: ByHand::on(host)?, spec: |_| Ok(()), root: None, args: IDLE };
    // runc has CRIU make any private network anew, with or without being told; the restore needs the same.
    for namespaces in [vec![], vec!["network".to_owned()]] {
        let inside = |shim: &Shim, command: &str| -> Result<String> {
            let pid = shim.state(ID, "")?.pid;
            Ok(bed.host.run(&format!("nsenter -t {pid} -n ip {command}"))?.stdout)
        };
        let shim = bed.start()?;
        inside(&shim, &format!("addr add {ADDRESS}/32 dev lo"))?;
        let options =
            CheckpointOptions { empty_namespaces: namespaces.clone(), ..Default::default() };
        dump_and_end(&shim, options)?;
        let record = bed.record()?;
        ensure!(record["empty_ns"] == json!(namespaces), "{record}");
        let shim = bed.restore()?;
        let addresses = inside(&shim, "addr")?;
        ensure!(addresses.contains("127.0.0.1") && !addresses.contains(ADDRESS), "{addresses}");
        shim.has_not_panicked()?;
        bed.hand.clear()?;
        bed.host.run(&format!("rm -rf {IMAGES}"))?;
    }
    Ok(())
}
