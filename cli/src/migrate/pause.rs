//! The steps of a migration up to the held restore, and the pause in which most of them must not be.
//!
//! What can be done while the container runs is done in [`Migration::prepare`]; [`Migration::pause`]
//! is what its clients wait for. Between the freeze and the restore every step sends its order and
//! goes on; the answers are collected at the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use ferry_cli::phase::Phase;
use ferry_oci::api::ferry::DumpResponse;
use ferry_oci::fast::Fast;
use ferry_oci::layer::Pass;
use ferry_oci::pages::patch::Known;
use tokio::sync::watch;

use super::failure::Failure;
use super::fault;
use super::images::Images;
use super::memory::{self, Memory};
use super::report::Happened;
use super::source::{Hold, Source};
use super::{Migration, Mode};
use crate::containerd::Stdio;
use crate::network::address;
use crate::transport::link::{Link, unexpected};
use crate::wire::messages::{ImageSpec, NewContainer, Reply, Request};

/// How often the container is frozen and dumped before a migration is given up.
const DUMPS: usize = 3;
/// How long it runs between two tries.
const BETWEEN_DUMPS: Duration = Duration::from_millis(200);

/// What is known once everything is ready for the freeze.
pub(super) struct Ready {
    stdout: String,
    /// Of the destination.
    epoch: String,
    memory: Option<Memory>,
    /// Pages that the destination has besides.
    known: Arc<Known>,
    happened: Happened,
    warnings: Vec<String>,
}

/// What is known when the destination holds the container.
pub(super) struct Held {
    pub(super) frozen_at: Instant,
    pub(super) freeze_us: u64,
    pub(super) stdout: String,
    /// Of the destination.
    pub(super) epoch: String,
    pub(super) memory: Option<Memory>,
    pub(super) happened: Happened,
    /// What did not go right at the first try.
    pub(super) warnings: Vec<String>,
    /// Not dropped in the pause.
    pub(super) _images: Images,
}

impl Migration {
    /// Everything that can be done while the container runs.
    pub(super) async fn prepare(
        &mut self,
        source: &mut Source,
        link: &mut Link,
    ) -> Result<Ready, Failure> {
        let Self { options, id, timeline, bytes, fast, mode, .. } = self;
        let stdio = stdio_there(source, &options.containerd.namespace, &options.container);
        let stdout = stdio.stdout.clone();
        let (mut warnings, mut happened) = (Vec::new(), Happened::default());

        let patience = Phase::Image.deadline();
        let epoch;
        (bytes.image, epoch) = timeline
            .run(Phase::Image, async {
                let container = options.container.clone();
                let begin = Request::Begin { migration: id.clone(), container };
                let epoch = match link.ask(&begin, patience).await? {
                    Reply::Begun { epoch } => epoch,
                    other => return Err(unexpected(&other)),
                };
                let sent = source.send_blobs(link, patience).await?;
                let image = ImageSpec {
                    name: source.image.name.clone(),
                    target: source.image.target.clone(),
                    labels: source.image.labels.clone(),
                    snapshotter: source.record.snapshotter.clone(),
                    chain: source.content.chain_id().to_owned(),
                };
                link.order(&Request::PutImage(image), patience).await?;
                Ok((sent, epoch))
            })
            .await?;

        let new = NewContainer {
            record: source.record.clone(),
            chain: source.content.chain_id().to_owned(),
            snapshot: source.layer.snapshot.kind,
            stdio,
        };
        let patience = Phase::Container.deadline();
        let order = Request::PutContainer(Box::new(new));
        timeline.run(Phase::Container, link.order(&order, patience)).await?;

        let patience = Phase::Layer.deadline();
        bytes.layer =
            timeline.run(Phase::Layer, source.send_layer(link, Pass::Live, patience)).await?;

        let mut memory;
        (memory, happened.reused_pages) = match mode {
            Mode::Stop => (None, 0),
            Mode::Pre | Mode::Auto => {
                timeline
                    .run(Phase::Precopy, async {
                        let (memory, reused, diverges) =
                            precopy(source, link, &options.memory).await?;
                        warnings.extend(diverges);
                        Ok((Some(memory), reused))
                    })
                    .await?
            }
        };

        let patience = Phase::Address.deadline();
        happened.packets_queued = timeline
            .run(Phase::Address, async {
                let Some(cidr) = options.ip else { return Ok(false) };
                let preferred = address::is_preferred(cidr.ip)?;
                let queue = fast.contains(&Fast::Queue);
                let order = Request::PutAddress { cidr, queue, preferred };
                match link.ask(&order, patience).await? {
                    Reply::Address { queued } => {
                        if !queued && fast.contains(&Fast::Queue) {
                            let text = "packets for the address were dropped and not held: the \
                                        destination's kernel has no queues for them";
                            warnings.push(text.to_owned());
                        }
                        Ok(queued)
                    }
                    other => Err(unexpected(&other)),
                }
            })
            .await?;

        let hold = Hold { fast, lazy: memory.is_some(), ip: options.ip, device: &self.device };
        let known = timeline
            .run(Phase::Hold, async {
                source.hold(link, &hold, Phase::Hold.deadline()).await?;
                // The shim has made the folder, and removes it whatever becomes of this process.
                if let Some(memory) = &mut memory
                    && fast.contains(&Fast::Hide)
                    && let Some(library) = ferry_oci::criu::find_library()
                {
                    memory.hide(&ferry_oci::paths::hide(id), &library)?;
                }
                match &mut memory {
                    Some(memory) if fast.contains(&Fast::Patch) => put_known(memory, link).await,
                    _ => Ok(Known::default()),
                }
            })
            .await?;
        Ok(Ready { stdout, epoch, memory, known: Arc::new(known), happened, warnings })
    }

