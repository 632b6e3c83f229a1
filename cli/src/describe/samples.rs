//! Facts that nothing is wrong with, for tests to spoil.

use std::collections::{BTreeMap, BTreeSet};

use ferry_oci::pages::areas::Usage;
use ferry_oci::sockets::{InetSocket, Protocol};

use super::checks::RUNTIME;
use super::container::{Bind, ContainerFacts, Network};
use super::host::HostFacts;
use super::memory::MemoryFacts;

/// A host of that name.
pub(crate) fn host(name: &str) -> HostFacts {
    HostFacts {
        hostname: name.into(),
        boot_id: name.into(),
        kernel: "6.18".into(),
        arch: "x86_64".into(),
        cpu_flags: BTreeSet::from(["avx".to_owned()]),
        cgroups: "v2".into(),
        criu: Some("4.2.1".into()),
        runc: Some("1.3.6".into()),
        nf_tables: true,
        shim: true,
        hide_library: true,
        fast_tar: true,
        awake: true,
        breakpoints: true,
        containerd: "2.1".into(),
        ferry: "0.1.0".into(),
    }
}

/// A redis with one connection.
pub(crate) fn container() -> ContainerFacts {
    ContainerFacts {
        id: "redis".into(),
        namespace: "default".into(),
        image: "redis".into(),
        runtime: RUNTIME.into(),
        snapshotter: "overlayfs".into(),
        sandbox: String::new(),
        labels: BTreeMap::new(),
        status: "running".into(),
        migration: String::new(),
        execs: Vec::new(),
        terminal: false,
        network: Network::Host,
        sockets: vec![listener("0.0.0.0:6379"), connection("10.77.0.100:6379", "10.77.0.254:5")],
        binds: vec![Bind { source: "/etc/hosts".into(), target: "/etc/hosts".into() }],
        joined: Vec::new(),
        shared: Vec::new(),
        user_namespace: false,
        hooks: Vec::new(),
        stopped: None,
        io_uring: Vec::new(),
        resident: 1 << 20,
        memory: MemoryFacts {
            usage: Usage { once: 1 << 20, each: 1 << 20, ..Usage::default() },
            ..MemoryFacts::default()
        },
        processes: 1,
        own_cgroups: Vec::new(),
    }
}

/// A TCP socket.
fn socket(local: &str, remote: &str, listening: bool) -> InetSocket {
    InetSocket {
        protocol: Protocol::Tcp,
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        listening,
        connected: !listening,
        dual_stack: local.starts_with("[::]"),
        inode: 1,
    }
}

/// One that listens.
pub(crate) fn listener(local: &str) -> InetSocket {
    socket(local, "0.0.0.0:0", true)
}

/// One that is connected.
pub(crate) fn connection(local: &str, remote: &str) -> InetSocket {
    socket(local, remote, false)
}
