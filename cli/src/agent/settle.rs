//! What became of a migration whose driver or agent was lost.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::api::ferry::Phase;
use ferry_oci::paths;
use ferry_oci::record::{Decision, Record};

use super::cleanup;
use crate::containerd::Containerd;
use crate::lock;
use crate::network::address::{self, Cidr};
use crate::shim::{self, Shim};
use crate::wire::messages::{ContainerdAddress, Outcome};

/// How long the agent that was lost may take to end: longer than a release does.
const OTHER_AGENT: Duration = Duration::from_secs(75);
/// How long a shim may take to roll back, or to release, on its own.
const SHIM: Duration = Duration::from_secs(20);

/// What the source asks.
pub(super) struct Question {
    pub(super) migration: String,
    pub(super) container: String,
    pub(super) ip: Option<Cidr>,
    pub(super) epoch: String,
}

/// Answers for good: [`Outcome::Released`] when the container was let run here, else everything
/// is undone and the answer is [`Outcome::NotHere`]. The record of a release stays until the
/// source says that it has finished.
///
/// # Errors
/// When it cannot be told yet, or not everything could be undone: to be asked again.
pub(super) async fn settle(
    containerd: &Containerd,
    address: &ContainerdAddress,
    question: &Question,
) -> Result<Outcome> {
    let Question { migration, container, ip, epoch: theirs } = question;
    ensure!(paths::is_migration_id(migration), "{migration:?} is no id of a migration");
    ensure!(paths::is_container_id(container), "{container:?} is no id of a container");
    let _held = lock::take(migration, OTHER_AGENT).await?;
    let phase = wait_for_shim(address, migration, container).await?;
    let record = Record::read(migration)?;
    if record.is_none() && !theirs.is_empty() && *theirs != epoch()? {
        bail!(
            "this host has restarted since {container} was committed to it: whether it ran here \
             until then is not known. Look at what is here, then run ferry recover {container} --thaw or --end \
             on the source"
        );
    }
    let released = match record.map(|r| r.decision) {
        Some(Decision::Released) if phase == Some(Phase::PHASE_FAILED) => false,
        Some(Decision::Released) => !decide_against(migration)?,
        _ => false,
    };
    if released {
        if let Some(cidr) = ip
            && let Some(device) = address::device_with(cidr.ip)?
        {
            cleanup::announce(migration, *cidr, &device).await;
        }
        return Ok(Outcome::Released);
    }
    cleanup::remove(&containerd.destination(migration)?, *ip).await?;
    Ok(Outcome::NotHere)
}

/// Makes permanent what a migration created here. Can be repeated.
///
/// # Errors
/// When containerd refuses.
pub(super) async fn finish(containerd: &Containerd, migration: &str) -> Result<()> {
    ensure!(paths::is_migration_id(migration), "{migration:?} is no id of a migration");
    let _held = lock::take(migration, OTHER_AGENT).await?;
    cleanup::keep(&containerd.destination(migration)?).await
}

/// What differs after every start of this host: state below `/run` is lost with it.
///
/// # Errors
/// When it can be neither read nor made.
pub(super) fn epoch() -> Result<String> {
    let path = Path::new(paths::EPOCH);
    fs::create_dir_all(paths::RUN).with_context(|| format!("create {}", paths::RUN))?;
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(mut file) => {
            let random = fs::read_to_string("/proc/sys/kernel/random/uuid").context("an epoch")?;
            file.write_all(random.trim().as_bytes()).context("write the epoch")?;
            Ok(random.trim().to_owned())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(fs::read_to_string(path).context("read the epoch")?.trim().to_owned())
        }
        Err(error) => Err(error).with_context(|| format!("write {}", paths::EPOCH)),
    }
}

/// Decides that the container never runs here, unless the restore has decided that it does.
fn decide_against(migration: &str) -> Result<bool> {
    match OpenOptions::new().write(true).create_new(true).open(paths::decided(migration)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).context("decide the migration"),
    }
}

/// Waits until the shim has decided: its lease has ended with the agent that held it. The phase
/// of this migration; `None` when the shim is gone, and what it held with it.
async fn wait_for_shim(
    address: &ContainerdAddress,
    migration: &str,
    container: &str,
) -> Result<Option<Phase>> {
    let bundle = shim::bundle(&address.socket, &address.namespace, container);
    let start = Instant::now();
    loop {
        let Some(shim) = Shim::connect(&bundle, container).await? else { return Ok(None) };
        let Some(description) = shim.find().await? else { return Ok(None) };
        if description.migration != migration {
            return Ok(None);
        }
        let phase = description.phase.enum_value_or_default();
        use Phase as P;
        let undecided = [P::PHASE_RESTORING, P::PHASE_WAITING, P::PHASE_HELD, P::PHASE_RELEASING]
            .contains(&phase);
        if !undecided {
            return Ok(Some(phase));
        }
        if start.elapsed() > SHIM {
            bail!("the shim of {container} has not decided yet ({phase:?}): ask again");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