    /// From the last look at the running container until the destination holds it.
    pub(super) async fn pause(
        &mut self,
        ready: Ready,
        source: &mut Source,
        link: &mut Link,
    ) -> Result<Held, Failure> {
        let Self { options, timeline, bytes, fast, .. } = self;
        let Ready { stdout, epoch, mut memory, known, mut happened, mut warnings } = ready;
        let hold = Hold { fast, lazy: memory.is_some(), ip: options.ip, device: &self.device };
        let mut tries = 1;
        let (frozen_at, freeze_us, (dump, mut images, mut answers)) = loop {
            let early = fast.contains(&Fast::Images);
            let images = ferry_oci::paths::images(&self.id);
            let images = Images::new(images, early, known.clone());
            let freeze_us = timeline
                .run(Phase::Freeze, async {
                    // Files that have changed since the first time: little is left for the freeze.
                    source.send_layer(link, Pass::Live, Phase::Layer.deadline()).await?;
                    if let Some(memory) = &mut memory {
                        memory.read_areas()?;
                        memory.last_live_rounds(link).await?;
                        memory.write_orders(true)?;
                    }
                    if options.ip.is_some() {
                        link.order(&Request::Announce, Phase::Address.deadline()).await?;
                        fault::at(fault::ANNOUNCED).await;
                    }
                    source.freeze(&hold).await
                })
                .await?;
            let frozen_at = Instant::now() - Duration::from_micros(freeze_us);
            match timeline.run(Phase::Dump, dump(source, memory.as_mut(), link, images)).await {
                Ok(dump) => break (frozen_at, freeze_us, dump),
                // A task that was ending, or a connection that was opening, may keep CRIU from
                // dumping at this moment and not at the next.
                Err(failure) if tries < DUMPS && !failure.is_cut() => {
                    tries += 1;
                    let again = |error| Failure::new(Phase::Dump, error);
                    source.thaw().await.map_err(again)?;
                    warnings.push(format!("tried again after {failure}"));
                    tokio::time::sleep(BETWEEN_DUMPS).await;
                    source.hold_dump_again(link, &hold).await.map_err(again)?;
                }
                Err(failure) => return Err(failure),
            }
        };

        let patience = Phase::Transfer.deadline();
        bytes.layer_delta = timeline
            .run(Phase::Transfer, async {
                let delta = source.send_layer_on(link, Pass::Frozen).await?;
                answers += usize::from(delta > 0);
                images.send_rest(link).await?;
                Ok(delta)
            })
            .await?;
        (bytes.pages, bytes.images) = (images.pages, images.rest);

        happened.shim_restore_us = timeline
            .run(Phase::Restore, async {
                if let Some(memory) = &memory {
                    // Beside the restore: nothing is decided yet.
                    warnings.extend(memory.check_images(images.dir())?);
                }
                for _ in 0..answers {
                    link.done(patience).await?;
                }
                match link.reply(Phase::Restore.deadline()).await? {
                    Reply::Held { restore_us } => Ok(restore_us),
                    other => Err(unexpected(&other)),
                }
            })
            .await?;
        happened.shim_dump_us = dump.dump_us;
        happened.fast_tar_calls = dump.fast_tar_calls;
        happened.real_tar_calls = dump.real_tar_calls;
        happened.tmpfs = dump.tmpfs;
        happened.tmpfs_again = dump.tmpfs_again;
        happened.criu_lock = dump.criu_lock;
        happened.early_images = images.early;
        (happened.patched_bytes, happened.patch_bytes) = images.patched;
        Ok(Held {
            frozen_at,
            freeze_us,
            stdout,
            epoch,
            memory,
            happened,
            warnings,
            _images: images,
        })
    }
}

