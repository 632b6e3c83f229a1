//! Whether the connections of a checkpoint can come back: on an address that is where the container will be.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::criu::{DumpRecord, Locked};
use ferry_oci::netns::Netns;
use serde_json::Value;

use super::spec::given_network;
use crate::network::address::{self, Cidr};

/// Refuses to restore connections whose address is not in the network of `spec`, and an address that is to come to
/// the host for a container that is not in its network.
///
/// # Errors
/// With what is missing, and how to have it there.
pub(super) fn check(spec: &Value, record: Option<&DumpRecord>, comes: Option<Cidr>) -> Result<()> {
    let locked = record.and_then(|record| record.options.locked.as_ref());
    match given_network(spec) {
        Some(path) => given(path, locked, comes),
        None => hosts(locked, comes),
    }
}

/// In the host's network.
fn hosts(locked: Option<&Locked>, comes: Option<Cidr>) -> Result<()> {
    for connection in locked.iter().flat_map(|locked| &locked.connections) {
        let ip = connection.local.ip().to_canonical();
        let here = ip.is_loopback()
            || comes.is_some_and(|cidr| cidr.ip == ip)
            || address::device_with(ip)?.is_some();
        ensure!(
            here,
            "the connection to {} is on {ip}, which is not here: give --ip {ip}/PREFIX to have it come",
            connection.remote
        );
    }
    Ok(())
}

/// In a namespace given by its `path`, whose addresses are not the host's.
fn given(path: &str, locked: Option<&Locked>, comes: Option<Cidr>) -> Result<()> {
    if let Some(Cidr { ip, .. }) = comes {
        bail!(
            "the container is in the network namespace {path}, and --ip brings {ip} to the host's: leave --ip \
             out, and have {ip} in there (nsenter --net={path} ip addr add {ip}/PREFIX dev DEVICE)"
        );
    }
    ensure!(
        Path::new(path).exists(),
        "the container's network namespace {path} is not here: make it, with the container's addresses"
    );
    let Some(locked) = locked else { return Ok(()) };
    let netns = Netns::open(path.as_ref()).with_context(|| format!("open {path}"))?;
    let missing = netns.run(|| missing(locked));
    let missing = missing.with_context(|| {
        format!("enter the container's network namespace {path}, which has to be one")
    })?;
    let Some((remote, ip)) = missing.with_context(|| format!("list the addresses in {path}"))?
    else {
        return Ok(());
    };
    let cure = match ip.is_loopback() {
        true => "link set lo up".to_owned(),
        false => format!("addr add {ip}/PREFIX dev DEVICE"),
    };
    bail!(
        "the connection to {remote} is on {ip}, which the container's network namespace {path} does not \
         have: nsenter --net={path} ip {cure}"
    )
}

/// The first connection whose address the calling thread's network namespace does not have: its peer, and that
/// address.
fn missing(locked: &Locked) -> io::Result<Option<(SocketAddr, IpAddr)>> {
    for connection in &locked.connections {
        let ip = connection.local.ip().to_canonical();
        // All of 127.0.0.0/8 comes with its first address, once lo is up.
        let device_of = match ip {
            IpAddr::V4(v4) if v4.is_loopback() => Ipv4Addr::LOCALHOST.into(),
            _ => ip,
        };
        if address::device_with(device_of)?.is_none() {
            return Ok(Some((connection.remote, ip)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    use ferry_oci::criu::DumpOptions;
    use ferry_oci::quarantine::connections::Connection;
    use serde_json::json;

    use super::*;

    fn record(local: &str) -> DumpRecord {
        let (local, remote) = (local.parse().unwrap(), "192.0.2.9:5000".parse().unwrap());
        let connections = vec![Connection { local, remote }];
        let locked = Locked { id: "0123456789abcdef".into(), until: 0, connections };
        let options = DumpOptions { locked: Some(locked), ..DumpOptions::default() };
        DumpRecord::new(options, String::new(), String::new())
    }

    /// A process in a network namespace of its own, until it is dropped.
    struct Elsewhere(Child);

    impl Elsewhere {
        fn start(commands: &str) -> Self {
            let mut child = Command::new("unshare")
                .args(["--net", "sh", "-ec", &format!("{commands}; echo; read _")])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            Self(child)
        }

        fn spec(&self) -> Value {
            let path = format!("/proc/{}/ns/net", self.0.id());
            json!({"linux": {"namespaces": [{"type": "network", "path": path}]}})
        }
    }

    impl Drop for Elsewhere {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            let _ = self.0.wait();
        }
    }

    fn refusal(spec: &Value, local: &str, comes: Option<&str>) -> Option<String> {
        let comes = comes.map(|cidr| cidr.parse().unwrap());
        check(spec, Some(&record(local)), comes).err().map(|error| format!("{error:#}"))
    }

    #[test]
    fn on_the_host_an_address_is_there_or_comes() {
        let spec = json!({"linux": {"namespaces": [{"type": "pid"}]}});
        assert_eq!(refusal(&spec, "127.0.0.1:80", None), None);
        assert_eq!(refusal(&spec, "10.99.0.5:80", Some("10.99.0.5/24")), None);
        let refused = refusal(&spec, "10.99.0.5:80", None).unwrap();
        assert!(refused.contains("give --ip 10.99.0.5/PREFIX"), "{refused}");
        assert!(check(&spec, None, None).is_ok());
    }

    #[test]
    fn a_given_namespace_is_asked_for_its_own_addresses() {
        let there = Elsewhere::start(
            "ip link set lo up; ip addr add 10.99.0.5/32 dev lo; ip addr add 10.99.0.6/32 dev lo",
        );
        let spec = there.spec();
        for local in ["10.99.0.5:80", "10.99.0.6:80", "127.0.0.1:80", "127.0.0.9:80"] {
            assert_eq!(refusal(&spec, local, None), None, "{local}");
        }
        let refused = refusal(&spec, "10.99.0.7:80", None).unwrap();
        let cure = format!("/proc/{}/ns/net ip addr add 10.99.0.7/PREFIX", there.0.id());
        assert!(refused.contains("192.0.2.9:5000") && refused.contains(&cure), "{refused}");
        // The host's are of no use.
        let down = Elsewhere::start("true");
        let refused = refusal(&down.spec(), "127.0.0.1:80", None).unwrap();
        assert!(refused.contains("ip link set lo up"), "{refused}");
    }

    #[test]
    fn an_address_is_not_brought_to_the_host_for_a_given_namespace() {
        let there = Elsewhere::start("ip link set lo up; ip addr add 10.99.0.5/32 dev lo");
        let refused = refusal(&there.spec(), "10.99.0.5:80", Some("10.99.0.5/24")).unwrap();
        assert!(refused.contains("leave --ip out"), "{refused}");
        let comes = Some("10.99.0.5/24".parse().unwrap());
        assert!(check(&there.spec(), None, comes).is_err());
    }

    #[test]
    fn what_is_no_namespace_is_named() {
        let at = |path: &str| json!({"linux": {"namespaces": [{"type": "network", "path": path}]}});
        let refused = check(&at("/run/netns/there-is-no-such"), None, None).unwrap_err();
        assert!(refused.to_string().contains("is not here: make it"), "{refused:#}");
        let refused = refusal(&at("/proc/version"), "127.0.0.1:80", None).unwrap();
        assert!(refused.contains("/proc/version"), "{refused}");
    }
}
