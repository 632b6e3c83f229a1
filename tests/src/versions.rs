//! Which containerd and runc the tests of the Task API have their hosts run. The environment says:
//!
//! ```text
//! FERRY_CONTAINERD   2.1 (Debian testing's; the default), 1.7 (Debian 13's), 2.3, 2.4
//! FERRY_RUNC         debian (with the two newest containerds: newest), newest, crun
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::{Lab, host_name};
use crate::layers::{self, Layer};

/// A containerd, with the ctr and the shim of its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Containerd {
    /// 1.7, of Debian 13, with its runc.
    V1_7,
    /// 2.1, of the base system.
    V2_1,
    /// The newest 2.3.
    V2_3,
    /// The newest 2.4.
    V2_4,
}

/// What the shims find as `runc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runc {
    /// The one that comes with containerd.
    Debian,
    /// The newest.
    Newest,
    /// crun.
    Crun,
}

impl Containerd {
    /// What [`Self::layers`] has it from, if the base system has it not.
    fn layer(self) -> Option<&'static Layer> {
        match self {
            Self::V1_7 => Some(&layers::CONTAINERD_1_7),
            Self::V2_1 => None,
            Self::V2_3 => Some(&layers::CONTAINERD_2_3),
            Self::V2_4 => Some(&layers::CONTAINERD_2_4),
        }
    }

    /// The runc that it is used with by people.
    fn runc(self) -> Runc {
        match self {
            Self::V1_7 | Self::V2_1 => Runc::Debian,
            Self::V2_3 | Self::V2_4 => Runc::Newest,
        }
    }

    /// The layer that turns its CRI plugin on.
    pub fn cri(self) -> &'static Layer {
        if self == Self::V1_7 { &layers::CRI_1_7 } else { &layers::CRI }
    }
}

impl Runc {
    fn layers(self) -> &'static [&'static Layer] {
        match self {
            Self::Debian => &[],
            Self::Newest => &[&layers::RUNC],
            Self::Crun => &[&layers::CRUN_FOR_RUNC, &layers::CRUN],
        }
    }
}

/// What the environment asks for.
///
/// # Errors
/// When it asks for something unknown.
pub fn chosen() -> Result<(Containerd, Runc)> {
    let asked = |name| std::env::var(name).unwrap_or_default();
    choose(&asked("FERRY_CONTAINERD"), &asked("FERRY_RUNC"))
}

fn choose(containerd: &str, runc: &str) -> Result<(Containerd, Runc)> {
    let containerd = match containerd {
        "1.7" => Containerd::V1_7,
        "" | "2.1" => Containerd::V2_1,
        "2.3" => Containerd::V2_3,
        "2.4" => Containerd::V2_4,
        other => bail!("FERRY_CONTAINERD is {other:?}; say 1.7, 2.1, 2.3 or 2.4"),
    };
    let runc = match runc {
        "" => containerd.runc(),
        "debian" => Runc::Debian,
        "newest" => Runc::Newest,
        "crun" => Runc::Crun,
        other => bail!("FERRY_RUNC is {other:?}; say debian, newest or crun"),
    };
    Ok((containerd, runc))
}

/// Whether the runc that is asked for can checkpoint. Debian's crun cannot without its libcriu.
pub fn can_checkpoint() -> Result<bool> {
    Ok(chosen()?.1 != Runc::Crun)
}

/// The layers of a containerd and a runc, the uppermost first.
pub fn layers_of(containerd: Containerd, runc: Runc) -> Vec<&'static Layer> {
    runc.layers().iter().copied().chain(containerd.layer()).collect()
}

/// Makes the layers that are missing; the paths of all.
pub fn ensure_layers(layers: &[&Layer]) -> Result<Vec<PathBuf>> {
    layers.iter().map(|layer| layer.ensure()).collect()
}

/// A host for tests of the Task API: with the containerd and runc that the environment asks for, and
/// with ferry's programs.
pub fn task_lab() -> Result<Lab> {
    task_lab_over(&[])
}

/// [`task_lab`] with more layers, the uppermost first.
pub fn task_lab_over(more: &[&Layer]) -> Result<Lab> {
    task_hosts(1, more)
}

/// [`task_lab_over`] with several hosts.
pub fn task_hosts(hosts: u8, more: &[&Layer]) -> Result<Lab> {
    let (containerd, runc) = chosen()?;
    let all: Vec<_> = more.iter().copied().chain(layers_of(containerd, runc)).collect();
    let layers = ensure_layers(&all)?;
    let lab = Lab::start_over(hosts, &layers).context("start hosts for the Task API")?;
    if runc == Runc::Crun {
        for n in 1..=hosts {
            // crun refuses a second hierarchy with controllers beside those of version 1.
            // Where it was mounted, it would make folders that are no cgroups.
            lab.host(&host_name(n)).run(
                "cd /sys/fs/cgroup; ! mountpoint -q unified || { umount unified && rmdir unified; }",
            )?;
        }
    }
    let shim = "containerd-shim-ferry-v2";
    let installed = lab.install_ferry()?;
    ensure!(installed.iter().any(|path| path.ends_with(shim)), "{shim} has not been built");
    Ok(lab)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_containerds_run_the_newest_runc_unless_told_otherwise() -> Result<()> {
        assert_eq!(choose("", "")?, (Containerd::V2_1, Runc::Debian));
        assert_eq!(choose("1.7", "")?, (Containerd::V1_7, Runc::Debian));
        assert_eq!(choose("2.4", "")?, (Containerd::V2_4, Runc::Newest));
        assert_eq!(choose("2.4", "crun")?, (Containerd::V2_4, Runc::Crun));
        assert!(choose("2.5", "").is_err() && choose("", "runsc").is_err());
        Ok(())
    }
}