/// Copies memory while the container runs. With what an earlier attempt had left, and a warning.
async fn precopy(
    source: &Source,
    link: &mut Link,
    wishes: &memory::Wishes,
) -> Result<(Memory, u64, Option<String>)> {
    let patience = Phase::Precopy.deadline();
    let init = source.init_pid;
    source.end_pre_dumps().await?;
    let mut memory = Memory::attach(init, wishes)?;
    let found = match link.ask(&Request::OpenPages, patience).await? {
        Reply::PageStore { pages } => pages,
        other => return Err(unexpected(&other)),
    };
    let reused = if found > 0 { memory.learn(link, patience).await? } else { 0 };
    let folder = ferry_oci::paths::quota_folder(init);
    let diverges = memory.precopy(link, init, &folder).await?;
    let warning =
        diverges.map(|why| format!("its memory changes faster than it can be copied ({why:?})"));
    Ok((memory, reused, warning))
}

/// Reads pages that CRIU will carry, and sends them.
async fn put_known(memory: &mut Memory, link: &mut Link) -> Result<Known> {
    let known = memory.known()?;
    let bytes = known.bytes();
    if !bytes.is_empty() {
        link.send_on(&Request::PutKnown).await?;
        link.piece(bytes).await?;
        link.end_stream().await?;
        link.done(Phase::Hold.deadline()).await?;
    }
    Ok(known)
}

/// Dumps, and sends beside it the last of the memory and the images that are complete early. How many
/// answers to that are still to come; none when the dump fails.
async fn dump(
    source: &Source,
    mut memory: Option<&mut Memory>,
    link: &mut Link,
    mut images: Images,
) -> Result<(DumpResponse, Images, usize)> {
    if let Some(memory) = &mut memory {
        // CRIU's parasite runs on the container's CPU time.
        memory.unthrottle();
    }
    let (done, mut is_done) = watch::channel(false);
    let mut answers = usize::from(memory.is_some());
    let dump = async {
        let dumped = source.dump().await;
        let _ = done.send(true);
        dumped
    };
    let (dumped, sent) = match &mut memory {
        None => tokio::join!(dump, images.send_early(link, &mut is_done)),
        Some(memory) if memory.areas_unchanged()? => tokio::join!(dump, async {
            memory.last_round(link).await?;
            images.send_early(link, &mut is_done).await
        }),
        Some(memory) => {
            // What is to be hidden has changed, and the tracker must see it first.
            memory.last_round(link).await?;
            memory.write_orders(false)?;
            tokio::join!(dump, images.send_early(link, &mut is_done))
        }
    };
    answers += sent?;
    let right = memory.map_or(Ok(()), |memory| memory.check_guards());
    match dumped.and_then(|dumped| right.map(|()| dumped)) {
        Ok(dumped) => Ok((dumped, images, answers)),
        Err(error) => {
            for _ in 0..answers {
                link.done(Phase::Transfer.deadline()).await?;
            }
            Err(error)
        }
    }
}

/// Where the output of a container goes whose reader has stayed elsewhere, as the Task API has it.
pub(crate) fn log_file(namespace: &str, id: &str, name: &str) -> String {
    format!("file://{}/{name}.log", ferry_oci::paths::logs(namespace, id).display())
}

/// Stdio of the task on the destination: a FIFO's reader stays behind, so a file takes its place.
fn stdio_there(source: &Source, namespace: &str, id: &str) -> Stdio {
    let there = |given: &String, name: &str| match given.as_str() {
        "" => String::new(),
        uri if uri.starts_with("file://") => uri.to_owned(),
        _ => log_file(namespace, id, name),
    };
    let [_, stdout, stderr] = &source.stdio;
    Stdio {
        // Nobody types there: an empty input never ends and never blocks a writer.
        stdin: String::new(),
        stdout: there(stdout, "stdout"),
        stderr: there(stderr, "stderr"),
        terminal: false,
    }
}
