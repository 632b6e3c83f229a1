//! Test hosts: several container hosts on one machine, each with its own kernel namespaces.
//!
//! ```text
//!  lab (a unique id, so that labs of parallel tests never meet)
//!
//!   host a 10.77.0.1      host b 10.77.0.2      client 10.77.0.254
//!   containerd, sshd      containerd, sshd      redis-cli, tcpdump, ...
//!        |eth0                 |eth0                 |eth0
//!  ------+------- bridge in a network namespace -----+------
//!                 of the lab's own: the switch
//! ```
//!
//! A host is the first process of fresh network, mount, pid, uts, ipc, cgroup and time namespaces.
//! Its root is an overlay over the one cached [base] system. Nothing is shared between hosts:
//! neither `/dev/shm`, `/run` and `/tmp` nor cgroups, clocks or descriptors; only the folder
//! [`host::SHARED`], for Unix sockets between them.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let lab = ferry_tests::Lab::start(2)?;
//! lab.host("a").run("ctr run -d docker.io/library/redis:latest redis")?;
//! let job = lab.client().spawn("exec tcpdump -nn -i eth0 arp")?;
//! lab.host("a").run("ssh b true")?;
//! println!("{}", job.stop()?.stdout);
//! # Ok(())
//! # }
//! ```
//!
//! A lab ends when it is dropped, also by a panic. What a killed test leaves behind is found and
//! removed by the next lab that starts (see [sweep]).

pub mod base;
pub mod by_hand;
pub mod cache;
pub mod cgroup;
pub mod containers;
pub mod counter;
pub mod ctr;
pub mod events;
pub mod exec;
pub mod faults;
pub mod golang;
pub mod host;
pub mod images;
pub mod lab;
pub mod layers;
pub mod memory;
pub mod network;
pub mod podman;
pub mod prereq;
pub mod process;
pub mod scene;
pub mod sweep;
pub mod table;
pub mod tally;
pub mod task;
pub mod versions;

pub use exec::{Job, Output};
pub use host::Host;
pub use lab::Lab;
pub use scene::Scene;
pub use versions::task_lab;

/// Says that this test cannot be made here and why; `hack/test` counts it as skipped. The test then
/// returns.
pub fn skip(reason: &str) {
    use std::io::Write;
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    // Not print: the test runner would keep that to itself.
    let _ = writeln!(std::io::stderr(), "\nskipped: {name}: {reason}");
}

/// How often a test repeats something: `usual` times, or a tenth of that on a machine so slow that
/// `FERRY_TEST_FEW` is set.
pub fn times(usual: usize) -> usize {
    if std::env::var_os("FERRY_TEST_FEW").is_some() { usual.div_ceil(10) } else { usual }
}
