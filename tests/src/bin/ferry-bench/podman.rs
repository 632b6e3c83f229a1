//! The move with podman: checkpoint with export, copy, restore with import.
//!
//! Its archive is not compressed (that takes longer than it saves here) and lies in memory at both ends.

use anyhow::Result;
use ferry_tests::Host;
use ferry_tests::podman::{SETUP, load};
use ferry_tests::scene::FLOATING;

use crate::script;
use crate::ways::Took;
use crate::workloads::Workload;

/// Id of its container.
const ID: &str = "bench";

/// Run on the host that is left. `pod` is defined in the shell there too.
const MOVE: &str = r#"
resident $(pod top bench hpid | tail -n +2)
at begin
mkdir /run/bench
ssh $TO mkdir /run/bench
at start
pod container checkpoint --tcp-established --compress none --export /run/bench/archive bench \
    >/dev/null
at checkpoint
ip addr del $FLOATING/24 dev eth0
ssh $TO "
    set -eu
    $SETUP
    cat >/run/bench/archive
    echo copy \$(date +%s%N)
    ip addr add $FLOATING/24 dev eth0
    pod container restore --tcp-established --import /run/bench/archive >/dev/null
    arping -q -A -c 1 -I eth0 $FLOATING
    echo restore \$(date +%s%N)" </run/bench/archive
pod rm --force bench >/dev/null
at end
"#;

/// Removes what podman has on a host where it has been used; to be appended to a script.
pub(crate) fn clean() -> String {
    format!("if [ -d /var/lib/containerd/podman ]; then {SETUP}\npod rm --force --all; fi")
}

/// Starts `workload` on `host`, with its image on both.
///
/// # Errors
/// When it does not start, or the hosts have no podman.
pub(crate) fn start(workload: Workload, host: &Host, other: &Host) -> Result<()> {
    let image = workload.image();
    for host in [host, other] {
        load(host, image)?;
    }
    host.run(&format!(
        "ip addr add {FLOATING}/24 dev eth0\n{SETUP}
        pod run --detach --name {ID} --network host --log-driver none {image} {} >/dev/null",
        workload.command()
    ))?;
    Ok(())
}

/// Moves it.
///
/// # Errors
/// When it did not arrive.
pub(crate) fn go(from: &Host, to: &Host) -> Result<Took> {
    // In double quotes there, it must survive one more shell.
    let setup = format!("SETUP={}\n{SETUP}", quote(SETUP));
    script::run(from, to, &format!("{setup}\n{MOVE}"), &["checkpoint", "copy", "restore"])
}

/// `text` as one word of a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn a_quoted_text_is_one_word() {
        assert_eq!(quote("a 'b' $c"), r"'a '\''b'\'' $c'");
    }
}
