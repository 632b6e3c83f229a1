//! Pre-dumps: memory written down while the container runs, on which a later dump builds.
//!
//! ```text
//!   pre_dump ─▶ 1/ ── pre_dump ─▶ 2/ ── checkpoint on top ── complete
//!                  2/parent ─▶ 1          images/parent ─▶ 2
//! ```
//! Where the kernel has soft-dirty bits CRIU makes them itself. Where it has not, a process of the shim's
//! own program tracks the container from the first to the dump; it ends with the chain. Either way
//! `criu restore` takes the dump as any other.

use super::Container;
use super::checkpoint::{CheckpointParams, utf8};
use super::part::{Part, tracks_writes};
use super::silent::blocking;
use crate::cleanup;
use crate::error::{Context as _, Error, Result};
use crate::reaper::{Child, Reaper};
use crate::state::{Op, Status};
use ferry_oci::criu::{
    CONFIG_ENV, Config, HIDE_ENV, Hiding, find_library, flatten, pages_bytes, path_between,
};
use ferry_oci::freezer::Freezer;
use ferry_oci::pages::predump::Report;
use ferry_oci::pages::predump::serve::{self, Answer, Order};
use ferry_oci::pages::tracker::probe;
use ferry_oci::paths;
use ferry_oci::runc::Checkpoint;
use log::warn;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::timeout;

/// How long a pre-dump may take: it writes all memory to a disk.
const DEADLINE: Duration = Duration::from_secs(600);
/// Folder in the bundle with the orders for CRIU.
const HIDE: &str = "predump-hide";

/// The chain of a container's pre-dumps, if there is one.
#[derive(Default)]
pub(super) struct PreDumps {
    chain: Mutex<Option<Chain>>,
    last: StdMutex<Option<PathBuf>>,
}

/// Pre-dumps of which each builds on the one before.
pub(super) struct Chain {
    last: PathBuf,
    /// `None` where CRIU makes them itself.
    tracker: Option<Tracker>,
    /// A dump has been made on top, and is still to be completed.
    incomplete: bool,
}

impl Chain {
    /// Whether a dump, or a further pre-dump, may build on `parent`.
    fn ends_with(&self, parent: &Path) -> bool {
        self.last == parent && !self.incomplete
    }
}

/// What a dump on top of pre-dumps is started with.
#[derive(Default)]
pub(super) struct OnTop {
    /// The library and the folder of its orders.
    pub(super) hiding: Option<(PathBuf, PathBuf)>,
    /// The path to the last pre-dump, from the images.
    pub(super) parent: Option<String>,
}

/// What a pre-dump has done.
#[derive(Debug)]
pub(crate) struct PreDumped {
    pub(crate) report: Report,
    pub(crate) by_criu: bool,
}

impl PreDumps {
    fn set_last(&self, last: Option<PathBuf>) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
    }
}

impl Container {
    /// Folder of the last pre-dump that a dump may build on.
    pub(crate) fn last_pre_dump(&self) -> Option<PathBuf> {
        self.pre_dumps.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes memory into `folder`, which is made: all of it, or what has changed since `parent`, which has
    /// to be the last one. When it fails there is no pre-dump any more, and nothing of `folder`.
    pub(crate) async fn pre_dump(&self, folder: &Path, parent: Option<&Path>) -> Result<PreDumped> {
        let _op = self.op.read().await;
        self.must_move("a pre-dump")?;
        self.must_be_filled().await?;
        if folder.exists() {
            return Err(Error::already_exists(format!("there is {} already", folder.display())));
        }
        let mut slot = self.pre_dumps.chain.lock().await;
        // With the chain: who opens one looks there.
        drop(self.no_stream().await?);
        let chain = match parent {
            None => self.begin_chain(&mut slot).await?,
            Some(parent) => {
                let chain = slot.take_if(|chain| chain.ends_with(parent));
                chain.ok_or_else(|| no_pre_dump(parent))?
            }
        };
        self.pre_dumps.set_last(None);
        let above = folder.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(above).context("make the folder for the pre-dump")?;
        let (chain, done) = self.next(chain, folder, parent).await?;
        *slot = Some(chain);
        self.pre_dumps.set_last(Some(folder.to_owned()));
        Ok(done)
    }

    /// Whoever tracks the container's memory stops its processes by ptrace, for which these must run.
    pub(super) fn must_move(&self, what: &str) -> Result<()> {
        self.admit(Op::Checkpoint)?;
        let snapshot = self.snapshot();
        let freezer = Freezer::of(snapshot.pid).context("find the freezer")?;
        if snapshot.status != Status::Running || freezer.is_frozen().context("the freezer")? {
            let text = format!("it stands still: resume it for {what}");
            return Err(Error::failed_precondition(text));
        }
        Ok(())
    }

    /// Refuses what tracks the container's memory beside pre-dumps, one that is to be completed among them. As
    /// long as the result is held none begins.
    pub(super) async fn no_pre_dumps(&self) -> Result<MutexGuard<'_, Option<Chain>>> {
        let chain = self.pre_dumps.chain.lock().await;
        if chain.is_some() {
            let text = "its memory is tracked for pre-dumps: end them first (ferry predump --end)";
            return Err(Error::failed_precondition(text));
        }
        Ok(chain)
    }

