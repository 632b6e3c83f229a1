//! A lab: hosts, a client, and the switch between them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};

use crate::cgroup::Cgroup;
use crate::exec::{Entry, enter};
use crate::host::{Host, Plan};
use crate::{base, images, network, prereq, sweep};

/// More hosts than that have no name.
pub const MOST_HOSTS: u8 = 8;
/// ferry's own programs, installed on every host when they are built.
pub const PROGRAMS: [&str; 4] =
    ["ferry", "containerd-shim-ferry-v2", "libferry_hide.so", "ferry-tar"];

/// File in a lab's state that is there once all its hosts run.
const COMPLETE: &str = "complete";

/// The name of host number `n` (1 is `a`).
pub fn host_name(n: u8) -> String {
    char::from(b'a' + n - 1).to_string()
}

/// A running lab. Removed when dropped, unless it is kept.
pub struct Lab {
    id: String,
    keep: bool,
    switch: Option<Child>,
    hosts: Vec<Host>,
    client: Option<Host>,
}

impl Lab {
    /// Starts `hosts` hosts called `a`, `b`, ... and a client, with the test images and with
    /// ferry's programs where they are built. First removes what killed tests left.
    pub fn start(hosts: u8) -> Result<Self> {
        Self::start_over(hosts, &[])
    }

