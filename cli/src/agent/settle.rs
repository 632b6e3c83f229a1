//! What became of a migration whose driver or agent was lost.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ferry_oci::api::ferry::Phase;
use ferry_oci::record::{Decision, Record};

use super::cleanup;
use crate::agent::cleanup::nft;
use crate::containerd::Containerd;
use crate::lock;
use crate::network::address::{self, Cidr};
use crate::network::announce::gratuitous_arp;
use crate::shim::{self, Shim};
use crate::wire::messages::{ContainerdAddress, Outcome};

/// How long the agent that was lost may take to end.
const OTHER_AGENT: Duration = Duration::from_secs(30);
/// How long a shim may take to roll back, or to release, on its own.
const SHIM: Duration = Duration::from_secs(30);

/// Answers for good: [`Outcome::Released`] when the container was let run here, else everything
/// is undone and the answer is [`Outcome::NotHere`].
///
/// # Errors
/// When it cannot be told yet; nothing has changed then.
pub(super) async fn settle(
    containerd: &Containerd,
    address: &ContainerdAddress,
    migration: &str,
    container: &str,
    ip: Option<Cidr>,
) -> Result<Outcome> {
    let _held = lock::take(migration, OTHER_AGENT).await?;
    wait_for_shim(address, migration, container).await?;
    let store = containerd.destination(migration)?;
    let released = Record::read(migration)?.is_some_and(|r| r.decision == Decision::Released);
    if released {
        if let Some(cidr) = ip
            && let Some(device) = address::device_with(cidr.ip)?
        {
            nft(ferry_oci::quarantine::remove(migration)).await?;
            gratuitous_arp(cidr.ip, &device)?;
        }
        cleanup::keep(&store).await?;
        return Ok(Outcome::Released);
    }
    cleanup::remove(&store, ip).await?;
    Ok(Outcome::NotHere)
}

/// Waits until the shim has decided: its lease has ended with the agent that held it.
async fn wait_for_shim(
    address: &ContainerdAddress,
    migration: &str,
    container: &str,
) -> Result<()> {
    let bundle = shim::bundle(&address.socket, &address.namespace, container);
    let start = Instant::now();
    loop {
        // A shim that does not answer is gone, and what it held with it.
        let Ok(Some(shim)) = Shim::connect(&bundle, container).await else { return Ok(()) };
        let Ok(description) = shim.describe().await else { return Ok(()) };
        let undecided = matches!(
            description.phase.enum_value_or_default(),
            Phase::PHASE_RESTORING | Phase::PHASE_HELD
        );
        if description.migration != migration || !undecided {
            return Ok(());
        }
        if start.elapsed() > SHIM {
            bail!("the shim of {container} still holds it: try again");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
