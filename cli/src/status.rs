//! `ferry status`: migrations that were decided and not finished on this host.

use anyhow::{Context, Result};
use ferry_oci::record::{Decision, Record};

/// Prints the records.
///
/// # Errors
/// When they cannot be read.
pub(crate) fn show(json: bool) -> Result<()> {
    let records = Record::all().context("read the records of migrations")?;
    if json {
        println!("{}", serde_json::to_string_pretty(&records)?);
        return Ok(());
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