    /// [Lab::start] with more layers over the base system, the uppermost first.
    pub fn start_over(hosts: u8, layers: &[PathBuf]) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let id = sweep::owned_id(COUNT.fetch_add(1, Ordering::Relaxed));
        Self::build(id, hosts, true, layers)
    }

    /// Starts a lab that has no owner: it stays until [Lab::remove].
    pub fn start_kept(id: &str, hosts: u8, layers: &[PathBuf]) -> Result<Self> {
        let mut lab = Self::build(id.to_owned(), hosts, true, layers)?;
        lab.keep = true;
        Ok(lab)
    }

    /// One host without images, to make the images with.
    pub(crate) fn bare() -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let id = sweep::owned_id(1_000_000 + COUNT.fetch_add(1, Ordering::Relaxed));
        Self::build(id, 1, false, &[])
    }

    /// A kept lab that runs; none when none of its hosts does, or its start was cut short.
    pub fn attach(id: &str) -> Result<Option<Self>> {
        let state = sweep::state(id);
        if !state.join(COMPLETE).exists() {
            return Ok(None);
        }
        let cgroup = Cgroup::of_lab(id)?;
        let open = |name: &str, number| {
            Host::attach(name, number, &state.join("hosts").join(name), cgroup.child(name))
        };
        let hosts: Vec<_> = (1..=MOST_HOSTS).filter_map(|n| open(&host_name(n), n)).collect();
        let client = open("client", network::CLIENT);
        if hosts.is_empty() && client.is_none() {
            return Ok(None);
        }
        Ok(Some(Self { id: id.to_owned(), keep: true, switch: None, hosts, client }))
    }

    /// Removes all that is there of lab `id`.
    pub fn remove(id: &str) -> Result<()> {
        sweep::remove(id)
    }

    /// The lab's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The host called `name`.
    ///
    /// # Panics
    /// When the lab has no such host.
    pub fn host(&self, name: &str) -> &Host {
        match self.find(name) {
            Some(host) => host,
            None => panic!("lab {} has no host {name}", self.id),
        }
    }

    /// The host called `name`, or the client, if it is there.
    pub fn find(&self, name: &str) -> Option<&Host> {
        self.hosts().iter().chain(&self.client).find(|host| host.name() == name)
    }

    /// All hosts, in order; the client is not one of them.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The client: a host without containerd and sshd.
    ///
    /// # Panics
    /// When it does not run.
    pub fn client(&self) -> &Host {
        self.host("client")
    }

    /// Copies ferry's programs, those that are built, to every host. Returns what was installed.
    pub fn install_ferry(&self) -> Result<Vec<PathBuf>> {
        let programs: Vec<_> = PROGRAMS.iter().filter_map(|name| built(name)).collect();
        for host in &self.hosts {
            for program in &programs {
                let name = program.file_name().unwrap_or_default().to_string_lossy();
                host.install(program, &format!("/usr/local/bin/{name}"))?;
            }
        }
        Ok(programs)
    }

    fn build(id: String, hosts: u8, with_images: bool, layers: &[PathBuf]) -> Result<Self> {
        prereq::check()?;
        if !(1..=MOST_HOSTS).contains(&hosts) {
            bail!("a lab has 1 to {MOST_HOSTS} hosts, not {hosts}");
        }
        sweep::sweep()?;
        let base = base::ensure()?;
        let template = if with_images { Some(images::ensure()?) } else { None };
        let mut lab = Self { id, keep: false, switch: None, hosts: Vec::new(), client: None };
        let layers: Vec<_> = layers.iter().chain([&base]).map(|path| path.as_os_str()).collect();
        lab.bring_up(hosts, &layers.join(OsStr::new(":")), template.as_deref())
            .with_context(|| format!("start lab {}", lab.id))?;
        Ok(lab)
    }

    fn bring_up(&mut self, hosts: u8, base: &OsStr, containerd: Option<&Path>) -> Result<()> {
        let cgroup = Cgroup::of_lab(&self.id)?;
        cgroup.create()?;
        let (state, disk) = (sweep::state(&self.id), sweep::disk(&self.id));
        fs::create_dir_all(&state).context("make the lab's state folder")?;
        let shared = disk.join("shared");
        fs::create_dir_all(&shared).context("make the lab's disk folder")?;
        std::os::unix::fs::symlink(&disk, state.join("disk")).context("note the lab's disk")?;

        let switch = self.start_switch(&cgroup)?;
        let names = (1..=hosts).map(|n| (host_name(n), n));
        let names: Vec<_> = names.chain([("client".to_owned(), network::CLIENT)]).collect();
        let boot = |name: &str, number| {
            let services = number != network::CLIENT;
            let host = Host::boot(&Plan {
                name,
                number,
                services,
                base,
                containerd: containerd.filter(|_| services),
                state: state.join("hosts").join(name),
                disk: disk.join(name),
                shared: &shared,
                cgroup: cgroup.child(name),
            })?;
            host.connect(&switch)?;
            Ok(host)
        };
        let started: Vec<Result<Host>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                names.iter().map(|(name, n)| scope.spawn(|| boot(name, *n))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| bail!("a host's start panicked")))
                .collect()
        });
        self.hosts = started.into_iter().collect::<Result<_>>()?;
        self.client = self.hosts.pop();
        if let Some(echo) = containerd.map(|images| images.with_file_name("ferry-echo")) {
            for host in self.hosts.iter().chain(&self.client) {
                host.install(&echo, "/usr/local/bin/ferry-echo")?;
            }
        }
        self.install_ferry()?;
        self.hosts.iter().try_for_each(Host::wait_for_services)?;
        fs::write(state.join(COMPLETE), "").context("note that the lab runs")
    }

    /// Starts the process that keeps the switch's network namespace, and makes the bridge in it.
    fn start_switch(&mut self, cgroup: &Cgroup) -> Result<Entry> {
        let cgroup = cgroup.child("switch");
        cgroup.create()?;
        let mut child = enter(&cgroup.doors())
            .args(["unshare", "--net"])
            .args(["/bin/sh", "-c", "echo; exec sleep infinity"])
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start the switch")?;
        // The line says that it is in its namespace.
        let ready = child
            .stdout
            .take()
            .map(|mut stdout| std::io::Read::read(&mut stdout, &mut [0; 1]).is_ok_and(|n| n == 1));
        let entry = Entry { pid: child.id().cast_signed(), doors: Vec::new() };
        self.switch = Some(child);
        if ready != Some(true) {
            bail!("the switch's namespace could not be made");
        }
        network::ip(&entry, &network::bridge())?;
        Ok(entry)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(e) = sweep::remove(&self.id) {
            eprintln!("lab {} is not removed: {e:#}", self.id);
        }
        if let Some(mut switch) = self.switch.take() {
            let _ = switch.wait();
        }
        for host in self.hosts.iter().chain(&self.client) {
            let _ = host.stop();
        }
    }
}

/// The program `name` of this workspace as built with the profile that is running now.
pub fn built(name: &str) -> Option<PathBuf> {
    let me = std::env::current_exe().ok()?;
    me.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file())
}
