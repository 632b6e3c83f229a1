//! Firewall rules that a dump leaves behind when CRIU or the shim is killed in it: CRIU's own table, and
//! the lock on the connections of a container that was to end. Notes in the bundle name them until they
//! have gone, or are to stay.

use crate::container::Network;
use crate::error::{Context as _, Result};
use ferry_oci::criu::{self, Locked};
use ferry_oci::netns::Netns;
use ferry_oci::quarantine::{self, connections};
use std::io::ErrorKind::NotFound;
use std::path::{Path, PathBuf};

/// CRIU's log of a dump, in its work folder.
pub(crate) const DUMP_LOG: &str = "dump.log";
/// Note of the folder that CRIU works in.
const WORK: &str = "ferry-dump-work";
/// Note of the id of a lock.
const LOCK: &str = "ferry-lock";
/// How much of a run's id a table's name has at least, if there is that much.
const MIN_ID: usize = 16;

/// A note in the bundle, until it is dropped.
#[derive(Debug)]
pub(crate) struct Note(PathBuf);

impl Note {
    /// A dump is to be made, with its log in the folder `work`.
    pub(crate) fn of_work(bundle: &Path, work: &Path) -> Result<Self> {
        Self::write(bundle.join(WORK), work.as_os_str().as_encoded_bytes())
    }

    /// The connections of a container that is to end are locked under `id`.
    pub(crate) fn of_lock(bundle: &Path, id: &str) -> Result<Self> {
        Self::write(bundle.join(LOCK), id.as_bytes())
    }

    fn write(path: PathBuf, text: &[u8]) -> Result<Self> {
        std::fs::write(&path, text).context("note in the bundle what a dump locks")?;
        Ok(Self(path))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Removes what the dump left that was under way in `bundle`, whose shim and container have ended.
pub(crate) fn remove_noted(bundle: &Path) -> Result<()> {
    let work = noted(&bundle.join(WORK)).context("read which dump was made")?;
    let table = work.map_or(Ok(()), |work| remove_criu_table(bundle, None, work.as_ref()));
    let lock = noted(&bundle.join(LOCK)).context("read what a dump has locked")?;
    let lock = lock.filter(|id| Locked::is_id(id));
    lock.map_or(Ok(()), |id| inside(bundle, None, || connections::unlock(&id)))?;
    table
}

fn noted(path: &Path) -> std::io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Err(err) if err.kind() == NotFound => Ok(None),
        text => text.map(Some),
    }
}

/// Removes the table of the CRIU that has, or had, its log in `work`, and no other. `pid` is a process of
/// the container.
pub(crate) fn remove_criu_table(bundle: &Path, pid: Option<u32>, work: &Path) -> Result<()> {
    let runs = criu::run_ids(&work.join(DUMP_LOG)).unwrap_or_default();
    if runs.is_empty() {
        return Ok(());
    }
    inside(bundle, pid, || {
        let tables = quarantine::tables()?;
        let ours = tables.iter().filter(|table| runs.iter().any(|run| is_of(table, run)));
        ours.into_iter().try_for_each(|table| quarantine::remove_table(table))
    })
}

/// Whether a table is that of the run of CRIU with the id `run`, which cuts off what is too long for it.
fn is_of(table: &str, run: &str) -> bool {
    let start = table.strip_prefix("CRIU-").filter(|start| start.len() >= MIN_ID.min(run.len()));
    start.is_some_and(|start| run.starts_with(start))
}

/// Does `work` in the container's network; not at all in one that has ended with it.
pub(crate) fn inside(
    bundle: &Path,
    pid: Option<u32>,
    work: impl FnOnce() -> std::result::Result<(), quarantine::Error> + Send,
) -> Result<()> {
    let network = Network::of(bundle)?;
    let netns = match (&network, pid.map(Netns::of)) {
        (Network::Host, _) => return work().context("change the firewall's rules"),
        (Network::Private, None) => return Ok(()),
        // Another may have come to the path since it was started.
        (_, Some(Ok(netns))) => Ok(netns),
        (Network::Path(path), _) => Netns::open(path),
        (Network::Private, Some(Err(err))) => Err(err),
    };
    let netns = match netns {
        Err(err) if err.kind() == NotFound => return Ok(()),
        netns => netns.context("open the network namespace")?,
    };
    netns.run(work).context("enter the network namespace")?.context("change its firewall's rules")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_told_by_as_much_of_its_run_as_is_in_its_name() {
        let run = "790052e8-99be-45df-97aa-0123456789ab";
        for table in ["CRIU-790052e8-99be-45df-97", &format!("CRIU-{run}")] {
            assert!(is_of(table, run), "{table}");
        }
        for table in
            ["CRIU-", "CRIU-79", "CRIU-790052e8-99be-45df-98", "790052e8-99be-45df-97", "x"]
        {
            assert!(!is_of(table, run), "{table}");
        }
        assert!(is_of("CRIU-5d2a-77", "5d2a-77") && !is_of("CRIU-5d2a-7", "5d2a-77"));
    }
}
