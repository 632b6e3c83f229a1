//! What only some labs need, laid over the base system. A layer is made when it is first asked for
//! and cached. Every version that is pinned stands here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base;
use crate::cache;
use crate::exec::run;
use crate::golang::Module;

/// A layer, and what it is made from.
#[derive(Debug)]
pub struct Layer {
    /// Its name, in the cache too. None begins with another's and a hyphen.
    pub name: &'static str,
    /// Packages of the base system's release, installed with what they need.
    packages: &'static [&'static str],
    /// Packages of [`OLDER`], unpacked without what they need.
    older: &'static [&'static str],
    /// Programs for `/usr/bin`.
    modules: &'static [Module],
    /// Links to programs: from, to.
    links: &'static [(&'static str, &'static str)],
    /// Files: path and text.
    files: &'static [(&'static str, &'static str)],
}

/// Debian 13.
const OLDER: &str = "trixie";

const EMPTY: Layer =
    Layer { name: "", packages: &[], older: &[], modules: &[], links: &[], files: &[] };

/// podman, for the comparison and for the archives that it makes and takes.
pub const PODMAN: Layer = Layer { name: "podman", packages: &["podman"], ..EMPTY };

/// What else reads those archives.
pub const CHECKPOINTCTL: Layer =
    Layer { name: "checkpointctl", packages: &["checkpointctl"], ..EMPTY };

/// containerd 1.7.24 and runc 1.1.15. CRIU stays the base system's: Debian 13's cannot dump sockets
/// on newer kernels.
pub const CONTAINERD_1_7: Layer = Layer {
    name: "containerd1.7",
    older: &["containerd", "runc"],
    files: &[("etc/containerd/config.toml", include_str!("../host/containerd-1.toml"))],
    ..EMPTY
};

const CONTAINERD: Module = Module {
    path: "github.com/containerd/containerd/v2",
    packages: &["cmd/containerd", "cmd/containerd-shim-runc-v2", "cmd/ctr"],
    tags: "no_btrfs no_devmapper",
    ..Module::PLAIN
};

/// The newest of the long-term line.
pub const CONTAINERD_2_3: Layer = Layer {
    name: "containerd2.3",
    modules: &[Module { version: "v2.3.7", ..CONTAINERD }],
    ..EMPTY
};

/// The newest of all.
pub const CONTAINERD_2_4: Layer = Layer {
    name: "containerd2.4",
    modules: &[Module { version: "v2.4.2", ..CONTAINERD }],
    ..EMPTY
};

/// The newest runc, found first.
pub const RUNC: Layer = Layer {
    name: "runc",
    modules: &[Module {
        path: "github.com/opencontainers/runc",
        version: "v1.5.3",
        tags: "seccomp",
        library: Some("libseccomp"),
        ..Module::PLAIN
    }],
    links: &[("usr/local/sbin/runc", "/usr/bin/runc")],
    ..EMPTY
};

/// crun beside runc.
pub const CRUN: Layer = Layer { name: "crun", packages: &["crun"], ..EMPTY };

/// crun where runc is looked for. To be laid over [`CRUN`].
pub const CRUN_FOR_RUNC: Layer =
    Layer { name: "crun_for_runc", links: &[("usr/local/sbin/runc", "/usr/bin/crun")], ..EMPTY };

/// What snapshotters of file systems of their own make those with.
pub const FILE_SYSTEMS: Layer =
    Layer { name: "file_systems", packages: &["e2fsprogs", "erofs-utils"], ..EMPTY };

/// Debian's CNI plugins, in `/usr/lib/cni` and where containerd looks for them.
pub const CNI: Layer = Layer {
    name: "cni",
    packages: &["containernetworking-plugins"],
    links: &[("opt/cni/bin", "/usr/lib/cni")],
    ..EMPTY
};

/// nerdctl; its networks need [`CNI`].
pub const NERDCTL: Layer = Layer {
    name: "nerdctl",
    modules: &[Module {
        path: "github.com/containerd/nerdctl/v2",
        version: "v2.2.2",
        packages: &["cmd/nerdctl"],
        // Used by its tests alone.
        stub: Some((
            "github.com/containerd/nerdctl/mod/tigron",
            "tig",
            "type T interface {\n\tHelper()\n\tFailNow()\n\tFail()\n\tLog(...any)\n\tName() string\n\tTempDir() string\n}",
        )),
        ..Module::PLAIN
    }],
    ..EMPTY
};

/// The client of a container runtime for Kubernetes.
pub const CRICTL: Layer = Layer {
    name: "crictl",
    modules: &[Module {
        path: "sigs.k8s.io/cri-tools",
        version: "v1.37.0",
        packages: &["cmd/crictl"],
        ..Module::PLAIN
    }],
    files: &[("etc/crictl.yaml", include_str!("../host/crictl.yaml"))],
    ..EMPTY
};

/// A registry of images for `localhost:5000`.
pub const REGISTRY: Layer = Layer {
    name: "registry",
    packages: &["docker-registry"],
    files: &[("etc/registry.yml", include_str!("../host/registry.yml"))],
    ..EMPTY
};

/// containerd 2 with its CRI plugin; needs [`CNI`].
pub const CRI: Layer = Layer {
    name: "cri",
    files: &[
        ("etc/containerd/config.toml", include_str!("../host/cri.toml")),
        ("etc/cni/net.d/10-ferry.conflist", include_str!("../host/cni.json")),
    ],
    ..EMPTY
};

