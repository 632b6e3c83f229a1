//! Each step is taken where the service's description has it, and nowhere else.

use anyhow::{Context, Result, ensure};
use ferry_oci::api::ferry::{
    CheckpointResponse, CompleteRequest, DescribeRequest, DumpResponse, Empty, Keep, Phase,
    PreDumpRequest, PreDumpResponse, PrepareDumpRequest, PrepareDumpResponse, ReleaseResponse,
    RestoreResponse,
};
use ferry_oci::fast::Fast;
use ferry_tests::task::{V3, api};
use ferry_tests::versions::can_checkpoint;
use ferry_tests::{Lab, skip, task_lab};

use crate::bed::{ARRIVES, Bed, COUNT, ID, KEPT, LEAVES, SHIM, connect, request};

/// A host; none where the runtime has no checkpoint.
fn lab() -> Result<Option<Lab>> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(None);
    }
    task_lab().map(Some)
}

#[test]
fn a_container_that_leaves_is_asked_for_in_the_documented_order_alone() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bed = Bed::start(&lab)?;

    // Nothing is under way.
    bed.refuses_all_but(
        &["PreDump", "PrepareDump", "Freeze", "Thaw", "PrepareRestore", "Restore", "Abort"],
        LEAVES,
    )?;
    for method in ["PrepareRestore", "Restore"] {
        let part = "cannot restore a task that is running";
        bed.refused(method, &*request(method, LEAVES), "FAILED_PRECONDITION", part)?;
    }
    for method in ["Thaw", "Abort"] {
        bed.has_nothing_to(method, LEAVES)?;
    }
    let complete =
        CompleteRequest { id: ID.into(), images_path: KEPT.into(), ..Default::default() };
    bed.refused("Complete", &complete, "FAILED_PRECONDITION", "no dump is to be completed")?;
    bed.counts_on()?;

    // Prepared, and given back.
    bed.ask::<PrepareDumpResponse>("PrepareDump", LEAVES)?;
    bed.is_in(Phase::PHASE_PREPARED)?;
    bed.refuses_all_but(&["Freeze", "Thaw"], LEAVES)?;
    let other = request("Freeze", "another-0001");
    bed.refused("Freeze", &*other, "FAILED_PRECONDITION", "leaves-0001 is under way")?;
    bed.counts_on().context("while a dump is prepared")?;
    bed.give_back()?;

    // Frozen, dumped, and given back.
    bed.freeze()?;
    bed.refuses_all_but(&["Dump", "Checkpoint", "Thaw"], LEAVES)?;
    let kept = request("Checkpoint", LEAVES);
    bed.refused("Checkpoint", &*kept, "FAILED_PRECONDITION", "no dump to keep was prepared")?;
    bed.ask::<DumpResponse>("Dump", LEAVES)?;
    bed.is_in(Phase::PHASE_DUMPED)?;
    bed.refuses_all_but(&["Thaw", "Commit"], LEAVES)?;
    bed.stands_still()?;
    bed.give_back()?;

    // Committed, and taken back.
    bed.freeze()?;
    bed.ask::<DumpResponse>("Dump", LEAVES)?;
    bed.ask::<Empty>("Commit", LEAVES)?;
    bed.is_in(Phase::PHASE_COMMITTED)?;
    bed.refuses_all_but(&["Revert", "Retire"], LEAVES)?;
    bed.stands_still()?;
    bed.ask::<Empty>("Revert", LEAVES)?;
    bed.is_in(Phase::PHASE_NONE)?;
    bed.counts_on().context("after a commit that was undone")
}

