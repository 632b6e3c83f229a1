//! What a host cannot do. Pure: facts in, findings out.

use super::Findings;
use super::host::{Host, NET_ADMIN, SYS_ADMIN, SYS_PTRACE, SYS_RESOURCE};

/// What pipes need where pages are sent on demand, bytes.
const PIPE: u64 = 4 << 20;

/// All of it.
pub(super) fn all(host: &Host, found: &mut Findings) {
    rights(host, found);
    limits(host, found);
    programs(host, found);
    kernel(host, found);
    security(host, found);
    firewall(host, found);
    left_behind(host, found);
}

fn rights(host: &Host, found: &mut Findings) {
    if host.user_namespace {
        let what = "ferry runs in a user namespace";
        found.block("rootless", what, "run it as root of the host: criu cannot work without");
    } else if host.containerd_owner != 0 {
        let what = format!("containerd is user {}'s", host.containerd_owner);
        found.block("rootless", what, "use a containerd that runs as root: rootless ones cannot");
    }
    for (capability, name) in
        [(SYS_ADMIN, "SYS_ADMIN"), (NET_ADMIN, "NET_ADMIN"), (SYS_PTRACE, "SYS_PTRACE")]
    {
        if host.lacks(capability) {
            let what = format!("ferry has no CAP_{name}");
            found.block("capability", what, "run it as root with all capabilities");
        }
    }
}

/// CRIU reads the resource limits of each process, and those of another user's only with this.
fn limits(host: &Host, found: &mut Findings) {
    if host.lacks(SYS_RESOURCE) {
        let what =
            "ferry has no CAP_SYS_RESOURCE: processes of other users than root cannot be dumped";
        found.warn("limits", what, "run containerd and ferry with all capabilities");
    }
}

fn programs(host: &Host, found: &mut Findings) {
    if let Some(error) = &host.containerd_error {
        found.block("containerd", error.clone(), "start containerd, or name its socket: --address");
    }
    let base = &host.base;
    match (&base.criu, host.criu_installed) {
        (None, false) => {
            let what = "criu is not in the path";
            found.block("criu-missing", what, "install criu 4.2 or newer");
        }
        (None, true) => {
            let what = format!("criu does not start on kernel {}", base.kernel);
            found.block(
                "criu-broken",
                what,
                "install criu 4.2 or newer: older ones do not know it",
            );
        }
        (Some(version), _) => criu(version, host, found),
    }
    match (&base.runc, host.runc_installed) {
        (None, false) => {
            let what = "runc is not in the path";
            found.block("runc-missing", what, "install runc 1.2 or newer");
        }
        (None, true) => {
            let what = "runc does not start, or is another runtime under its name";
            found.block("runc-missing", what, "install runc 1.2 or newer");
        }
        (Some(version), _) if number(version) < (1, 2) => {
            let what = format!("runc {version} cannot leave cgroups to ferry");
            found.warn("runc-old", what, "install runc 1.2 or newer: the pause is longer without");
        }
        _ => {}
    }
    if !base.shim {
        let what = "containerd-shim-ferry-v2 is not in the path";
        found.block("shim-missing", what, "install it beside ferry");
    }
    if !base.hide_library {
        let what = "libferry_hide.so is not installed: criu dumps all memory in the pause";
        found.note("hide-library", what, "install it beside ferry");
    }
    if !base.fast_tar {
        let what = "ferry-tar is not installed: criu packs small file systems by tar(1)";
        found.note("fast-tar", what, "install it beside ferry");
    }
}

/// Its first two numbers.
type Version = (u32, u32);

/// Which criu each kernel needs at least, and what goes wrong without.
const NEEDS: [(Version, Version, &str); 3] = [
    ((6, 16), (4, 2), "cannot dump sockets (Can't get 1:16 opt)"),
    ((6, 13), (4, 1), "cannot dump any process (vvar_vclock)"),
    ((5, 18), (3, 17), "cannot dump what uses restartable sequences, as glibc does"),
];

fn criu(version: &str, host: &Host, found: &mut Findings) {
    let (criu, kernel) = (number(version), number(&host.base.kernel));
    let wrong = NEEDS.iter().find(|(from, needed, _)| kernel >= *from && criu < *needed);
    if let Some((_, (major, minor), what)) = wrong {
        let what = format!("criu {version} on kernel {} {what}", host.base.kernel);
        let cure = format!("install criu {major}.{minor} or newer");
        found.block("criu-old", what, &cure);
    } else if criu < (4, 2) {
        let what =
            format!("criu {version} reads no images of criu 4.2, and not all of its ways work");
        found.warn("criu-old", what, "install criu 4.2 or newer");
    }
    for error in &host.criu_check {
        let what = format!("criu check: {error}");
        found.warn("criu-check", what, "a kernel with what it names, or a newer criu");
    }
}