    /// A chain without a pre-dump. Whatever there was before ends.
    async fn begin_chain(&self, slot: &mut Option<Chain>) -> Result<Chain> {
        *slot = None;
        let probe = blocking(probe).await?;
        let tracker = match probe.soft_dirty {
            true => None,
            false => {
                tracks_writes(&probe)?;
                Some(Tracker::start(&self.runtime.reaper, self.snapshot().pid)?)
            }
        };
        Ok(Chain { last: PathBuf::new(), tracker, incomplete: false })
    }

    async fn next(
        &self,
        mut chain: Chain,
        folder: &Path,
        parent: Option<&Path>,
    ) -> Result<(Chain, PreDumped)> {
        let report = match &mut chain.tracker {
            Some(tracker) => tracker.ask(&Order::Round { folder: folder.to_owned() }).await?,
            None => {
                let start = Instant::now();
                let done = self.pre_dump_by_criu(folder, parent).await;
                if let Err(err) = done {
                    let _ = std::fs::remove_dir_all(folder);
                    return Err(err);
                }
                Report {
                    bytes: pages_bytes(folder).context("look at the pre-dump")?,
                    took_us: u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX),
                    ..Report::default()
                }
            }
        };
        chain.last = folder.to_owned();
        let by_criu = chain.tracker.is_none();
        Ok((chain, PreDumped { report, by_criu }))
    }

    async fn pre_dump_by_criu(&self, folder: &Path, parent: Option<&Path>) -> Result<()> {
        let work = self.work_dir().join("pre-dump");
        for folder in [folder, &work] {
            std::fs::create_dir_all(folder).context("make the folder for the pre-dump")?;
        }
        let parent = parent.map(|parent| path_between(folder, parent)).transpose();
        let parent = parent.context("find the pre-dump before")?;
        let config = Config::default().write(&work).context("write CRIU's configuration")?;
        let verb = Checkpoint {
            id: &self.id,
            image_path: utf8(folder)?,
            work_path: utf8(&work)?,
            pre_dump: true,
            parent_path: parent.as_deref().map(utf8).transpose()?,
            ..Default::default()
        };
        let env = [(CONFIG_ENV, config.as_path())];
        let netns = self.netns_for_criu(false)?;
        let done = self.runtime.call_with(&verb, &env, netns.as_ref(), DEADLINE).await;
        let done =
            done.map_err(|err| super::checkpoint::explain(err, "pre-dump", &work.join("dump.log")));
        let _ = std::fs::remove_dir_all(&work);
        done
    }

    /// Takes the pre-dumps that a dump on top of `parent` builds on.
    pub(super) async fn take_pre_dumps(&self, parent: Option<&Path>) -> Result<Option<Chain>> {
        let Some(parent) = parent else { return Ok(None) };
        let mut slot = self.pre_dumps.chain.lock().await;
        match slot.take_if(|chain| chain.ends_with(parent)) {
            Some(chain) => {
                self.pre_dumps.set_last(None);
                Ok(Some(chain))
            }
            None => Err(no_pre_dump(parent)),
        }
    }

    /// Dumps the frozen container on top of `chain`. What is left to be [completed](Self::complete).
    pub(super) async fn dump_on_top(
        &self,
        params: &CheckpointParams,
        mut chain: Chain,
        on_top: &OnTop,
    ) -> Result<Option<Chain>> {
        let left = self.leave_out(&mut chain, &params.images).await;
        let hiding = on_top.hiding.clone().into_iter();
        let env: Vec<_> = hiding
            .flat_map(|(library, hide)| [("LD_PRELOAD", library), (HIDE_ENV, hide)])
            .collect();
        let done = self.dump(params, &env, on_top.parent.as_deref()).await;
        self.remove_hiding();
        done.map(|()| left.then_some(chain))
    }

    /// In the freeze: has CRIU leave out what is in `chain` or is read now; whether it will. If not, there
    /// are no orders either: all memory is dumped.
    pub(super) async fn leave_out(&self, chain: &mut Chain, images: &Path) -> bool {
        let Some(tracker) = &mut chain.tracker else { return true };
        let hide = self.bundle.join(HIDE);
        let asked = tracker.ask(&Order::Frozen { images: images.to_owned(), hide }).await;
        if let Err(err) = &asked {
            warn!("all memory of {} is dumped: {err}", self.id);
            self.remove_hiding();
        }
        asked.is_ok()
    }

    /// How a dump on top of pre-dumps is to be started before they have seen the freeze: what is preloaded
    /// into CRIU, and the path to the last one for CRIU's own.
    pub(super) async fn prepare_on_top(&self, params: &CheckpointParams) -> Result<OnTop> {
        let Some(parent) = &params.parent else { return Ok(OnTop::default()) };
        let slot = self.pre_dumps.chain.lock().await;
        match slot.as_ref().filter(|chain| chain.ends_with(parent)) {
            None => Err(no_pre_dump(parent)),
            Some(Chain { tracker: None, .. }) => {
                let parent = Some(parent_path(&params.images, parent)?);
                Ok(OnTop { parent, ..OnTop::default() })
            }
            Some(_) => Ok(OnTop { hiding: Some(self.prepare_hiding()?), parent: None }),
        }
    }

    fn prepare_hiding(&self) -> Result<(PathBuf, PathBuf)> {
        let library = find_library().ok_or_else(|| {
            Error::failed_precondition("the library that hides memory is missing")
        })?;
        let hide = self.bundle.join(HIDE);
        Hiding::prepare(&hide, &library).context("make the folder of the orders")?;
        Ok((library, hide))
    }

    pub(super) fn remove_hiding(&self) {
        let _ = std::fs::remove_dir_all(self.bundle.join(HIDE));
    }

    /// Keeps what is to be completed until somebody asks for it.
    pub(super) async fn leave_incomplete(&self, chain: Chain) {
        *self.pre_dumps.chain.lock().await = Some(Chain { incomplete: true, ..chain });
    }

    /// Completes the images of a dump on top of pre-dumps, and makes them whole: they need these no more.
    pub(crate) async fn complete(&self, images: &Path) -> Result<()> {
        let chain = self.pre_dumps.chain.lock().await.take_if(|chain| chain.incomplete);
        let chain =
            chain.ok_or_else(|| Error::failed_precondition("no dump is to be completed"))?;
        self.complete_on(chain, images, true).await
    }

    /// Completes the images of a dump on top of `chain`. Pre-dumps that ferry keeps go with their task, and
    /// sooner: images on top of them are always made whole.
    pub(super) async fn complete_on(
        &self,
        mut chain: Chain,
        images: &Path,
        whole: bool,
    ) -> Result<()> {
        if let Some(tracker) = &mut chain.tracker {
            tracker.ask(&Order::Finish { images: images.to_owned() }).await?;
        }
        if whole || chain.last.starts_with(paths::PRE_DUMPS) {
            let images = images.to_owned();
            blocking(move || flatten(&images)).await?.context("complete the images")?;
        }
        // Nothing builds on them any more.
        self.end_pre_dumps().await;
        Ok(())
    }

    /// The task has ended. A dump that was made before can still be completed.
    pub(super) async fn no_more_pre_dumps(&self) {
        let chain = self.pre_dumps.chain.lock().await;
        let incomplete = chain.as_ref().is_some_and(|chain| chain.incomplete);
        drop(chain);
        if !incomplete {
            self.end_pre_dumps().await;
        }
    }

    /// Nothing is tracked any more, and the pre-dumps that ferry keeps for this container are gone.
    pub(crate) async fn end_pre_dumps(&self) {
        *self.pre_dumps.chain.lock().await = None;
        self.pre_dumps.set_last(None);
        let folder = paths::pre_dumps(&self.namespace, &self.id);
        let removed = tokio::task::spawn_blocking(move || cleanup::remove(&folder)).await;
        if let Ok(Err(err)) = removed {
            warn!("the pre-dumps of {} stay: {err}", self.id);
        }
    }
}

