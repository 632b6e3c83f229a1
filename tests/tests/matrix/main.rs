//! The Task API, call by call: ferry's shim and the reference are asked the same in every state, and
//! where they answer differently [`differences`] says why. What they answer is in the
//! table that `hack/test --all` shows.

mod asked;
mod contents;
mod deaths;
mod differences;
mod events;
mod fuzz;
mod many;
mod states;
mod streams;

use anyhow::{Result, ensure};
use ferry_tests::table;
use ferry_tests::task::{V2, V3};
use ferry_tests::versions::{Containerd, chosen};

/// The programs, in the order of the table's columns.
const SHIMS: [&str; 2] = ["containerd-shim-ferry-v2", "containerd-shim-runc-v2"];

/// The Task service that both shims have.
fn service() -> Result<&'static str> {
    Ok(if chosen()?.0 == Containerd::V1_7 { V2 } else { V3 })
}

/// What was done, and what came of it, in order.
type Answers = Vec<(String, String)>;

/// Adds the answers of both shims to the table.
fn show(area: &str, [ferry, reference]: &[Answers; 2]) -> Result<()> {
    let cases =
        |answers: &Answers| answers.iter().map(|(case, _)| case.clone()).collect::<Vec<_>>();
    ensure!(cases(ferry) == cases(reference), "not the same was done with both: {ferry:?}");
    let mut pairs = ferry.iter().zip(reference);
    pairs.try_for_each(|((case, ferry), (_, reference))| table::row(area, case, ferry, reference))
}

/// [`show`], and fails where they differ and nobody has said why.
fn compare(area: &str, both: [Answers; 2]) -> Result<()> {
    show(area, &both)?;
    let [ferry, reference] = &both;
    let wrong: Vec<_> = ferry
        .iter()
        .zip(reference)
        .map(|((case, ferry), (_, reference))| (case, ferry, reference))
        .filter(|(case, ferry, reference)| {
            ferry != reference && !differences::is_wanted(area, case, ferry, reference)
        })
        .map(|(case, ferry, reference)| format!("{case}: ferry {ferry}, reference {reference}"))
        .collect();
    ensure!(wrong.is_empty(), "{area}: answers that are not as wanted:\n{}", wrong.join("\n"));
    Ok(())
}
