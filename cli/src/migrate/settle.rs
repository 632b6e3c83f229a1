//! Settling a migration whose driver or agent was lost after the commit.
//!
//! The destination's answer is final: an agent that is asked first waits until no other agent of
//! that migration is left, then reads what the shim there has recorded. No record means that the
//! container was never let run there and, with its restore undone, never will be.

use anyhow::{Context, Result, bail};
use ferry_oci::record::{Decision, Record};

use super::{Options, fault, hostname, source};
use crate::network::address::Cidr;
use crate::transport::Destination;
use crate::transport::link::{Link, unexpected};
use crate::wire::messages::{ContainerdAddress, Outcome, Reply, Request};
use ferry_cli::phase::Phase;

/// Longer than the agent there waits for the one before it.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

/// `ferry migrate` of a container whose last migration was decided and not finished.
///
/// # Errors
/// When the destination cannot be asked, or the container is back here.
pub(super) async fn resume(options: &Options, record: &Record) -> Result<()> {
    if record.destination != options.to.0 {
        bail!(
            "an earlier migration of {} to {} is not finished: run it again with --to {} to \
             settle it",
            record.container,
            record.destination,
            record.destination
        );
    }
    eprintln!("settling migration {} of {}", record.migration, record.container);
    if record.decision == Decision::Retired {
        // Nothing of it is left here, whatever its name may stand for now.
        finish(options, &record.migration).await?;
        return told(options, record);
    }
    let outcome = ask(options, record).await.with_context(|| {
        format!(
            "{} is frozen on {} until {} has been asked",
            record.container,
            hostname(),
            record.destination
        )
    })?;
    act(options, record, outcome, "its driver was lost").await?;
    told(options, record)
}

fn told(options: &Options, record: &Record) -> Result<()> {
    let there = options.to.1.host();
    if options.json {
        let settled = serde_json::json!({
            "container": record.container, "migration": record.migration, "settled": there,
        });
        println!("{settled}");
    } else {
        println!("{} runs on {there}", record.container);
    }
    Ok(())
}

/// Does what the destination's answer demands.
///
/// # Errors
/// When the container is back here, with `why`; or when a step failed.
pub(super) async fn act(
    options: &Options,
    record: &Record,
    outcome: Outcome,
    why: &str,
) -> Result<()> {
    match outcome {
        Outcome::Released => {
            fault::point(Phase::Retire).await;
            let containerd = super::containerd(&options.containerd).await?;
            source::retire(&containerd, &options.containerd, record).await?;
            finish(options, &record.migration).await
        }
        Outcome::NotHere => {
            source::revert(&options.containerd, record).await?;
            bail!(
                "the migration was undone ({why})\n{} runs on {}, its connections alive; run the \
                 same command again to move it",
                record.container,
                hostname()
            )
        }
    }
}

/// `ferry recover`: what the destination would have answered, on the operator's word.
///
/// # Errors
/// When nothing is to be decided, or a step fails.
pub(crate) async fn recover(address: &ContainerdAddress, id: &str, thaw: bool) -> Result<()> {
    let records = Record::all().context("read the records of migrations")?;
    let record = records
        .into_iter()
        .find(|r| {
            r.decision == Decision::Committed
                && r.container == id
                && r.namespace == address.namespace
        })
        .with_context(|| format!("{id} is not frozen by a migration: see ferry status"))?;
    if thaw {
        source::revert(address, &record).await?;
        println!("{id} runs on {}", hostname());
    } else {
        let containerd = super::containerd(address).await?;
        source::retire(&containerd, address, &record).await?;
        source::forget(&record.migration)?;
        println!("{id} has ended on {}", hostname());
    }
    Ok(())
}

/// Tells the destination that nothing is left here; then both have forgotten the migration.
///
/// # Errors
/// When it cannot be told; to be repeated then.
pub(super) async fn finish(options: &Options, migration: &str) -> Result<()> {
    fault::point(Phase::Finish).await;
    let mut link = open(options).await?;
    link.order(&Request::Finish { migration: migration.to_owned() }, PATIENCE).await?;
    source::forget(migration)
}

async fn open(options: &Options) -> Result<Link> {
    let to: &Destination = &options.to.1;
    Link::open(to, &options.agent, options.containerd.clone())
        .await
        .with_context(|| format!("host {}", to.host()))
}

/// Asks the destination who has the container.
///
/// # Errors
/// When it cannot be reached or cannot tell yet.
pub(super) async fn ask(options: &Options, record: &Record) -> Result<Outcome> {
    let ip: Option<Cidr> = record.ip.parse().ok();
    ask_about(options, &record.migration, ip, &record.epoch).await
}

/// [`ask`], for a migration that may have no record here.
///
/// # Errors
/// As [`ask`].
pub(super) async fn ask_about(
    options: &Options,
    migration: &str,
    ip: Option<Cidr>,
    epoch: &str,
) -> Result<Outcome> {
    let mut link = open(options).await?;
    let request = Request::Settle {
        migration: migration.to_owned(),
        container: options.container.clone(),
        ip,
        epoch: epoch.to_owned(),
    };
    match link.ask(&request, PATIENCE).await? {
        Reply::Settled(outcome) => Ok(outcome),
        other => Err(unexpected(&other)),
    }
}
