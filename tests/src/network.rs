//! The lab's switch: a bridge in a network namespace that holds nothing else, so that bridges and
//! addresses of parallel labs never meet and the machine's own network gets nothing.

use std::io::Write;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::exec::Entry;

/// The address of host number `n` (1 is `a`).
pub fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, n)
}

/// The last part of the client's address.
pub const CLIENT: u8 = 254;

/// Commands that make the bridge, in the switch's namespace.
pub fn bridge() -> String {
    "link set lo up\n\
     link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0\n\
     link set br0 up\n"
        .into()
}

/// Commands that plug a host in, in the switch's namespace. The host's end moves to the namespace
/// of process `pid` as it is made.
pub fn plug(name: &str, pid: i32) -> String {
    format!(
        "link add port-{name} type veth peer name eth0 netns {pid}\n\
         link set port-{name} master br0\n\
         link set port-{name} up\n"
    )
}

/// Commands that bring a host's end up, in the host's namespace.
pub fn configure(n: u8) -> String {
    let mut commands = format!("address add {}/24 brd + dev eth0\n", address(n));
    if Path::new("/proc/sys/net/ipv6").exists() {
        commands.push_str(&format!("address add fd77::{n:x}/64 dev eth0 nodad\n"));
    }
    commands + "link set eth0 up\n"
}

/// Runs `commands` of `ip -batch` in the network namespace of `entry`.
pub fn ip(entry: &Entry, commands: &str) -> Result<()> {
    let mut child = Command::new("nsenter")
        .args(["-t", &entry.pid.to_string(), "-n", "ip", "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start ip")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(commands.as_bytes()).context("write to ip")?;
    }
    let done = child.wait_with_output().context("wait for ip")?;
    if !done.status.success() {
        bail!("set up the network: {}\n{commands}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(())
}
