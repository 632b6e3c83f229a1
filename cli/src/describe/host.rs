//! Facts of a host.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use ferry_oci::awake::Awake;
use ferry_oci::breakpoints::Breakpoints;
use ferry_oci::criu::{FastTar, find_library};
use ferry_oci::quarantine;
use serde::{Deserialize, Serialize};

/// What a host is, as far as a move depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostFacts {
    /// Its own name.
    pub(crate) hostname: String,
    /// Differs after every start of the host.
    pub(crate) boot_id: String,
    /// Kernel release.
    pub(crate) kernel: String,
    /// Machine architecture.
    pub(crate) arch: String,
    /// What the processor can do.
    pub(crate) cpu_flags: BTreeSet<String>,
    /// `v1`, `v2` or `hybrid`.
    pub(crate) cgroups: String,
    /// First line of `criu --version`'s number, `None` where criu does not start.
    pub(crate) criu: Option<String>,
    /// Version of runc, `None` where it does not start.
    pub(crate) runc: Option<String>,
    /// Whether the kernel has nf_tables.
    pub(crate) nf_tables: bool,
    /// Whether the shim is in the path.
    pub(crate) shim: bool,
    /// Whether the library that hides memory from CRIU is installed.
    pub(crate) hide_library: bool,
    /// Whether the fast tar is installed.
    pub(crate) fast_tar: bool,
    /// Whether idle processors can be kept awake.
    pub(crate) awake: bool,
    /// Whether the kernel can be made ready for breakpoints.
    pub(crate) breakpoints: bool,
    /// Version of containerd.
    pub(crate) containerd: String,
    /// Version of this ferry.
    pub(crate) ferry: String,
}

/// What programs depend on for as long as they run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Its own name.
    pub(crate) hostname: String,
    /// Kernel release.
    pub(crate) kernel: String,
    /// Machine architecture.
    pub(crate) arch: String,
    /// What the processor can do.
    pub(crate) cpu_flags: BTreeSet<String>,
}

impl Machine {
    /// This one. Runs no program.
    pub(crate) fn this() -> Self {
        let uname = nix::sys::utsname::uname().ok();
        let text = |f: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
            uname.as_ref().map(|u| f(u).to_string_lossy().into_owned()).unwrap_or_default()
        };
        Self {
            hostname: text(|u| u.nodename()),
            kernel: text(|u| u.release()),
            arch: text(|u| u.machine()),
            cpu_flags: cpu_flags(&read("/proc/cpuinfo")),
        }
    }
}

impl HostFacts {
    /// Gathers the facts of this host.
    pub(crate) fn gather(containerd: String) -> Self {
        let Machine { hostname, kernel, arch, cpu_flags } = Machine::this();
        Self {
            hostname,
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            kernel,
            arch,
            cpu_flags,
            cgroups: cgroups(&read("/proc/self/mounts")).to_owned(),
            criu: criu(),
            runc: version_of("runc", "runc version"),
            nf_tables: quarantine::present().is_ok(),
            shim: in_path("containerd-shim-ferry-v2"),
            hide_library: find_library().is_some(),
            fast_tar: FastTar::find().is_some(),
            awake: Awake::is_possible(),
            breakpoints: Breakpoints::is_possible(),
            containerd,
            ferry: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// A file of the kernel's, without space around it; empty where it cannot be read.
pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Version of criu, `None` where it does not start.
pub(crate) fn criu() -> Option<String> {
    version_of("criu", "Version:")
}

fn version_of(program: &str, prefix: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|l| l.strip_prefix(prefix))?;
    output.status.success().then(|| line.trim().to_owned())
}

/// Whether `program` is in the path.
pub(crate) fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// The flags that are worth comparing: those the first processor lists.
fn cpu_flags(cpuinfo: &str) -> BTreeSet<String> {
    cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("flags")?.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

fn cgroups(mounts: &str) -> &'static str {
    let has = |fs_type: &str| {
        mounts.lines().any(|l| {
            let mut fields = l.split(' ').skip(1);
            fields.next().is_some_and(|m| m.starts_with("/sys/fs/cgroup"))
                && fields.next() == Some(fs_type)
        })
    };
    match (has("cgroup"), has("cgroup2")) {
        (true, true) => "hybrid",
        (true, false) => "v1",
        _ => "v2",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_layouts_are_told_apart() {
        let v1 = "cgroup /sys/fs/cgroup/freezer cgroup rw 0 0\n";
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(cgroups(v1), "v1");
        assert_eq!(cgroups(v2), "v2");
        assert_eq!(cgroups(&format!("{v1}{v2}")), "hybrid");
    }

    #[test]
    fn flags_of_the_first_processor_are_read() {
        let flags = cpu_flags("processor : 0\nflags\t\t: fpu avx2\n\nflags : other\n");
        assert_eq!(flags.into_iter().collect::<Vec<_>>(), ["avx2", "fpu"]);
    }
}
