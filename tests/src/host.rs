//! One test host: a first process in namespaces of its own, and what runs below it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cgroup::Cgroup;
use crate::exec::{self, Entry, Job, Output, enter, run};
use crate::lab::Lab;
use crate::network::{self, address};
use crate::process;

/// The host's first process, run by the machine's shell.
const BOOT: &str = include_str!("../host/boot.sh");
/// The one folder that all hosts of a lab see, and no other lab: for Unix sockets between them.
pub const SHARED: &str = "/srv/lab";
/// How long a host may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a host is made of.
pub(crate) struct Plan<'a> {
    /// `a`, `b`, ... or `client`.
    pub(crate) name: &'a str,
    /// Last part of its address.
    pub(crate) number: u8,
    /// Whether it runs containerd and sshd.
    pub(crate) services: bool,
    /// Root of the base system, below the layers that are laid over it; with colons between them.
    pub(crate) base: &'a OsStr,
    /// What `/var/lib/containerd` starts with.
    pub(crate) containerd: Option<&'a Path>,
    /// Folder of its process id and log.
    pub(crate) state: PathBuf,
    /// Folder on a real disk.
    pub(crate) disk: PathBuf,
    /// Folder that all hosts of the lab see as [`SHARED`].
    pub(crate) shared: &'a Path,
    /// The group it lives in.
    pub(crate) cgroup: Cgroup,
}

/// A running host.
pub struct Host {
    name: String,
    address: Ipv4Addr,
    entry: Entry,
    cgroup: Cgroup,
    /// The process that made the namespaces and waits; none when another run started the host.
    parent: Mutex<Option<Child>>,
}

impl Host {
    /// A host alone in a lab of its own. Gone when dropped.
    pub fn start() -> Result<Alone> {
        Lab::start(1).map(Alone)
    }

    /// Starts the first process and waits until it has an id; its services come up meanwhile.
    pub(crate) fn boot(plan: &Plan<'_>) -> Result<Self> {
        plan.cgroup.create()?;
        lay_out(plan)?;
        let log = File::create(plan.state.join("log")).context("make the host's log")?;
        let script = plan.state.join("boot.sh");
        fs::write(&script, BOOT).context("write the host's first script")?;
        // Clocks that differ by days: a time kept across a move by accident would be seen.
        let days = u32::from(plan.number) % 50 + 1;
        let parent = enter(&plan.cgroup.doors())
            .arg("unshare")
            .args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--time"])
            .args(["--monotonic", &(days * 86_400).to_string()])
            .args(["--boottime", &(days * 90_000).to_string()])
            .args(["--fork", "--kill-child", "/bin/sh"])
            .arg(&script)
            .env("FERRY_BASE", plan.base)
            .env("FERRY_DISK", &plan.disk)
            .env("FERRY_SHARED", plan.shared)
            .env("FERRY_STATE", &plan.state)
            .env("FERRY_NAME", plan.name)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the host's log")?)
            .stderr(log)
            .spawn()
            .context("start a host")?;
        let mut host = Self {
            name: plan.name.to_owned(),
            address: address(plan.number),
            entry: Entry { pid: 0, doors: Vec::new() },
            cgroup: plan.cgroup.clone(),
            parent: Mutex::new(Some(parent)),
        };
        host.entry.pid = host.wait_for_pid(&plan.state)?;
        host.cgroup.hand_on()?;
        host.entry.doors = host.cgroup.doors();
        Ok(host)
    }

    /// A host that an earlier run started; none when it does not run any more.
    pub(crate) fn attach(name: &str, number: u8, state: &Path, cgroup: Cgroup) -> Option<Self> {
        let pid = fs::read_to_string(state.join("pid")).ok()?.trim().parse().ok()?;
        if !process::alive(pid) {
            return None;
        }
        Some(Self {
            name: name.to_owned(),
            address: address(number),
            entry: Entry { pid, doors: cgroup.doors() },
            cgroup,
            parent: Mutex::new(None),
        })
    }

    /// Brings up its end of the network; the other end is the switch's.
    pub(crate) fn connect(&self, switch: &Entry) -> Result<()> {
        let number = self.address.octets()[3];
        network::ip(switch, &network::plug(&self.name, self.entry.pid))?;
        network::ip(&self.entry, &network::configure(number))
    }

    /// Waits until containerd and sshd answer.
    pub(crate) fn wait_for_services(&self) -> Result<()> {
        self.wait_until("its containerd and sshd run", |host| {
            let run = host.root().join("run");
            UnixStream::connect(run.join("containerd/containerd.sock")).is_ok()
                && run.join("sshd.pid").exists()
        })
    }

    /// Its name in the lab, which its shell and `/etc/hosts` know too.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the lab's bridge.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its first process, as this machine sees it.
    pub fn pid(&self) -> i32 {
        self.entry.pid
    }

