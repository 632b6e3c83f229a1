//! Requests with something wrong in them.

use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_oci::api::ferry::{
    CompleteRequest, DescribeRequest, FreezeRequest, Keep, MigrationRequest, PreDumpRequest,
    PrepareDumpRequest, RestoreRequest,
};
use ferry_tests::task::Refusal;
use ferry_tests::task_lab;

use crate::bed::{Bed, ID, KEPT, LEAVES, STEPS, request};

/// The start of a move with nothing wrong in it.
fn prepare() -> PrepareDumpRequest {
    PrepareDumpRequest {
        id: ID.into(),
        migration: LEAVES.into(),
        limit_s: 300,
        ..Default::default()
    }
}

#[test]
fn what_names_nothing_or_something_else_is_refused_and_changes_nothing() -> Result<()> {
    let lab = task_lab()?;
    let bed = Bed::start(&lab)?;
    let long = "x".repeat(1000);
    for migration in ["", "short", "a/b-000001", "CAPITALS-1", long.as_str()] {
        for method in STEPS.iter().filter(|method| **method != "PreDump") {
            let asked = request(method, migration);
            bed.refused(method, &*asked, "INVALID_ARGUMENT", "is no migration's id")?;
        }
    }
    for id in ["", "../s", long.as_str()] {
        let asked = DescribeRequest { id: id.into(), ..Default::default() };
        for method in ["Describe", "OpenPages", "EndPreDumps", "PreDump"] {
            // A relative folder is looked for later.
            bed.refused(method, &asked, "NOT_FOUND", "not created")?;
        }
        let asked =
            MigrationRequest { id: id.into(), migration: LEAVES.into(), ..Default::default() };
        for method in STEPS.iter().filter(|method| **method != "PreDump") {
            bed.refused(method, &asked, "NOT_FOUND", "not created")?;
        }
    }
    for images_path in
        ["", "images", "/etc", "/run/ferry/images/leaves-0001/..", "/run/ferry/images"]
    {
        let asked = RestoreRequest {
            id: ID.into(),
            migration: LEAVES.into(),
            images_path: images_path.into(),
            ..Default::default()
        };
        for method in ["PrepareRestore", "Restore"] {
            bed.refused(method, &asked, "INVALID_ARGUMENT", "images are expected in")?;
        }
    }
    for path in ["", "relative/path"] {
        let no_path = "is no absolute path";
        let asked = PreDumpRequest { id: ID.into(), folder: path.into(), ..Default::default() };
        bed.refused("PreDump", &asked, "INVALID_ARGUMENT", no_path)?;
        let asked =
            CompleteRequest { id: ID.into(), images_path: path.into(), ..Default::default() };
        bed.refused("Complete", &asked, "INVALID_ARGUMENT", no_path)?;
        for (images, work) in [(path, KEPT), (KEPT, path)] {
            let keep =
                Keep { images_path: images.into(), work_path: work.into(), ..Default::default() };
            let asked = PrepareDumpRequest { keep: Some(keep).into(), ..prepare() };
            bed.refused("PrepareDump", &asked, "INVALID_ARGUMENT", no_path)?;
        }
    }
    for address in ["", "localhost", "10.0.0.1/24", long.as_str()] {
        let lock_addresses = vec![address.to_owned()];
        let asked = PrepareDumpRequest { lock_addresses: lock_addresses.clone(), ..prepare() };
        bed.refused("PrepareDump", &asked, "INVALID_ARGUMENT", "is no IP address")?;
        let asked = FreezeRequest {
            id: ID.into(),
            migration: LEAVES.into(),
            limit_s: 300,
            lock_addresses,
            ..Default::default()
        };
        bed.refused("Freeze", &asked, "INVALID_ARGUMENT", "is no IP address")?;
    }
    let asked = PrepareDumpRequest { hide_folder: "/etc".into(), ..prepare() };
    bed.refused("PrepareDump", &asked, "INVALID_ARGUMENT", "orders are expected in")?;
    // What is no message at all.
    for method in STEPS.iter().chain(&["Describe", "Complete", "OpenPages", "Nothing"]) {
        let before = bed.state()?;
        let answer = bed.ferry.raw(method, vec![0xff; 1 << 16], Duration::from_secs(60));
        let refused = matches!(answer, Err(Refusal::Status(..)));
        ensure!(refused && bed.state()? == before, "{method}: {answer:?}");
    }
    bed.counts_on()?;
    bed.shim.has_not_panicked()
}