#[test]
fn a_checkpoint_is_asked_for_in_the_documented_order_alone() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bed = Bed::start(&lab)?;
    let keep = |exit| PrepareDumpRequest {
        id: ID.into(),
        migration: LEAVES.into(),
        limit_s: 300,
        fast: vec![Fast::Freezer.name().to_owned()],
        keep: Some(Keep {
            images_path: format!("{KEPT}/images"),
            work_path: format!("{KEPT}/work"),
            exit,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    for exit in [false, true] {
        bed.ferry.call::<PrepareDumpResponse>("PrepareDump", &keep(exit))?;
        bed.refuses_all_but(&["Freeze", "Thaw"], LEAVES)?;
        bed.freeze()?;
        let dump = request("Dump", LEAVES);
        bed.refused("Dump", &*dump, "FAILED_PRECONDITION", "a dump to keep was prepared")?;
        let done: CheckpointResponse = bed.ask("Checkpoint", LEAVES)?;
        ensure!(!done.incomplete, "there is no pre-dump that it could build on");
        if exit {
            bed.is_in(Phase::PHASE_CHECKPOINTED)?;
            bed.refuses_all_but(&["End", "Thaw"], LEAVES)?;
        } else {
            bed.is_in(Phase::PHASE_FROZEN)?;
            let end = request("End", LEAVES);
            bed.refused("End", &*end, "FAILED_PRECONDITION", "cannot end now")?;
        }
        bed.stands_still()?;
        bed.give_back()?;
        bed.hand.host.run(&format!("test -e {KEPT}/images/inventory.img && rm -rf {KEPT}"))?;
    }

    // Pre-dumps build on the last one alone.
    let pre_dump = |folder: &str, parent: &str| PreDumpRequest {
        id: ID.into(),
        folder: format!("{KEPT}/{folder}"),
        parent: if parent.is_empty() { String::new() } else { format!("{KEPT}/{parent}") },
        ..Default::default()
    };
    let none = "is not the last pre-dump";
    bed.refused("PreDump", &pre_dump("1", "0"), "FAILED_PRECONDITION", none)?;
    bed.ferry.call::<PreDumpResponse>("PreDump", &pre_dump("1", ""))?;
    bed.ferry.call::<PreDumpResponse>("PreDump", &pre_dump("2", "1"))?;
    bed.refused("PreDump", &pre_dump("3", "1"), "FAILED_PRECONDITION", none)?;
    bed.refused("PreDump", &pre_dump("2", "2"), "ALREADY_EXISTS", "there is")?;
    ensure!(bed.describe()?.pre_dump == format!("{KEPT}/2"), "{:?}", bed.describe()?);
    bed.ferry.call::<PreDumpResponse>("PreDump", &pre_dump("3", "2"))?;
    let mut on_top = keep(false);
    on_top.keep.mut_or_insert_default().parent_path = format!("{KEPT}/2");
    let refusal = bed.ferry.call::<PrepareDumpResponse>("PrepareDump", &on_top).err();
    let refusal = refusal.context("it builds on a pre-dump that is not the last one")?;
    ensure!(refusal.code() == "FAILED_PRECONDITION", "{refusal}");
    bed.is_in(Phase::PHASE_NONE)?;
    bed.counts_on()?;
    let all = DescribeRequest { id: ID.into(), ..Default::default() };
    bed.ferry.call::<Empty>("EndPreDumps", &all)?;

    // It ends where it was to end.
    bed.hand.host.run(&format!("rm -rf {KEPT}"))?;
    bed.ferry.call::<PrepareDumpResponse>("PrepareDump", &keep(true))?;
    bed.freeze()?;
    bed.ask::<CheckpointResponse>("Checkpoint", LEAVES)?;
    bed.ask::<Empty>("End", LEAVES)?;
    ensure!(bed.shim.wait(ID, "")? == 137, "it was not killed");
    bed.is_in(Phase::PHASE_NONE)
}

#[test]
fn a_container_that_arrives_is_asked_for_in_the_documented_order_alone() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let Bed { hand, shim, ferry } = {
        let bed = Bed::start(&lab)?;
        bed.freeze()?;
        bed.ask::<DumpResponse>("Dump", LEAVES)?;
        bed.ask::<Empty>("Commit", LEAVES)?;
        bed.ask::<Empty>("Retire", LEAVES)?;
        bed.is_in(Phase::PHASE_RETIRED)?;
        bed.refuses_all_but(&["Retire"], LEAVES)?;
        bed.has_nothing_to("Retire", LEAVES)?;
        bed
    };
    ensure!(shim.wait(ID, "")? == 137, "it was not killed");
    shim.delete(ID, "")?;
    drop((ferry, shim));
    // As an agent would take them.
    let images = format!("/run/ferry/images/{ARRIVES}");
    hand.host.run(&format!(
        "cp -a /run/ferry/images/{LEAVES} {images} && cd {images} && mv inventory.img inventory.img.held"
    ))?;
    hand.clear_but_rules()?;

    let shim = hand.shim(SHIM, ID, V3)?;
    hand.bundle(ID, COUNT)?;
    let create = api::CreateTaskRequest { checkpoint: images, ..hand.create_request(ID) };
    shim.task.call::<api::CreateTaskResponse>("Create", &create)?;
    let ferry = connect(&hand, &shim)?;
    let bed = Bed { hand, shim, ferry };
    bed.is_in(Phase::PHASE_NONE)?;
    let freeze = request("Freeze", ARRIVES);
    bed.refused("Freeze", &*freeze, "FAILED_PRECONDITION", "not running")?;
    bed.ask::<Empty>("PrepareRestore", ARRIVES)?;
    bed.is_in(Phase::PHASE_WAITING)?;
    // A thaw is of the other side.
    bed.refuses_all_but(&["Restore", "Abort", "Thaw"], ARRIVES)?;
    bed.has_nothing_to("Thaw", ARRIVES)?;
    let other = request("Restore", "another-0001");
    bed.refused("Restore", &*other, "FAILED_PRECONDITION", "arrives-0001 is under way")?;
    bed.ask::<RestoreResponse>("Restore", ARRIVES)?;
    bed.is_in(Phase::PHASE_HELD)?;
    bed.refuses_all_but(&["Release", "Abort", "Thaw"], ARRIVES)?;
    bed.has_nothing_to("Thaw", ARRIVES)?;
    bed.stands_still().context("it is held")?;
    bed.ask::<ReleaseResponse>("Release", ARRIVES)?;
    bed.counts_on().context("after the release")?;
    for method in ["Release", "Abort", "Restore", "Commit"] {
        let part = format!("cannot {} now", method.to_lowercase());
        bed.refused(method, &*request(method, ARRIVES), "FAILED_PRECONDITION", &part)?;
    }
    bed.counts_on()?;
    bed.shim.has_not_panicked()
}
