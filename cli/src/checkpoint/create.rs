//! `ferry checkpoint`: a running container becomes an image or a file, and runs on or ends.

mod made;
mod parts;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::api::ferry::{FreezeRequest, Keep, PrepareDumpRequest};
use ferry_oci::criu::pages_bytes;
use ferry_oci::fast::Fast;
use ferry_oci::layer::Pass;
use made::{Made, default_name};

use super::export::{self, Export};
use super::files::Files;
use super::format::Statistics;
use super::place::Place;
use crate::agent::cleanup;
use crate::containerd::{
    Blob, ContainerRecord, Containerd, Descriptor, Destination, Image, TaskStatus,
};
use crate::describe::checks::RUNTIME;
use crate::describe::container::resident;
use crate::lock;
use crate::migrate::fault;
use crate::shim::{self, Shim};
use crate::wire::messages::ContainerdAddress;

/// What is done for a short freeze: the dump is started before it, and CRIU's code is read. runc's pause may
/// stop a program in the middle of a vfork, where it cannot be dumped.
const FAST: [Fast; 4] = [Fast::HeldDump, Fast::Freezer, Fast::Warm, Fast::Awake];
/// How long the container may stand still at least, before its size counts.
const FREEZE: Duration = Duration::from_secs(120);
/// How much longer where a layer can only be made while it stands still.
const FILES: Duration = Duration::from_secs(1800);
/// Slowest disk that the limit allows for, bytes per second.
const SLOWEST: u64 = 8 << 20;

/// What the operator asked for.
#[derive(Debug)]
pub(crate) struct Options {
    /// Container id.
    pub(crate) container: String,
    /// Name of the image.
    pub(crate) name: Option<String>,
    /// The file to write besides; without a name it is all that is made.
    pub(crate) export: Option<export::Wish>,
    /// End the container.
    pub(crate) exit: bool,
    /// Unix sockets may have their other end outside.
    pub(crate) external_unix_sockets: bool,
    /// containerd.
    pub(crate) containerd: ContainerdAddress,
    /// Print JSON.
    pub(crate) json: bool,
}

/// A container that is being checkpointed.
struct Source {
    id: String,
    options: Options,
    record: ContainerRecord,
    image: Image,
    /// What that consists of.
    blobs: Vec<Blob>,
    /// Digest of its config.
    config: String,
    chain: String,
    shim: Shim,
    store: Destination,
    files: Files,
    place: Place,
    /// The last pre-dump, or empty.
    pre_dump: String,
    limit: Duration,
    frozen_at: Option<Instant>,
    export: Option<Export>,
}

/// Runs `ferry checkpoint`.
///
/// # Errors
/// When there is no checkpoint; the text says what became of the container.
pub(crate) async fn run(options: Options) -> Result<()> {
    let _driver = lock::driver(&options.containerd.namespace, &options.container).await?;
    let (id, exit, json) = (new_id(), options.exit, options.json);
    let container = options.container.clone();
    let name = match (&options.name, &options.export) {
        (None, None) => Some(default_name(&container)),
        (name, _) => name.clone(),
    };
    let mut source = Source::find(id, options).await?;
    if let Some(name) = &name {
        ensure!(
            source.store.containerd().image(name).await?.is_none(),
            "there is an image {name} already: give another name, or remove it (ferry discard {name})"
        );
    }
    source.store.create_lease().await?;
    let made = tokio::select! {
        made = source.make(name.as_deref()) => made,
        stopped = stopped() => Err(stopped),
    };
    let mut made = match made {
        Ok(made) => made,
        Err(error) => return Err(source.undo(error).await),
    };
    // From here on what was made stays, whatever becomes of this process: before the container ends.
    if let Err(error) = source.keep(&mut made, exit).await {
        return Err(source.undo(error).await);
    }
    if exit {
        source.shim.end(&source.id).await.with_context(|| {
            format!("the checkpoint is complete, but {container} has not ended")
        })?;
    }
    made.show(json)
}

impl Source {
    /// Finds the container. Changes nothing.
    async fn find(id: String, options: Options) -> Result<Self> {
        let (address, name) = (&options.containerd, &options.container);
        let containerd = Containerd::connect(&address.socket, &address.namespace).await?;
        let record = containerd.container(name).await?.with_context(|| {
            format!("there is no container {name} in namespace {}", address.namespace)
        })?;
        match containerd.task(name).await?.map(|task| task.status) {
            Some(TaskStatus::Running) => {}
            Some(TaskStatus::Paused) => bail!("{name} is paused: resume it"),
            _ => bail!("{name} is not running: start it"),
        }
        let bundle = shim::bundle(&address.socket, &address.namespace, name);
        let shim = Shim::connect(&bundle, name).await?.with_context(|| {
            format!("{name} runs with {}: start it with --runtime {RUNTIME}", record.runtime)
        })?;
        let image = containerd
            .image(&record.image)
            .await?
            .with_context(|| format!("the image {:?} of {name} is gone", record.image))?;
        let parent = containerd.snapshot(&record.snapshotter, &record.snapshot_key).await?;
        let parent = parent.map(|snapshot| snapshot.parent);
        let content = containerd.image_content(&image.target, parent.as_deref()).await?;
        let (chain, blobs) = (content.chain_id().to_owned(), content.blobs.clone());
        let config = content.config.digest.clone();
        let files = Files::of(containerd.writable_layer(&record, &chain).await, &record)?;
        let description = shim.describe().await?;
        let (pids, pre_dump) = (description.pids, description.pre_dump);
        let limit =
            FREEZE + Duration::from_secs(pids.into_iter().map(resident).sum::<u64>() / SLOWEST);
        // An archive is one more file on the disk.
        let limit = if options.export.is_some() { limit * 2 } else { limit };
        // All of its files are read while it stands still.
        let limit = if files.stand_still() { limit + FILES } else { limit };
        let place = Place::make(&containerd, &address.namespace, &id).await?;
        let store = containerd.destination(&id)?;
        let export = options.export.clone().map(Export::begin).transpose()?;
        if let Some(export) = &export {
            place.covers(export.unfinished())?;
        }
        Ok(Self {
            id,
            options,
            record,
            image,
            blobs,
            config,
            chain,
            shim,
            store,
            files,
            place,
            pre_dump,
            limit,
            frozen_at: None,
            export,
        })
    }