/// The path to the pre-dump `last` from the folder of images, for runc.
fn parent_path(images: &Path, last: &Path) -> Result<String> {
    let path = path_between(images, last).context("find the pre-dump before")?;
    Ok(utf8(&path)?.to_owned())
}

fn no_pre_dump(parent: &Path) -> Error {
    Error::failed_precondition(format!(
        "{} is not the last pre-dump of this container since it started: make one with ferry predump, or \
         name no parent",
        parent.display()
    ))
}

/// The process that tracks.
struct Tracker {
    _child: Child,
    orders: pipe::Sender,
    answers: BufReader<pipe::Receiver>,
}

impl Tracker {
    fn start(reaper: &Arc<Reaper>, init: u32) -> Result<Self> {
        let Part { child, input, output } = Part::start(reaper, serve::NAME, &[init.to_string()])?;
        Ok(Self { _child: child, orders: input, answers: BufReader::new(output) })
    }

    /// Has it do something. It is never killed: it may be at work in a process of the container.
    async fn ask(&mut self, order: &Order) -> Result<Report> {
        let mut line = serde_json::to_vec(order).context("encode an order")?;
        line.push(b'\n');
        let mut answer = String::new();
        let asked = async {
            self.orders.write_all(&line).await?;
            self.answers.read_line(&mut answer).await
        };
        let asked = timeout(DEADLINE, asked)
            .await
            .map_err(|_| Error::deadline_exceeded(format!("no pre-dump after {DEADLINE:?}")))?;
        match asked.context("talk to the process that tracks memory")? {
            0 => Err(Error::internal("the process that tracks memory has ended")),
            _ => {
                let answer: Answer = serde_json::from_str(&answer).context("decode an answer")?;
                answer.map_err(Error::internal)
            }
        }
    }
}
