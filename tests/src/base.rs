//! The base system that all hosts share, read only: made once from Debian packages and cached. What
//! only some labs need is laid over it (see [crate::layers]).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::exec::run;
use crate::{cache, prereq};

/// Raised when the recipe below changes in a way that its inputs do not show.
const RECIPE: &str = "1";
pub(crate) const MIRROR: &str = "http://deb.debian.org/debian";
/// Debian testing: the first release whose CRIU works on kernels from 6.16 on.
const SUITE: &str = "forky";
const PACKAGES: &[&str] = &[
    "busybox-static",
    "ca-certificates",
    "containerd",
    "criu",
    "iproute2",
    "iptables",
    "iputils-arping",
    "iputils-ping",
    "libpython3-stdlib",
    "nftables",
    "openssh-client",
    "openssh-server",
    "procps",
    "python3-minimal",
    "redis-server",
    "redis-tools",
    "runc",
    "strace",
    "tcpdump",
    "xz-utils",
];

/// Files laid over the packages.
const FILES: &[(&str, &str)] = &[
    ("etc/inittab", include_str!("../host/inittab")),
    ("etc/containerd/config.toml", include_str!("../host/containerd.toml")),
    ("etc/ssh/sshd_config.d/ferry.conf", include_str!("../host/sshd.conf")),
];

/// Run in the new system. All hosts have one host key and one user key: `ssh` between them asks
/// nothing. The keys never leave the cache and open nothing but test hosts.
const FINISH: &str = r#"
set -e
rm -f /etc/ssh/ssh_host_* /etc/machine-id
ssh-keygen -q -t ed25519 -N '' -C 'ferry test host' -f /etc/ssh/ssh_host_ed25519_key
mkdir -m 700 -p /root/.ssh
ssh-keygen -q -t ed25519 -N '' -C 'ferry test host' -f /root/.ssh/id_ed25519
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
echo "* $(cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub)" > /etc/ssh/ssh_known_hosts
ldconfig
"#;

/// Names this version of the base system.
pub fn key() -> String {
    let words = [RECIPE, SUITE, MIRROR, FINISH].into_iter().chain(PACKAGES.iter().copied());
    let files = FILES.iter().flat_map(|(path, text)| [*path, *text]);
    cache::key(words.chain(files).map(str::as_bytes))
}

/// The root of the base system; built first where it is missing.
pub fn ensure() -> Result<PathBuf> {
    cache::folder("base", &key(), |new| {
        eprintln!("making the base system from {SUITE} packages (about half a minute, once)");
        build(new)
    })
    .context("make the base system")
}

/// A command in namespaces that end with this process: when it is killed, nothing runs on or stays
/// mounted.
pub(crate) fn alone() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--mount-proc"]);
    command.arg("--kill-child");
    command
}

fn build(new: &Path) -> Result<()> {
    prereq::check_makers()?;
    fs::set_permissions(new, fs::Permissions::from_mode(0o755))?;
    run(alone().args(["mmdebstrap", "--quiet"]).args([
        "--variant=minbase",
        // A mirror of packages may lag behind the date its index is valid until.
        "--aptopt=Acquire::Check-Valid-Until \"false\"",
        "--aptopt=Acquire::Retries \"3\"",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        &format!("--include={}", PACKAGES.join(",")),
        SUITE,
        &new.to_string_lossy(),
        MIRROR,
    ]))?;
    for (path, text) in FILES {
        let path = new.join(path);
        fs::create_dir_all(path.parent().unwrap_or(new))?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    run(Command::new("chroot").arg(new).args(["/bin/sh", "-c", FINISH]))?;
    Ok(())
}
