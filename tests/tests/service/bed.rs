//! A container whose Ferry service is asked by a client of the test's own.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_oci::api::ferry::{
    CommitRequest, DescribeRequest, Description, Empty, FreezeRequest, FreezeResponse,
    MigrationRequest, Phase, PreDumpRequest, PrepareDumpRequest, RestoreRequest,
};
use ferry_oci::fast::Fast;
use ferry_tests::Lab;
use ferry_tests::by_hand::{ByHand, Shim};
use ferry_tests::ctr::until;
use ferry_tests::task::protobuf::{Message, MessageDyn};
use ferry_tests::task::{Task, V3};

pub(crate) const SHIM: &str = "containerd-shim-ferry-v2";
pub(crate) const ID: &str = "s";
/// A migration that leaves, and one that arrives.
pub(crate) const LEAVES: &str = "leaves-0001";
pub(crate) const ARRIVES: &str = "arrives-0001";
/// Counts in a file.
pub(crate) const COUNT: &[&str] =
    &["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/count; usleep 10000; done"];
/// That file, on the host.
const COUNTED: &str = "/var/lib/containerd/by-hand/count";
/// Where the images of a checkpoint and its pre-dumps go.
pub(crate) const KEPT: &str = "/var/tmp/kept";
/// What the service may leave on the host.
const FILES: &str = "find /run/ferry /var/tmp ! -type d ! -name epoch ! -name '*.sock' | sort";
/// Every method that is a step of a migration.
pub(crate) const STEPS: [&str; 14] = [
    "PreDump",
    "PrepareDump",
    "Freeze",
    "Dump",
    "Checkpoint",
    "End",
    "Thaw",
    "Commit",
    "Revert",
    "Retire",
    "PrepareRestore",
    "Restore",
    "Release",
    "Abort",
];

/// A request of `method` with nothing wrong in it.
pub(crate) fn request(method: &str, migration: &str) -> Box<dyn MessageDyn> {
    let (id, migration) = (ID.to_owned(), migration.to_owned());
    let (limit_s, fast) = (300, vec![Fast::Freezer.name().to_owned()]);
    match method {
        "PreDump" => {
            let folder = format!("{KEPT}/new");
            Box::new(PreDumpRequest { id, folder, ..Default::default() })
        }
        "PrepareDump" => {
            Box::new(PrepareDumpRequest { id, migration, limit_s, fast, ..Default::default() })
        }
        "Freeze" => Box::new(FreezeRequest { id, migration, limit_s, fast, ..Default::default() }),
        "Commit" => Box::new(CommitRequest { id, migration, ..Default::default() }),
        "PrepareRestore" | "Restore" => {
            let images_path = format!("/run/ferry/images/{migration}");
            Box::new(RestoreRequest { id, migration, images_path, ..Default::default() })
        }
        _ => Box::new(MigrationRequest { id, migration, ..Default::default() }),
    }
}

/// A container whose shim is asked.
pub(crate) struct Bed<'a> {
    pub(crate) hand: ByHand<'a>,
    pub(crate) shim: Shim,
    pub(crate) ferry: Task,
}

impl<'a> Bed<'a> {
    /// One that counts.
    pub(crate) fn start(lab: &'a Lab) -> Result<Self> {
        let hand = ByHand::on(lab.host("a"))?;
        let shim = hand.shim(SHIM, ID, V3)?;
        hand.create(&shim, ID, COUNT)?;
        shim.start(ID, "")?;
        let ferry = connect(&hand, &shim)?;
        let bed = Self { hand, shim, ferry };
        bed.counts_on()?;
        Ok(bed)
    }

    pub(crate) fn ask<R: Message>(&self, method: &str, migration: &str) -> Result<R> {
        let answer = self.ferry.call(method, &*request(method, migration));
        answer.with_context(|| format!("ask for {method}"))
    }

