//! The network namespace of a container, as its bundle's spec has it.

use super::Container;
use crate::error::{Context as _, Error, Result};
use ferry_oci::netns::Netns;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::path::{Path, PathBuf};

/// The network that a container lives in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Network {
    /// The host's.
    Host,
    /// A namespace that runc or CRIU makes, and that ends with the container.
    Private,
    /// A namespace that was there before and stays, given by its path.
    Path(PathBuf),
}

impl Network {
    /// Reads the spec of `bundle`.
    pub(crate) fn of(bundle: &Path) -> Result<Self> {
        let config = std::fs::read(bundle.join("config.json")).context("read the bundle's spec")?;
        let spec: Spec = serde_json::from_slice(&config).context("read the bundle's spec")?;
        let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
        let mut namespaces = namespaces.into_iter().flatten();
        Ok(match namespaces.find(|n| n.typ() == LinuxNamespaceType::Network) {
            None => Self::Host,
            Some(namespace) => match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => Self::Path(path.clone()),
                _ => Self::Private,
            },
        })
    }
}

impl Container {
    /// The network namespace that was given to the container by path; `None` if none was.
    pub(crate) fn given_netns(&self) -> Result<Option<Netns>> {
        let Network::Path(path) = Network::of(&self.bundle)? else { return Ok(None) };
        let netns = match self.snapshot().pid {
            0 => Netns::open(&path),
            // Another may have come to the path since it was started.
            pid => Netns::of(pid),
        };
        let netns = netns.context(format!("open the network namespace {}", path.display()))?;
        // What is done to a namespace of the container's would be done to the host's.
        if netns.is_own().context("look at the network namespace")? {
            let text = format!("the network namespace {} is the host's own", path.display());
            return Err(Error::failed_precondition(text));
        }
        Ok(Some(netns))
    }

    /// Where runc and CRIU have to be for images that were, or are to be, made `in_netns`.
    pub(super) fn netns_for_criu(&self, in_netns: bool) -> Result<Option<Netns>> {
        if !in_netns {
            return Ok(None);
        }
        // Restored anywhere else, the container would be in the host's network.
        let none = || Error::failed_precondition("its network namespace is not given by path");
        self.given_netns()?.ok_or_else(none).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_the_host_s_private_or_given_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let of = |namespaces: &str| {
            let text =
                format!(r#"{{"ociVersion":"1.0.0","linux":{{"namespaces":[{namespaces}]}}}}"#);
            std::fs::write(dir.path().join("config.json"), text).unwrap();
            Network::of(dir.path()).unwrap()
        };
        assert_eq!(of(r#"{"type":"pid","path":"/proc/1/ns/pid"}"#), Network::Host);
        assert_eq!(of(r#"{"type":"pid"},{"type":"network"}"#), Network::Private);
        assert_eq!(of(r#"{"type":"network","path":""}"#), Network::Private);
        let given = of(r#"{"type":"network","path":"/run/netns/x"}"#);
        assert_eq!(given, Network::Path("/run/netns/x".into()));
    }
}
