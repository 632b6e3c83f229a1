//! The move without ferry, as a careful administrator scripts it, with stock runc and CRIU: all
//! memory in the pause, or fetched after it by CRIU's lazy pages.
//!
//! Images lie in memory at both ends, one ssh connection carries them, the address goes before it
//! is added elsewhere, is added before sockets are bound to it, and is announced at once.

use std::fs;

use anyhow::{Context, Result};
use ferry_tests::Host;
use ferry_tests::scene::FLOATING;

use crate::script;
use crate::ways::Took;
use crate::workloads::Workload;

/// The bundle: root file system and configuration are those that containerd would give the same
/// container, and lie on both hosts before anything moves.
const BUNDLE: &str = r#"
set -e
rm -rf /var/lib/containerd/hand
mkdir -p /var/lib/containerd/hand/rootfs /mnt/image
cd /var/lib/containerd/hand
ctr image mount $IMAGE /mnt/image >/dev/null
cp -a /mnt/image/. rootfs
# With its snapshot, which carries the name of the folder: another image would not be mounted.
ctr image unmount --rm /mnt/image >/dev/null
"#;

/// The start. A container whose output is a file of the host could not be dumped.
const START: &str = "ip addr add $FLOATING/24 dev eth0; cd /var/lib/containerd/hand
rm -f /tmp/runc.log
runc --log /tmp/runc.log run --detach hand </dev/null >/dev/null 2>&1 ||
    { cat /tmp/runc.log >&2; exit 1; }";

/// Run on the host that is left.
const MOVE: &str = r#"
resident $(runc ps hand | awk 'NR > 1 {print $2}')
at begin
images=/run/hand/images
mkdir -p $images
ssh $TO mkdir -p $images
at start
runc checkpoint --tcp-established --tcp-skip-in-flight --image-path $images --work-path /run/hand hand
at checkpoint
ip addr del $FLOATING/24 dev eth0
tar -C $images -cf - . | ssh $TO "
    set -eu
    tar -C $images -xf -
    echo copy \$(date +%s%N)
    ip addr add $FLOATING/24 dev eth0
    runc restore --detach --tcp-established --bundle /var/lib/containerd/hand \
        --image-path $images --work-path /run/hand hand </dev/null >/dev/null 2>&1
    arping -q -A -c 1 -I eth0 $FLOATING
    echo restore \$(date +%s%N)"
"#;

/// The same with lazy pages: CRIU says when it would serve them, the images without memory are
/// copied, and a daemon there fetches the memory from the source while the container runs. The
/// source's tasks end, by runc, when the last page has been fetched.
const MOVE_LAZY: &str = r#"
resident $(runc ps hand | awk 'NR > 1 {print $2}')
at begin
images=/run/hand/images
mkdir -p $images
mkfifo /run/hand/ready
ssh $TO mkdir -p $images
at start
runc checkpoint --tcp-established --tcp-skip-in-flight --lazy-pages --page-server $FROM:27000 --status-fd 5 \
    --image-path $images --work-path /run/hand hand 5>/run/hand/ready >/run/hand/log 2>&1 &
# Only when it is ready there is a byte: the pipe also ends with a runc that fails.
[ $(head -c 1 /run/hand/ready | wc -c) = 1 ] || { cat /run/hand/log >&2; exit 1; }
at checkpoint
ip addr del $FLOATING/24 dev eth0
tar -C $images -cf - . | ssh $TO "
    set -eu
    tar -C $images -xf -
    echo copy \$(date +%s%N)
    criu lazy-pages --page-server --address $FROM --port 27000 \
        --images-dir $images --work-dir /run/hand --log-file lazy.log </dev/null >/dev/null 2>&1 &
    ip addr add $FLOATING/24 dev eth0
    until [ -S /run/hand/lazy-pages.socket ]; do sleep 0.001; done
    runc restore --detach --tcp-established --lazy-pages --bundle /var/lib/containerd/hand \
        --image-path $images --work-path /run/hand hand </dev/null >/dev/null 2>&1
    arping -q -A -c 1 -I eth0 $FLOATING
    echo restore \$(date +%s%N)
    wait \$! || { tail -n 5 /run/hand/lazy.log >&2; exit 1; }"
wait $! || { cat /run/hand/log >&2; exit 1; }
at end
"#;

/// Starts `workload` on `host`, with its bundle on both.
///
/// # Errors
/// When it does not start.
pub(crate) fn start(workload: Workload, host: &Host, other: &Host) -> Result<()> {
    let image = workload.image();
    for host in [host, other] {
        host.run(&format!("IMAGE={image}\n{BUNDLE}"))?;
    }
    let config = "var/lib/containerd/hand/config.json";
    host.run(&format!(
        "set -e
        ctr container create --net-host {image} hand {}
        ctr container info --spec hand >/{config}
        ctr container rm hand",
        workload.command()
    ))?;
    fs::copy(host.root().join(config), other.root().join(config))
        .context("copy the configuration")?;
    host.run(&format!("FLOATING={FLOATING}\n{START}"))?;
    Ok(())
}

/// Moves it, its memory after the pause if `lazy`.
///
/// # Errors
/// When it did not arrive.
pub(crate) fn go(from: &Host, to: &Host, lazy: bool) -> Result<Took> {
    let script = if lazy { MOVE_LAZY } else { MOVE };
    script::run(from, to, script, &["checkpoint", "copy", "restore"])
}
