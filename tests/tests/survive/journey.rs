//! The ways that an item goes, and what comes of each.

use anyhow::{Result, bail};
use ferry_tests::{skip, table};

use crate::bed::{Bed, bed};
use crate::container::Container;
use crate::ferried::by_commands;
use crate::item::Item;

const FERRY: &str = "containerd-shim-ferry-v2";
const REFERENCE: &str = "containerd-shim-runc-v2";

/// Asks for the reference's column of the table too, which takes half as long again.
const WITH_REFERENCE: &str = "FERRY_SURVIVE_REFERENCE";

/// All of them; fails where the item has not survived and nobody has said why.
pub(crate) fn all_ways(item: &Item) -> Result<()> {
    let bed = bed()?;
    let stayed = on_one_host(bed, *item, "same", FERRY);
    let crossed = by_commands(bed, *item);
    let reference = match std::env::var_os(WITH_REFERENCE) {
        Some(_) => told(&on_one_host(bed, *item, "reference", REFERENCE)),
        None => "not tried".to_owned(),
    };
    table::survivor(item.name, &told(&stayed), &told(&crossed), &reference)?;
    let refused = |outcome: &Result<()>| {
        let text = outcome.as_ref().err().map(|err| format!("{err:#}")).unwrap_or_default();
        text.contains("Can't get rlimit 0: Operation not permitted")
    };
    if item.other_user && !may_read_limits()? && refused(&stayed) && refused(&crossed) {
        skip("CRIU cannot dump tasks of other users here: CAP_SYS_RESOURCE is missing");
        return Ok(());
    }
    let mut wrong = Vec::new();
    for (way, outcome) in [("on the same host", &stayed), ("from a to b", &crossed)] {
        match (outcome, item.lost) {
            (Ok(()), None) => {}
            (Ok(()), Some(why)) => wrong.push(format!("{way}: it survives, although {why}")),
            // All of it, for who asks by --nocapture.
            (Err(err), Some(why)) if format!("{err:#}").contains(why) => println!("{way}: {err:#}"),
            (Err(err), _) => wrong.push(format!("{way}: {err:#}")),
        }
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{}: {}", item.name, wrong.join("\n")) }
}

fn on_one_host(bed: &'static Bed, item: Item, way: &str, program: &'static str) -> Result<()> {
    let id = format!("{}-{way}", item.name);
    let container = Container::start(&bed.a, item, &id, program)?;
    let mut container = container.checkpoint()?.restore()?;
    container.look()?;
    container.end()
}

/// Whether this process has CAP_SYS_RESOURCE.
fn may_read_limits() -> Result<bool> {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap_or_default();
    Ok(u64::from_str_radix(line, 16)? & CAP_SYS_RESOURCE != 0)
}

/// For the table.
fn told(outcome: &Result<()>) -> String {
    match outcome {
        Ok(()) => "survives".to_owned(),
        Err(err) => format!("{err:#}"),
    }
}
