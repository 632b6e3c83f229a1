//! What the machine must have. `hack/lib/prereq.sh` installs what it can; this only says what is
//! missing, one clear message each.

use std::path::Path;

use anyhow::{Result, bail};

/// Programs of the machine itself, and the Debian package each is in.
const PROGRAMS: &[(&str, &str)] =
    &[("ip", "iproute2"), ("nsenter", "util-linux"), ("unshare", "util-linux")];
/// Programs that make what is missing in the cache.
const MAKERS: &[(&str, &str)] = &[("mmdebstrap", "mmdebstrap"), ("rustc", "the Rust toolchain")];

/// An error that lists all that is missing.
pub fn check() -> Result<()> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("must run as root (namespaces, mounts, CRIU)".to_owned());
    }
    missing.extend(not_installed(PROGRAMS));
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "time", "uts"] {
        if !Path::new("/proc/self/ns").join(namespace).exists() {
            missing.push(format!("the kernel has no {namespace} namespaces"));
        }
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.ends_with("\toverlay")) {
        missing.push("the kernel has no overlay file system (try: modprobe overlay)".to_owned());
    }
    refuse("test hosts", &missing)
}

/// [`check`] of what it takes to make the base system and the images.
pub fn check_makers() -> Result<()> {
    refuse("the base system and images", &not_installed(MAKERS))
}

fn refuse(what: &str, missing: &[String]) -> Result<()> {
    if !missing.is_empty() {
        bail!("{what} cannot be made here:\n  - {}", missing.join("\n  - "));
    }
    Ok(())
}

fn not_installed(programs: &[(&str, &str)]) -> Vec<String> {
    let absent = programs.iter().filter(|(program, _)| !on_path(program));
    absent
        .map(|(name, package)| format!("`{name}` is not installed (package: {package})"))
        .collect()
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
