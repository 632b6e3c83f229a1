//! Facts of this host, beyond those that a move asks for.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use ferry_oci::pages::tracker::{Probe, probe};
use ferry_oci::quarantine;
use ferry_oci::record::Record;

use super::locks::Lock;
use crate::describe::host::{HostFacts, in_path, read};

/// What this host is.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) base: HostFacts,
    /// Why containerd does not answer.
    pub(super) containerd_error: Option<String>,
    /// Whose containerd's socket is.
    pub(super) containerd_owner: u32,
    pub(super) criu_installed: bool,
    pub(super) runc_installed: bool,
    /// Errors of `criu check`.
    pub(super) criu_check: Vec<String>,
    /// User ids here are others outside.
    pub(super) user_namespace: bool,
    /// Effective capabilities, a bit each.
    pub(super) capabilities: u64,
    /// This process has a seccomp filter.
    pub(super) seccomp: bool,
    /// Yama's ptrace_scope.
    pub(super) ptrace_scope: u32,
    /// The kernel is built for checkpoints.
    pub(super) checkpoint_restore: bool,
    pub(super) run_is_tmpfs: bool,
    /// Bytes.
    pub(super) pipe_max_size: u64,
    pub(super) tracker: Probe,
    pub(super) apparmor: bool,
    pub(super) apparmor_parser: bool,
    pub(super) selinux: bool,
    /// `nf_tables` or `legacy`; empty where it is not installed.
    pub(super) iptables: String,
    /// Names of all tables of nf_tables.
    pub(super) tables: Vec<String>,
    /// Rules that CRIU has left among those of iptables.
    pub(super) criu_rules: usize,
    /// Ferry's own locks of checkpoints, those in named network namespaces too.
    pub(super) locks: Vec<Lock>,
    /// Migrations that were decided and not finished.
    pub(super) unsettled: usize,
}

/// CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_RESOURCE.
pub(super) const SYS_ADMIN: u64 = 1 << 21;
pub(super) const NET_ADMIN: u64 = 1 << 12;
pub(super) const SYS_PTRACE: u64 = 1 << 19;
pub(super) const SYS_RESOURCE: u64 = 1 << 24;

impl Host {
    /// Gathers them. `containerd` is its version, or why it does not answer.
    pub(super) fn gather(containerd: Result<String, String>, socket: &str) -> Self {
        let status = read("/proc/self/status");
        let base = HostFacts::gather(containerd.clone().unwrap_or_default());
        Self {
            containerd_error: containerd.err(),
            containerd_owner: Path::new(socket).metadata().map_or(0, |meta| meta.uid()),
            criu_installed: in_path("criu"),
            runc_installed: in_path("runc"),
            criu_check: if base.criu.is_some() { criu_check() } else { Vec::new() },
            user_namespace: !is_whole(&read("/proc/self/uid_map")),
            capabilities: field(&status, "CapEff:").map_or(0, |hex| bits(&hex)),
            seccomp: field(&status, "Seccomp:").is_some_and(|mode| mode != "0"),
            ptrace_scope: read("/proc/sys/kernel/yama/ptrace_scope").parse().unwrap_or(0),
            checkpoint_restore: Path::new("/proc/sys/kernel/ns_last_pid").exists(),
            run_is_tmpfs: nix::sys::statfs::statfs("/run")
                .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC),
            pipe_max_size: read("/proc/sys/fs/pipe-max-size").parse().unwrap_or(0),
            tracker: probe(),
            apparmor: read("/sys/module/apparmor/parameters/enabled") == "Y",
            apparmor_parser: in_path("apparmor_parser"),
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            iptables: backend(&output("iptables", &["--version"])),
            tables: quarantine::tables().unwrap_or_default(),
            criu_rules: ["iptables-save", "ip6tables-save", "iptables-legacy-save"]
                .iter()
                .map(|program| of_criu(&output(program, &["-t", "filter"])))
                .max()
                .unwrap_or(0),
            locks: Lock::everywhere(),
            unsettled: Record::all().map_or(0, |records| records.len()),
            base,
        }
    }

    pub(super) fn lacks(&self, capability: u64) -> bool {
        self.capabilities & capability == 0
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
}

/// Value of a line of a `/proc/PID/status`.
pub(super) fn field(status: &str, name: &str) -> Option<String> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
}

fn bits(hex: &str) -> u64 {
    u64::from_str_radix(hex, 16).unwrap_or(0)
}

/// Whether a map of user ids is that of no namespace.
fn is_whole(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn criu_check() -> Vec<String> {
    let Ok(output) = Command::new("criu").arg("check").output() else { return Vec::new() };
    if output.status.success() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let errors = text.lines().filter_map(|line| Some(line[line.find("Error (")?..].to_owned()));
    errors.take(5).collect()
}

fn backend(version: &str) -> String {
    let inside = version.split_once('(').and_then(|(_, rest)| rest.split_once(')'));
    inside.map(|(backend, _)| backend.to_owned()).unwrap_or_default()
}

/// How many of the rules are CRIU's: its own packets carry a mark of which its rules speak.
fn of_criu(rules: &str) -> usize {
    let is_rule = |line: &&str| line.starts_with("-A");
    let of_criu = |line: &&str| line.contains("0xc114") || line.contains("CRIU");
    rules.lines().filter(is_rule).filter(of_criu).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_programs_and_of_the_kernel_are_read() {
        assert_eq!(backend("iptables v1.8.11 (nf_tables)\n"), "nf_tables");
        assert_eq!(backend("iptables v1.8.11 (legacy)\n"), "legacy");
        assert_eq!(backend(""), "");
        let rules = "*filter\n:CRIU - [0:0]\n-A INPUT -j CRIU\n-A CRIU -j DROP\n\
                     -A INPUT -s 10.0.0.1/32 -p tcp -m mark ! --mark 0xc114 -j DROP\n\
                     -A INPUT -j ACCEPT\n";
        assert_eq!(of_criu(rules), 3);
        assert!(is_whole("         0          0 4294967295\n"));
        assert!(!is_whole("0 1000 1\n1 100000 65536\n"));
        let status = "CapEff:\t000001ffffffffff\nSeccomp:\t2\n";
        assert_eq!(bits(&field(status, "CapEff:").unwrap()), 0x1ff_ffff_ffff);
        assert_eq!(field(status, "Seccomp:").as_deref(), Some("2"));
    }
}