/// The first two parts of a version.
fn number(version: &str) -> Version {
    let mut parts =
        version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn kernel(host: &Host, found: &mut Findings) {
    if !host.checkpoint_restore {
        let what =
            format!("kernel {} is built without CONFIG_CHECKPOINT_RESTORE", host.base.kernel);
        found.block("kernel-checkpoint", what, "use a kernel with it, as all distributions have");
    }
    let tracker = &host.tracker;
    match (tracker.soft_dirty, tracker.write_protect) {
        (_, false) => {
            let what = format!(
                "writes cannot be noted, so memory cannot be copied beforehand: {}",
                tracker.write_protect_why
            );
            found.warn(
                "tracker",
                what,
                "a kernel from 6.7 on: without it the pause grows with memory",
            );
        }
        (false, true) => {
            let what = format!("no pre-dump by criu: {}", tracker.soft_dirty_why);
            found.note("soft-dirty", what, "none needed: ferry's own tracker serves instead");
        }
        (true, true) => {}
    }
    if host.pipe_max_size < PIPE && host.lacks(SYS_RESOURCE) {
        let what = format!(
            "pipes have at most {} bytes, too few to send pages on demand",
            host.pipe_max_size
        );
        found.warn("pipe-max-size", what, "sysctl -w fs.pipe-max-size=4194304");
    }
    if !host.run_is_tmpfs {
        let what = "/run is not a tmpfs: criu looks at the kernel anew in each run, some 25 ms";
        found.warn("run-tmpfs", what, "mount a tmpfs on /run, as every distribution does");
    }
    if host.base.cgroups == "hybrid" {
        let what = "cgroups of both versions are mounted (hybrid): only a host like it can restore";
        found.note("cgroups", what, "start all hosts with the same layout, best version 2 alone");
    }
}

fn security(host: &Host, found: &mut Findings) {
    if host.ptrace_scope >= 3 {
        let what = "kernel.yama.ptrace_scope is 3: nobody may trace, and criu has to";
        found.block("ptrace", what, "set it to 2 or less, and start the host anew");
    }
    if host.seccomp {
        let what = "ferry has a seccomp filter itself, and so criu cannot suspend a container's";
        found.warn("seccomp-suspend", what, "start ferry and containerd without one");
    }
    if host.apparmor && !host.apparmor_parser {
        let what =
            "the kernel has AppArmor, and apparmor_parser is missing: profiles cannot be loaded";
        found.warn("apparmor", what, "install apparmor");
    }
    if host.selinux {
        let what = "SELinux is on: a checkpoint restores only where its labels are known";
        found.note("selinux", what, "use the same policy on all hosts");
    }
}

fn firewall(host: &Host, found: &mut Findings) {
    if !host.base.nf_tables {
        let what = "the kernel has no nf_tables: connections cannot be kept silent";
        found.block("nf-tables", what, "modprobe nf_tables");
    }
    if host.iptables == "legacy" {
        let what = "iptables is the legacy one: rules that criu or CNI make are not seen by nft";
        let cure = "update-alternatives --set iptables /usr/sbin/iptables-nft";
        found.warn("iptables-legacy", what, cure);
    }
    for table in host.tables.iter().filter(|table| table.starts_with("CRIU-")) {
        let what = format!("table {table} of a dump or restore is left: it drops packets");
        let cure = format!("nft delete table inet {table}, if no criu runs");
        found.warn("criu-rules", what, &cure);
    }
    if host.criu_rules > 0 {
        let what =
            format!("{} rules of criu are left in iptables: they drop packets", host.criu_rules);
        let cure = "iptables-save | grep -E '0xc114|CRIU', and delete them by iptables -D, if no criu runs";
        found.warn("criu-rules", what, cure);
    }
}

fn left_behind(host: &Host, found: &mut Findings) {
    for lock in &host.locks {
        lock.tell(found);
    }
    if host.unsettled > 0 {
        let what = format!("{} migrations were decided and not finished", host.unsettled);
        found.warn("unsettled", what, "ferry status lists them with their cures");
    }
}
