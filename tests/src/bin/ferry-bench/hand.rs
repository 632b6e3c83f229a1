//! The move without ferry, as a careful administrator scripts it.
//!
//! Images lie in memory at both ends, one ssh connection carries them, the address goes before it
//! is added elsewhere, is added before sockets are bound to it, and is announced at once.

use std::fs;

use anyhow::{Context, Result, ensure};
use ferry_tests::Host;
use ferry_tests::scene::FLOATING;

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

/// Run on the host that is left; `$TO` is the other. Prints names and nanoseconds.
const MOVE: &str = r#"
set -eu
resident=$(runc ps hand | awk 'NR > 1 {print "/proc/" $2 "/smaps_rollup"}' |
    xargs awk '/^Rss:/ {sum += $2} END {print sum * 1024}')
echo resident $resident
echo begin $(date +%s%N)
images=/run/hand/images
mkdir -p $images
ssh $TO mkdir -p $images
echo start $(date +%s%N)
runc checkpoint --tcp-established --image-path $images --work-path /run/hand hand
echo checkpoint $(date +%s%N)
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

/// Moves it.
///
/// # Errors
/// When it did not arrive.
pub(crate) fn go(from: &Host, to: &Host) -> Result<Took> {
    for host in [from, to] {
        host.run("rm -rf /run/hand")?;
    }
    let script = format!("TO={}\nFLOATING={FLOATING}\n{MOVE}", to.address());
    let output = from.output(&script)?;
    ensure!(output.status.success(), "the move by hand: {output}");
    read(&output.stdout).with_context(|| format!("read {output}"))
}

/// What [`MOVE`] prints.
fn read(text: &str) -> Result<Took> {
    let lines: Vec<(&str, u64)> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, number)| Some((name, number.parse().ok()?)))
        .collect();
    let names: Vec<_> = lines.iter().map(|(name, _)| *name).collect();
    let wanted = ["resident", "begin", "start", "checkpoint", "copy", "restore"];
    ensure!(names == wanted, "unexpected lines: {names:?}");
    let ms = |from: usize, to: usize| lines[to].1.saturating_sub(lines[from].1) as f64 / 1e6;
    Ok(Took {
        pause_ms: ms(2, 5),
        steps: (3..6).map(|n| (names[n].to_owned(), ms(n - 1, n))).collect(),
        total_ms: ms(1, 5),
        resident: lines[0].1,
        report: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_by_hand_is_from_checkpoint_to_announcement() {
        let text = "resident 4096\nbegin 1000000\nstart 3000000\ncheckpoint 5000000\n\
                    copy 6500000\nrestore 9000000\n";
        let took = read(text).unwrap();
        assert_eq!((took.pause_ms, took.total_ms, took.resident), (6.0, 8.0, 4096));
        let steps: Vec<_> = took.steps.iter().map(|(_, ms)| *ms).collect();
        assert_eq!(steps, [2.0, 1.5, 2.5]);
        assert!(read("resident 1\nbegin 2\n").is_err());
    }
}