    /// By its limit the shim has thawed it, and what was read later is of another moment.
    fn still_frozen(&self) -> Result<()> {
        let over = self.frozen_at.is_some_and(|at| at.elapsed() >= self.limit);
        ensure!(!over, "it stood still for {} s, which is its limit", self.limit.as_secs());
        Ok(())
    }

    /// Everything up to the image, if it is to have a `name`, and the unfinished file. With `exit` the
    /// container stands still afterwards; else it runs.
    async fn make(&mut self, name: Option<&str>) -> Result<Made> {
        let (images, looks) = (self.place.folder("images")?, self.place.folder("files")?);
        // From here on the collector leaves the container's image alone, whatever becomes of its name.
        let missing = self.store.missing(&self.blobs).await?;
        ensure!(
            missing.is_empty(),
            "the image {} has lost parts: pull it again",
            self.record.image
        );
        self.files.look(Pass::Live, &looks).await?;
        let limit_s = u32::try_from(self.limit.as_secs()).unwrap_or(u32::MAX);
        let fast: Vec<_> = FAST.iter().map(|fast| fast.name().to_owned()).collect();
        let prepare = PrepareDumpRequest {
            migration: self.id.clone(),
            limit_s,
            fast: fast.clone(),
            keep: Some(self.wanted(&images)?).into(),
            ..Default::default()
        };
        self.shim.prepare_dump(prepare).await?;
        let start = Instant::now();
        self.frozen_at = Some(start);
        let migration = self.id.clone();
        let freeze = FreezeRequest { migration, limit_s, fast, ..Default::default() };
        self.shim.freeze(freeze).await?;
        let dumped = self.shim.checkpoint(&self.id, self.limit).await?;
        let dump_us = dumped.dump_us;
        fault::at(fault::DUMPED).await;
        self.files.look(Pass::Frozen, &looks).await?;
        let mut layer = None;
        if self.files.stand_still() {
            layer = self.layer(&looks).await?;
        }
        self.still_frozen()?;
        let mut statistics = Statistics { dump_us, ..Statistics::default() };
        if !self.options.exit {
            self.shim.thaw(&self.id).await?;
            statistics.frozen_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        }
        if dumped.incomplete {
            self.shim.complete(&images).await.context("put it together with its pre-dumps")?;
        }
        statistics.memory_bytes = pages_bytes(&images).context("look at the images")?;
        if layer.is_none() {
            layer = self.layer(&looks).await?;
        }
        let summary = self.summary(&images, statistics)?;
        if let Some(export) = &self.export {
            self.write(export, &summary, layer.as_ref()).await?;
        }
        let mut made = Made { name: None, digest: None, file: None, file_bytes: None, statistics };
        if let Some(name) = name {
            made.digest = Some(self.name(name, &images, layer, &summary).await?);
            made.name = Some(name.to_owned());
        }
        Ok(made)
    }

    /// What was made is no longer undone with this command.
    async fn keep(&mut self, made: &mut Made, exit: bool) -> Result<()> {
        if exit {
            self.still_frozen()?;
        }
        if let Some(name) = &made.name {
            cleanup::keep(&self.store).await.with_context(|| format!("keep the image {name}"))?;
        }
        if let Some(export) = self.export.take() {
            made.file = self.options.export.as_ref().map(|wish| wish.file.clone());
            made.file_bytes = Some(export.finish()?);
        }
        if made.name.is_none()
            && let Err(error) = cleanup::remove(&self.store, None).await
        {
            log::warn!("{error:#}: the next ferry checkpoint or restore tries again");
            self.place.leave();
        }
        Ok(())
    }

    fn wanted(&self, images: &Path) -> Result<Keep> {
        let work = self.place.folder("work")?;
        Ok(Keep {
            images_path: images.display().to_string(),
            work_path: work.display().to_string(),
            file_locks: true,
            external_unix_sockets: self.options.external_unix_sockets,
            exit: self.options.exit,
            parent_path: self.pre_dump.clone(),
            ..Default::default()
        })
    }

    async fn layer(&mut self, looks: &Path) -> Result<Option<Descriptor>> {
        let files = std::mem::replace(&mut self.files, Files::ReadOnly);
        files.layer(&self.store, &self.record, &self.chain, looks).await
    }

    /// The container runs on, and nothing is left.
    async fn undo(&mut self, error: anyhow::Error) -> anyhow::Error {
        let error = match self.shim.thaw(&self.id).await {
            Ok(()) => error.context(format!("{} runs as before", self.options.container)),
            Err(thaw) => {
                error.context(format!("{} could not be thawed ({thaw:#})", self.options.container))
            }
        };
        match cleanup::remove(&self.store, None).await {
            Ok(()) => error,
            Err(left) => {
                self.place.leave();
                error.context(format!("{left:#}: the next ferry checkpoint or restore tries again"))
            }
        }
    }
}

/// Waits for a signal that ends the command.
pub(super) async fn stopped() -> anyhow::Error {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        },
        Err(_) => drop(tokio::signal::ctrl_c().await),
    }
    anyhow::anyhow!("interrupted")
}

pub(super) fn new_id() -> String {
    format!("c{}", crate::migrate::new_id())
}
