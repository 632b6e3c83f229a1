//! `ferry status`: migrations that were decided and not finished on this host, and memory that is kept
//! for the next attempt of those that failed.

use anyhow::{Context, Result};
use ferry_oci::record::{Decision, Record};

use crate::pages;

/// Prints the records.
///
/// # Errors
/// When they cannot be read.
pub(crate) fn show(json: bool) -> Result<()> {
    let records = Record::all().context("read the records of migrations")?;
    let kept = pages::kept()?;
    if json {
        let all = serde_json::json!({ "migrations": records, "pages": kept });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    for store in kept {
        let until = match store.expires_s {
            Some(seconds) => format!(
                "{} MiB of memory are kept for the next attempt, for {} s more (ferry drop)",
                store.bytes >> 20,
                seconds
            ),
            None => "memory is being received or served".to_owned(),
        };
        println!("{}\t{}\t{until}", store.migration, store.name.replacen('.', "/", 1));
    }
    for record in records {
        let what = match record.decision {
            Decision::Committed => format!(
                "is frozen here or runs on {to}: run ferry migrate {id} --to {to} again",
                to = record.destination,
                id = record.container
            ),
            Decision::Retired => format!(
                "runs on {to}, which has not been told that nothing is left here: run ferry \
                 migrate {id} --to {to} again",
                to = record.destination,
                id = record.container
            ),
            Decision::Released => "runs here; its source has not finished".to_owned(),
            Decision::Failed => "came here and did not run; its source brings it back".to_owned(),
        };
        println!("{}\t{}/{}\t{what}", record.migration, record.namespace, record.container);
    }
    Ok(())
}
