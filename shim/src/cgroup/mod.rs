//! The cgroups of a container: what it uses ([`Cgroup::stats`]), and that it ran out of memory
//! ([`oom`]).
//!
//! The files are read here, in the form that containerd's own shim gives to clients; the crate's
//! reader leaves most of it out.

mod files;
pub(crate) mod oom;
mod v1;
mod v2;

use std::path::{Path, PathBuf};

use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use ferry_oci::hierarchies::{self, Member};

use crate::error::{Context as _, Error, Result};

/// Those controllers say which version counts: on a hybrid host they are on v1.
const TELLING: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];

/// The cgroups of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cgroup {
    /// One for each hierarchy.
    V1(Vec<Member>),
    /// The one there is.
    V2(PathBuf),
}

impl Cgroup {
    /// The cgroups that process `pid` is in now, the init of a container: what it may move into
    /// later lies inside them. `path` is the `cgroupsPath` of its spec.
    pub(crate) fn of(pid: u32, path: Option<&Path>) -> Result<Self> {
        let members = hierarchies::of(pid).context("find the cgroups")?;
        let mut members: Vec<_> =
            members.into_iter().map(|member| outermost(member, path)).collect();
        if TELLING.iter().any(|name| members.iter().any(|member| member.has(name))) {
            members.retain(|member| !member.unified);
            return Ok(Self::V1(members));
        }
        let unified = members.into_iter().find(|member| member.unified);
        let unified = unified.ok_or_else(|| Error::not_found("no cgroup hierarchy is mounted"))?;
        Ok(Self::V2(unified.folder))
    }

    /// What the container uses, as `io.containerd.cgroups.v1.Metrics` or `v2.Metrics`; NOT_FOUND
    /// once the cgroups have been removed.
    pub(crate) fn stats(&self) -> Result<Any> {
        let (type_url, value) = match self {
            _ if !self.exists() => return Err(Error::not_found("cgroup does not exist")),
            Self::V1(members) => (v1::TYPE, v1::metrics(members).write_to_bytes()),
            Self::V2(folder) => (v2::TYPE, v2::metrics(folder).write_to_bytes()),
        };
        let value = value.context("encode the metrics")?;
        Ok(Any { type_url: type_url.to_string(), value, ..Default::default() })
    }

    fn exists(&self) -> bool {
        match self {
            Self::V1(members) => members.iter().any(|member| member.folder.is_dir()),
            Self::V2(folder) => folder.is_dir(),
        }
    }

    /// Lets the container's v2 cgroup have all controllers, as far as its parents can hand them on:
    /// without a limit a runtime may leave some out, and then nothing would be counted.
    pub(crate) fn enable_controllers(&self) {
        let Self::V2(folder) = self else { return };
        let mut parents: Vec<_> = folder
            .ancestors()
            .skip(1)
            .take_while(|parent| parent.join("cgroup.subtree_control").exists())
            .collect();
        parents.reverse();
        for parent in parents {
            let controllers = files::read(&parent.join("cgroup.controllers")).unwrap_or_default();
            let controllers: Vec<_> =
                controllers.split_whitespace().map(|name| format!("+{name}")).collect();
            if let Err(err) =
                std::fs::write(parent.join("cgroup.subtree_control"), controllers.join(" "))
            {
                log::debug!("enable controllers below {}: {err}", parent.display());
            }
        }
    }
}

/// A restored init can be in a cgroup inside the container's: `path` says where that ends.
fn outermost(member: Member, path: Option<&Path>) -> Member {
    let path = path.and_then(|path| path.strip_prefix("/").ok()).filter(|p| *p != Path::new(""));
    let folder = path.and_then(|path| member.folder.ancestors().find(|f| f.ends_with(path)));
    match folder.map(Path::to_owned) {
        Some(folder) => Member { folder, ..member },
        None => member,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::ttrpc::Code;

    #[test]
    fn the_cgroups_of_this_process_have_metrics() {
        let cgroup = Cgroup::of(std::process::id(), None).unwrap();
        let stats = cgroup.stats().unwrap();
        let expected = match cgroup {
            Cgroup::V1(_) => "io.containerd.cgroups.v1.Metrics",
            Cgroup::V2(_) => "io.containerd.cgroups.v2.Metrics",
        };
        assert_eq!(stats.type_url, expected);
        assert!(!stats.value.is_empty());
    }

    #[test]
    fn a_removed_cgroup_is_not_found() {
        let gone = Cgroup::V2("/nowhere".into());
        assert_eq!(gone.stats().unwrap_err().code(), Code::NOT_FOUND);
        assert_eq!(Cgroup::V1(vec![]).stats().unwrap_err().code(), Code::NOT_FOUND);
        assert!(Cgroup::of(u32::MAX, None).is_err());
    }

    #[test]
    fn a_cgroup_inside_the_containers_is_left_for_it() {
        let inner = || Member {
            controllers: vec![],
            folder: "/sys/fs/cgroup/default/t/init.scope".into(),
            mounted: "/sys/fs/cgroup".into(),
            unified: true,
        };
        let of = |path: &str| outermost(inner(), Some(Path::new(path))).folder;
        assert_eq!(of("/default/t"), Path::new("/sys/fs/cgroup/default/t"));
        assert_eq!(of("system.slice:runc:t"), inner().folder);
        assert_eq!(of("/"), inner().folder);
        assert_eq!(outermost(inner(), None), inner());
    }
}
