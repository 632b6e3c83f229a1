//! Settling a migration whose driver or agent was lost after the commit.
//!
//! The destination's answer is final: an agent that is asked first waits until no other agent of
//! that migration is left, then reads what the shim there has recorded. No record means that the
//! container was never let run there and, with its restore undone, never will be.

use anyhow::{Context, Result, bail};
use ferry_oci::record::Record;

use super::{Options, hostname, source};
use crate::network::address::Cidr;
use crate::transport::link::{Link, unexpected};
use crate::transport::ssh::Destination;
use crate::wire::messages::{Outcome, Reply, Request};

/// Longer than the agent there waits for the one before it.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(100);

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
    let outcome = ask(options, record).await.with_context(|| {
        format!(
            "{} is frozen on {} until {} has been asked",
            record.container,
            hostname(),
            record.destination
        )
    })?;
    act(options, record, outcome, "its driver was lost").await?;
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
            let containerd = super::containerd(&options.containerd).await?;
            source::retire(&containerd, &options.containerd, record).await?;
            source::forget(&record.migration)
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

/// Asks the destination who has the container.
///
/// # Errors
/// When it cannot be reached or cannot tell yet.
pub(super) async fn ask(options: &Options, record: &Record) -> Result<Outcome> {
    let ip: Option<Cidr> = record.ip.parse().ok();
    ask_about(options, &record.migration, ip).await
}

/// [`ask`], for a migration that may have no record here.
///
/// # Errors
/// As [`ask`].
pub(super) async fn ask_about(
    options: &Options,
    migration: &str,
    ip: Option<Cidr>,
) -> Result<Outcome> {
    let to: &Destination = &options.to.1;
    let mut link = Link::open(to, &options.agent, options.containerd.clone())
        .await
        .with_context(|| format!("host {}", to.host()))?;
    let request = Request::Settle {
        migration: migration.to_owned(),
        container: options.container.clone(),
        ip,
    };
    match link.ask(&request, PATIENCE).await? {
        Reply::Settled(outcome) => Ok(outcome),
        other => Err(unexpected(&other)),
    }
}
