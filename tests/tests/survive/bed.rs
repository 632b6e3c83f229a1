//! Two hosts that all tests of this file share: starting some takes longer than what an item takes.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result, anyhow};
use ferry_tests::by_hand::ByHand;
use ferry_tests::lab::built;
use ferry_tests::{Lab, images};

/// What the containers' files lie in, on a real disk of the host.
pub(crate) const PLACE: &str = "/var/lib/containerd/survive";
/// Both hosts.
pub(crate) struct Bed {
    pub(crate) a: ByHand<'static>,
    pub(crate) b: ByHand<'static>,
    /// Its input ends with this process, and the hosts with it: nothing drops what is shared.
    _holder: Mutex<Child>,
}

/// The hosts; started by whoever asks first.
pub(crate) fn bed() -> Result<&'static Bed> {
    static BED: OnceLock<Result<Bed, String>> = OnceLock::new();
    let bed = BED.get_or_init(|| start().map_err(|err| format!("{err:#}")));
    bed.as_ref().map_err(|err| anyhow!("{err}"))
}

fn start() -> Result<Bed> {
    static LAB: OnceLock<Lab> = OnceLock::new();
    // On a test machine it is not where it was built.
    let program = built("testbed").context("testbed is not built")?;
    let mut holder = Command::new(program)
        .args(["hold", "--hosts", "2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the hosts")?;
    let lines = BufReader::new(holder.stdout.take().context("no output")?).lines();
    let mut said = Vec::new();
    for line in lines {
        said.push(line.context("read what it says")?);
        if said.last().is_some_and(|line| line.starts_with("floating")) {
            break;
        }
    }
    let id = said.first().context("the hosts do not start")?;
    let lab = Lab::attach(id)?.context("the hosts do not run")?;
    let lab = LAB.get_or_init(|| lab);
    let program = images::folder()?.join("ferry-survive");
    for host in lab.hosts() {
        host.run(&format!(
            "set -e; mkdir -p {PLACE}/lower; cd {PLACE}/lower; mkdir -p bind dev etc proc scratch sys var"
        ))?;
        host.install(&program, &format!("{PLACE}/lower/ferry-survive"))?;
    }
    let [a, b] = [ByHand::on(lab.host("a"))?, ByHand::on(lab.host("b"))?];
    Ok(Bed { a, b, _holder: Mutex::new(holder) })
}