/// [`CRI`] for containerd 1.7.
pub const CRI_1_7: Layer = Layer {
    name: "cri1.7",
    files: &[
        ("etc/containerd/config.toml", include_str!("../host/cri-1.toml")),
        ("etc/cni/net.d/10-ferry.conflist", include_str!("../host/cni.json")),
    ],
    ..EMPTY
};

/// All layers.
pub const ALL: &[&Layer] = &[
    &PODMAN,
    &CHECKPOINTCTL,
    &CONTAINERD_1_7,
    &CONTAINERD_2_3,
    &CONTAINERD_2_4,
    &RUNC,
    &CRUN,
    &CRUN_FOR_RUNC,
    &FILE_SYSTEMS,
    &CNI,
    &NERDCTL,
    &CRICTL,
    &REGISTRY,
    &CRI,
    &CRI_1_7,
];

/// Unpacks or installs packages: `$1` is the base system, `$2` the layer's folder, `$3` the release
/// to unpack from or nothing, `$4` the mirror; the rest are packages. Nothing may start a service.
const PACKAGES: &str = r#"
set -e
base=$1 new=$2 release=$3 mirror=$4
shift 4
mkdir "$new/work" "$new/root"
mount -t overlay overlay "$new/root" -o "lowerdir=$base,upperdir=$new/upper,workdir=$new/work"
cd "$new/root"
mount -t proc proc proc
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom; do
    mknod -m 666 "dev/$node" c "$(stat -c 0x%t "/dev/$node")" "$(stat -c 0x%T "/dev/$node")"
done
ln -s /proc/self/fd dev/fd
export DEBIAN_FRONTEND=noninteractive
apt() {
    chroot . apt-get --quiet -o Acquire::Check-Valid-Until=false -o Acquire::Retries=3 "$@"
}
if [ -n "$release" ]; then
    echo "deb $mirror $release main" >tmp/sources
    mkdir -p tmp/lists/partial tmp/packages
    older() {
        apt -o Dir::Etc::SourceList=/tmp/sources -o Dir::Etc::SourceParts=- \
            -o Dir::State::Lists=/tmp/lists -o APT::Sandbox::User=root "$@"
    }
    older update
    for package in "$@"; do
        # Named with its release, since the base system has a newer one installed.
        older download "$package/$release"
    done
    for file in *.deb; do
        chroot . dpkg-deb --extract "/$file" /
        rm "$file"
    done
    rm -rf var/cache/apt
else
    printf '#!/bin/sh\nexit 101\n' >usr/sbin/policy-rc.d
    chmod 755 usr/sbin/policy-rc.d
    apt update
    apt install --yes --no-install-recommends "$@"
    apt clean
    rm -rf usr/sbin/policy-rc.d var/lib/apt/lists
fi
cd /
umount --recursive "$new/root"
rm -rf "$new/root" "$new/work"
"#;

impl Layer {
    /// Names this version of it.
    fn key(&self) -> String {
        let recipe = format!("{self:?}");
        let mut parts = vec![recipe];
        if !self.packages.is_empty() || !self.older.is_empty() {
            parts.extend([base::key(), OLDER.to_owned(), PACKAGES.to_owned()]);
        }
        cache::key(parts.iter().map(String::as_bytes))
    }

    /// Where it is; made first where it is missing.
    pub fn ensure(&self) -> Result<PathBuf> {
        let layer = cache::folder(self.name, &self.key(), |new| {
            eprintln!("making the layer {} (once)", self.name);
            self.build(new)
        });
        Ok(layer.with_context(|| format!("make the layer {}", self.name))?.join("upper"))
    }

    /// Why it is not here and cannot be made here.
    pub fn missing(&self) -> Option<String> {
        if self.place().is_dir() {
            return None;
        }
        self.modules.iter().find_map(Module::missing)
    }

    /// Where this version of it is kept.
    pub(crate) fn place(&self) -> PathBuf {
        cache::place(self.name, &self.key())
    }

    fn build(&self, new: &Path) -> Result<()> {
        let upper = new.join("upper");
        fs::create_dir(&upper).context("make the layer's folder")?;
        for (release, packages) in [("", self.packages), (OLDER, self.older)] {
            if packages.is_empty() {
                continue;
            }
            let mut command = base::alone();
            command.args(["/bin/sh", "-c", PACKAGES, "packages"]).arg(base::ensure()?).arg(new);
            run(command.args([release, base::MIRROR]).args(packages))?;
        }
        for module in self.modules {
            let programs = upper.join("usr/bin");
            fs::create_dir_all(&programs).context("make the folder of programs")?;
            module.build(&programs)?;
        }
        let below = |path: &str| -> Result<PathBuf> {
            let path = upper.join(path);
            fs::create_dir_all(path.parent().unwrap_or(&upper))
                .with_context(|| format!("make the folder of {}", path.display()))?;
            Ok(path)
        };
        for (from, to) in self.links {
            std::os::unix::fs::symlink(to, below(from)?).with_context(|| format!("link {from}"))?;
        }
        for (path, text) in self.files {
            fs::write(below(path)?, text).with_context(|| format!("write {path}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_layer_is_taken_for_another_one_in_the_cache() {
        for (n, layer) in ALL.iter().enumerate() {
            for other in ALL.iter().skip(n + 1) {
                assert_ne!(layer.name, other.name);
                for (a, b) in [(layer, other), (other, layer)] {
                    assert!(!a.name.starts_with(&format!("{}-", b.name)), "{}", a.name);
                }
                assert_ne!(layer.key(), other.key());
            }
        }
    }
}
