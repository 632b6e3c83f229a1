//! The Ferry service asked directly: who may, in which order, and with what.

mod arguments;
mod bed;
mod order;

use anyhow::{Result, ensure};
use ferry_tests::by_hand::ByHand;
use ferry_tests::task::V3;
use ferry_tests::task_lab;

use bed::{COUNT, ID, SHIM};

/// Connects to a socket.
const CONNECT: &str = "import socket, sys
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
    print('connected')
except OSError as error:
    print(type(error).__name__)
";

#[test]
fn only_root_may_connect() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    let hand = ByHand::on(host)?;
    let shim = hand.shim(SHIM, ID, V3)?;
    hand.create(&shim, ID, COUNT)?;
    let socket = format!("/run/ferry/s/{}.sock", shim.pid);
    std::fs::write(host.root().join("tmp/connect.py"), CONNECT)?;
    let root = format!("python3 /tmp/connect.py {socket}");
    let nobody = format!("setpriv --reuid 65534 --regid 65534 --clear-groups {root}");
    let says = |command: &str| Ok::<_, anyhow::Error>(host.run(command)?.stdout);
    ensure!(says(&root)? == "connected\n", "there is nobody");
    ensure!(says(&nobody)? == "PermissionError\n", "a user may connect");
    let modes = says(&format!("stat -c '%a %u' /run/ferry/s {socket}"))?;
    ensure!(modes == "700 0\n600 0\n", "{modes}");
    // Neither keeps others out only because the other one does.
    host.run("chmod 755 /run/ferry /run/ferry/s")?;
    ensure!(says(&nobody)? == "PermissionError\n", "the socket lets a user in");
    host.run(&format!("chmod 700 /run/ferry/s; chmod 666 {socket}"))?;
    ensure!(says(&nobody)? == "PermissionError\n", "the folder lets a user in");
    host.run("chmod 755 /run/ferry/s")?;
    ensure!(says(&nobody)? == "connected\n", "it is something else that keeps a user out");
    Ok(())
}
