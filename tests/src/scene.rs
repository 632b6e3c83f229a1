//! Two hosts with ferry, a container on one of them, and what is left behind on either.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{Host, Job, Lab, Output};

/// The address that moves with a container.
pub const FLOATING: &str = "10.77.0.100";

/// The same of IPv6.
pub const FLOATING_6: &str = "fd77::100";

/// The runtime that ferry's shim answers for.
pub const RUNTIME: &str = "io.containerd.ferry.v2";

/// How long rollbacks and clean-ups may take.
const SOON: Duration = Duration::from_secs(40);

/// Two hosts, `a` and `b`, with ferry installed.
pub struct Scene {
    /// The lab they are in.
    pub lab: Lab,
}

impl Scene {
    /// Starts both hosts.
    ///
    /// # Errors
    /// When they do not start, or ferry has not been built.
    pub fn start() -> Result<Self> {
        Self::start_over(&[])
    }

    /// [`Self::start`] with more layers over the base system, the uppermost first.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_over(layers: &[PathBuf]) -> Result<Self> {
        let lab = Lab::start_over(2, layers)?;
        let installed = lab.install_ferry()?;
        ensure!(installed.len() >= 2, "build first: cargo build --workspace (found {installed:?})");
        Ok(Self { lab })
    }

    /// Host `a` or `b`.
    pub fn host(&self, name: &str) -> &Host {
        self.lab.host(name)
    }

    /// Starts redis with the floating address on host `name`, with `keys` keys of 100 bytes.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn start_redis(&self, name: &str, keys: u32) -> Result<()> {
        self.start_redis_at(name, keys, &format!("{FLOATING}/24 dev eth0"))
    }

    /// [`Self::start_redis`] with another address, in the words of `ip addr add`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn start_redis_at(&self, name: &str, keys: u32, address: &str) -> Result<()> {
        let host = self.host(name);
        host.run(&format!(
            "ip addr add {address}; ctr run -d --null-io --net-host \
             --runtime {RUNTIME} docker.io/library/redis:latest redis \
             redis-server --protected-mode no --save '' --enable-debug-command yes"
        ))?;
        host.wait_until("redis answers", |h| {
            h.output("redis-cli -h 127.0.0.1 ping").is_ok_and(|o| o.stdout.contains("PONG"))
        })?;
        if keys > 0 {
            host.run(&format!("redis-cli debug populate {keys} key 100"))?;
        }
        Ok(())
    }

    /// A client in its own namespace that asks redis over `connections` connections without ever
    /// reconnecting, until [`finish_client`].
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_client(&self, connections: u32) -> Result<Job> {
        self.start_client_at(FLOATING, connections)
    }

    /// [`Self::start_client`] of another address; one of IPv6 in brackets.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_client_at(&self, address: &str, connections: u32) -> Result<Job> {
        let job = self
            .lab
            .client()
            .spawn(&format!("exec ferry-echo redis {address}:6379 --connections {connections}"))?;
        // Connected and under way.
        std::thread::sleep(Duration::from_millis(500));
        Ok(job)
    }

    /// Runs `ferry migrate` of `id` from one host to the other, with the floating address.
    ///
    /// # Errors
    /// When the command itself cannot be run.
    pub fn try_migrate(&self, id: &str, from: &str, to: &str, more: &str) -> Result<Output> {
        self.host(from).output(&migrate_command(id, self.host(to), more))
    }

    /// [`Self::try_migrate`] with the floating address; the report.
    ///
    /// # Errors
    /// When the container was not moved.
    pub fn migrate(&self, id: &str, from: &str, to: &str) -> Result<Value> {
        let output = self.try_migrate(id, from, to, &format!("--ip {FLOATING}/24 --json"))?;
        let output = output.checked("ferry migrate")?;
        serde_json::from_str(&output.stdout).with_context(|| format!("decode {}", output.stdout))
    }
}

/// Starts a migration of `id` that stops at the beginning of `phase`, and waits until it stands
/// there. It goes on when [`go_on`] is called. Needs ferry built with `fault-points`.
///
/// # Errors
/// When it does not come to stand there.
pub fn stop_at(
    scene: &Scene,
    id: &str,
    phase: &str,
    (from, to): (&str, &str),
    more: &str,
) -> Result<Job> {
    let host = scene.host(from);
    host.run("rm -f /tmp/fault")?;
    let command = migrate_command(id, scene.host(to), more);
    let job = host.spawn(&format!("FERRY_FAULT={phase}:/tmp/fault exec {command}"))?;
    host.wait_until("the migration stands at the fault point", |h| {
        h.output("test -e /tmp/fault").is_ok_and(|o| o.status.success())
    })
    .with_context(|| format!("built with fault-points? stderr: {}", job.stderr()))?;
    Ok(job)
}