    /// Its root directory, as this machine sees it.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.entry.pid))
    }

    /// Runs a shell command on the host to its end. An error, with all it printed, when it fails.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.output(script)?.checked(&self.title(script))
    }

    /// Runs a shell command on the host to its end, whatever that is.
    pub fn output(&self, script: &str) -> Result<Output> {
        exec::output(&mut self.command(&["/bin/sh", "-c", script]))
            .with_context(|| self.title(script))
    }

    /// Starts a shell command on the host and goes on. Begin with `exec` so that signals reach the
    /// program itself.
    pub fn spawn(&self, script: &str) -> Result<Job> {
        Job::enter(self.command(&["/bin/sh", "-c", script]), &self.title(script))
    }

    /// Starts a command at a terminal of its own, of that many lines and columns.
    pub fn spawn_at_terminal(&self, command: &str, size: (u16, u16)) -> Result<Job> {
        let (rows, columns) = size;
        let sized = format!("stty rows {rows} columns {columns}; exec {command}");
        self.spawn(&format!("exec script -qefc '{sized}' /dev/null"))
    }

    /// A program on the host, to be started by the caller.
    pub fn command(&self, program: &[&str]) -> Command {
        self.entry.command(program)
    }

    /// Copies a program of this machine to `path` on the host. A running one is replaced safely.
    pub fn install(&self, program: &Path, path: &str) -> Result<()> {
        let target = self.root().join(path.trim_start_matches('/'));
        let new = target.with_extension("new");
        fs::copy(program, &new)
            .and_then(|_| fs::set_permissions(&new, fs::Permissions::from_mode(0o755)))
            .and_then(|()| fs::rename(&new, &target))
            .with_context(|| format!("install {} on {}", program.display(), self.name))
    }

    /// Polls until `done` holds.
    pub fn wait_until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            if !process::alive(self.entry.pid) {
                bail!("host {} has ended; waited until {what}", self.name);
            }
            if Instant::now() > deadline {
                bail!("host {}: waited {PATIENCE:?} until {what}", self.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Ends the host at once, as if its power went. Its disk stays until the lab ends.
    pub fn stop(&self) -> Result<()> {
        // The kernel takes a network namespace apart some time after its last process and answers
        // for its addresses until then.
        let _ = network::ip(&self.entry, "link delete eth0\n");
        self.cgroup.destroy()?;
        if let Some(mut parent) = self.parent.lock().unwrap_or_else(|e| e.into_inner()).take() {
            parent.wait().context("wait for a host's end")?;
        }
        Ok(())
    }

    fn title(&self, script: &str) -> String {
        format!("{}: {script}", self.name)
    }

    fn wait_for_pid(&self, state: &Path) -> Result<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(text) = fs::read_to_string(state.join("pid")) {
                let pid = text.trim().parse().context("read a host's process id")?;
                // Until it has moved into its root, entering would show this machine's files.
                let moved = fs::read_link(format!("/proc/{pid}/exe"))
                    .is_ok_and(|exe| exe.to_string_lossy().ends_with("busybox"));
                if moved {
                    return Ok(pid);
                }
            }
            let mut parent = self.parent.lock().unwrap_or_else(|e| e.into_inner());
            let ended = match parent.as_mut() {
                Some(parent) => parent.try_wait().context("look after a host")?.is_some(),
                None => true,
            };
            if ended || Instant::now() > deadline {
                let log = fs::read_to_string(state.join("log")).unwrap_or_default();
                bail!("host {} does not start: {}", self.name, log.trim());
            }
            drop(parent);
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Only what this run started is waited for; the lab has killed it.
        if let Some(mut parent) = self.parent.lock().unwrap_or_else(|e| e.into_inner()).take() {
            let _ = parent.try_wait();
        }
    }
}

/// A host that is a whole lab.
pub struct Alone(Lab);

impl Deref for Alone {
    type Target = Host;

    fn deref(&self) -> &Host {
        self.0.host("a")
    }
}

/// Makes the host's folders and the files that differ from host to host.
fn lay_out(plan: &Plan<'_>) -> Result<()> {
    fs::create_dir_all(&plan.state).context("make the host's state folder")?;
    for dir in ["root", "work", "upper/etc"] {
        fs::create_dir_all(plan.disk.join(dir)).context("make the host's folders")?;
    }
    let containerd = plan.disk.join("containerd");
    match plan.containerd {
        Some(template) => {
            // In the host's group, so that it ends with the lab when this process is killed.
            run(enter(&plan.cgroup.doors())
                .args(["cp", "-a", "--reflink=auto"])
                .arg(template)
                .arg(&containerd))?;
        }
        None => fs::create_dir_all(&containerd).context("make containerd's folder")?,
    }
    let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost\n");
    for n in 1..=crate::lab::MOST_HOSTS {
        hosts.push_str(&format!("{} {}\n", address(n), crate::lab::host_name(n)));
    }
    hosts.push_str(&format!("{} client\n", address(network::CLIENT)));
    let machine = crate::cache::key([plan.disk.as_os_str().as_encoded_bytes()]).repeat(3);
    let mut files = vec![
        ("hostname", format!("{}\n", plan.name)),
        ("hosts", hosts),
        ("machine-id", format!("{}\n", &machine[..32])),
    ];
    if !plan.services {
        files.push(("inittab", "::sysinit:/bin/true\n".into()));
    }
    for (file, text) in files {
        fs::write(plan.disk.join("upper/etc").join(file), text)
            .with_context(|| format!("write the host's {file}"))?;
    }
    Ok(())
}