    pub(crate) fn describe(&self) -> Result<Description> {
        let request = DescribeRequest { id: ID.into(), ..Default::default() };
        Ok(self.ferry.call("Describe", &request)?)
    }

    /// What none of the refused may change. Its processes come and go.
    pub(crate) fn state(&self) -> Result<(Description, String)> {
        let mut description = self.describe()?;
        description.pids.clear();
        Ok((description, self.hand.host.run(FILES)?.stdout))
    }

    pub(crate) fn is_in(&self, phase: Phase) -> Result<()> {
        let now = self.describe()?.phase.enum_value();
        ensure!(now == Ok(phase), "the phase is {now:?}, not {phase:?}");
        Ok(())
    }

    /// Fails unless `request` is refused with `code` and `part`, and changes nothing.
    pub(crate) fn refused(
        &self,
        method: &str,
        request: &dyn MessageDyn,
        code: &str,
        part: &str,
    ) -> Result<()> {
        let before = self.state()?;
        let answer = self.ferry.call::<Empty>(method, request);
        let refusal = answer.err().with_context(|| format!("{method} was not refused"))?;
        ensure!(refusal.code() == code, "{method}: {refusal}");
        ensure!(refusal.to_string().contains(part), "{method}: no {part:?} in {refusal}");
        let after = self.state()?;
        ensure!(after == before, "{method} has changed {before:?} to {after:?}");
        Ok(())
    }

    /// Fails unless all steps but those that are `legal` are refused by their names.
    pub(crate) fn refuses_all_but(&self, legal: &[&str], migration: &str) -> Result<()> {
        let phase = self.describe()?.phase;
        for method in STEPS.iter().filter(|method| !legal.contains(method)) {
            let part = format!("cannot {} now", method.to_lowercase());
            let asked = request(method, migration);
            let refused = self.refused(method, &*asked, "FAILED_PRECONDITION", &part);
            refused.with_context(|| format!("in {phase:?}"))?;
        }
        Ok(())
    }

    /// Asks for what has nothing to do, and changes nothing.
    pub(crate) fn has_nothing_to(&self, method: &str, migration: &str) -> Result<()> {
        let before = self.state()?;
        self.ask::<Empty>(method, migration)?;
        let after = self.state()?;
        ensure!(after == before, "{method} has changed {before:?} to {after:?}");
        Ok(())
    }

    pub(crate) fn counted(&self) -> String {
        std::fs::read_to_string(self.hand.path(COUNTED)).unwrap_or_default()
    }

    /// Waits until the container has counted on.
    pub(crate) fn counts_on(&self) -> Result<()> {
        let counted = || self.counted().trim().parse::<u64>().ok();
        let mut before = counted();
        until("the container counts on", || {
            before = before.or_else(counted);
            Ok(counted() > before)
        })
    }

    pub(crate) fn stands_still(&self) -> Result<()> {
        let before = self.counted();
        std::thread::sleep(Duration::from_millis(200));
        ensure!(self.counted() == before, "it counts");
        Ok(())
    }

    /// Up to the end of the freeze.
    pub(crate) fn freeze(&self) -> Result<()> {
        self.ask::<FreezeResponse>("Freeze", LEAVES)?;
        self.is_in(Phase::PHASE_FROZEN)?;
        self.stands_still()
    }

    pub(crate) fn give_back(&self) -> Result<()> {
        self.ask::<Empty>("Thaw", LEAVES)?;
        self.is_in(Phase::PHASE_NONE)?;
        self.counts_on().context("after a thaw")
    }
}

/// Connects to the service that the bundle names.
pub(crate) fn connect(hand: &ByHand, shim: &Shim) -> Result<Task> {
    let announced = std::fs::read(hand.path(&format!("{}/ferry.json", shim.bundle)))?;
    let announced: serde_json::Value = serde_json::from_slice(&announced)?;
    let socket = announced["socket"].as_str().context("no socket")?;
    Task::connect(&hand.path(socket), "ferry.v1.Ferry")
}