/// Lets a migration go on that stands at a fault point.
///
/// # Errors
/// When the host cannot be reached.
pub fn go_on(host: &Host) -> Result<()> {
    host.run("rm -f /tmp/fault").map(drop)
}

/// The command that moves `id` to `to`.
pub fn migrate_command(id: &str, to: &Host, more: &str) -> String {
    format!("ferry migrate {id} --to ssh://root@{} {more}", to.address())
}

/// Ends a client and gives its report. Fails when a connection was lost or an answer was wrong.
///
/// # Errors
/// With what the client saw.
pub fn finish_client(client: Job) -> Result<Value> {
    let output = client.stop()?;
    let line = output.stdout.lines().last().with_context(|| format!("no report: {output}"))?;
    let report: Value = serde_json::from_str(line).with_context(|| format!("decode {line}"))?;
    let errors = report["errors"].as_array().map_or(usize::MAX, Vec::len);
    ensure!(errors == 0, "the client saw errors: {report}");
    ensure!(report["reconnects"] == 0, "the client reconnected: {report}");
    ensure!(report["requests"].as_u64() > Some(0), "the client asked nothing: {report}");
    Ok(report)
}

/// Everything that a migration could leave on a host, one line each, the same on every host: rules, addresses, containers,
/// tasks, leases, snapshots, images, blobs, cgroups, mounts, files and processes of ferry.
///
/// # Errors
/// When the host cannot be asked.
pub fn traces(host: &Host) -> Result<Vec<String>> {
    let script = r#"
        nft list ruleset | sed 's/^/rule /'
        ip -o -4 addr | awk '$4 !~ /^10.77.0.[1-9]\// {print "address", $2, $4}'
        ip -o -6 addr show scope global | awk '$4 !~ /^fd77::[0-9a-f][0-9a-f]?\// {print "address", $2, $4}'
        ctr containers ls -q | sed 's/^/container /'
        ctr tasks ls | awk 'NR > 1 {print "task", $1, $3}'
        ctr leases ls -q | sed 's/^/lease /'
        ctr snapshots ls | awk 'NR > 1 {print "snapshot", $1}'
        ctr images ls -q | sed 's/^/image /'
        ctr content ls -q | sed 's/^/blob /'
        ctr content active 2>/dev/null | awk 'NR > 1 {print "ingest", $1}'
        find /sys/fs/cgroup -type d -path '*/default/*' | sed 's/^/cgroup /'
        awk '{print "mount", $2}' /proc/mounts
        find /run/ferry '(' -type f -o -type p ')' ! -name epoch 2>/dev/null | sed 's/^/file /'
        find /var/lib/ferry -mindepth 2 2>/dev/null | sed 's/^/file /'
        find /run/ferry/images -mindepth 1 2>/dev/null | sed 's/^/image file /'
        ls /run/ferry/s 2>/dev/null | sed 's/.*/socket of a shim/'
        ls -A /run/containerd/io.containerd.runtime.v2.task/default 2>/dev/null | sed 's/^/bundle /'
        ls /run/containerd/runc/default 2>/dev/null | sed 's/^/runc state /'
        ps -eo comm= | grep -E '^(ferry|runc|criu|containerd-shim|ssh)$' | sed 's/^/process /'
    "#;
    let mut lines: Vec<String> = host.run(script)?.stdout.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

/// Waits until the traces on `host` are those of `before`.
///
/// # Errors
/// With the difference, when they do not come to be the same soon.
pub fn wait_for_traces(host: &Host, before: &[String], when: &str) -> Result<()> {
    wait(host, before, when, "")
}

/// [`wait_for_traces`], once the memory was dropped that a migration which failed may leave for the
/// next attempt: the one exception.
///
/// # Errors
/// As [`wait_for_traces`].
pub fn wait_for_traces_but_pages(host: &Host, before: &[String], when: &str) -> Result<()> {
    wait(host, before, when, "ferry drop --all")
}

fn wait(host: &Host, before: &[String], when: &str, first: &str) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        // Refused while a restore is being undone.
        host.output(first)?;
        let now = traces(host)?;
        if now == before {
            return Ok(());
        }
        if Instant::now() > deadline {
            let more: Vec<_> = now.iter().filter(|l| !before.contains(l)).collect();
            let less: Vec<_> = before.iter().filter(|l| !now.contains(l)).collect();
            bail!("{when}: host {} has more {more:#?} and lacks {less:#?}", host.name());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// State of the task `id` on `host`, `None` when there is none.
///
/// # Errors
/// When the host cannot be asked.
pub fn task_state(host: &Host, id: &str) -> Result<Option<String>> {
    let listing = host.run("ctr tasks ls")?.stdout;
    Ok(listing.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        (fields.next() == Some(id)).then(|| fields.nth(1).unwrap_or_default().to_owned())
    }))
}
