//! `ferry checkpoint`: a running container becomes an image, and runs on or ends.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::api::ferry::{CheckpointRequest, FreezeRequest, PrepareDumpRequest};
use ferry_oci::criu::DumpRecord;
use ferry_oci::fast::Fast;
use ferry_oci::layer::Pass;
use prost::Message as _;

use super::archive;
use super::files::Files;
use super::format::{self, Index, Part, Platform, Statistics, Summary};
use super::place::Place;
use crate::agent::cleanup;
use crate::containerd::{
    Blob, CheckpointOptions, ContainerRecord, Containerd, Descriptor, Destination, Image,
    TaskStatus,
};
use crate::describe::checks::RUNTIME;
use crate::describe::container::resident;
use crate::lock;
use crate::shim::{self, Shim};
use crate::wire::messages::ContainerdAddress;
use crate::wire::stream;

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
    chain: String,
    shim: Shim,
    store: Destination,
    files: Files,
    place: Place,
    /// The last pre-dump, or empty.
    pre_dump: String,
    limit: Duration,
    frozen_at: Option<Instant>,
}

/// What was made of it.
struct Made {
    name: String,
    digest: String,
    statistics: Statistics,
}

/// Runs `ferry checkpoint`.
///
/// # Errors
/// When there is no checkpoint; the text says what became of the container.
pub(crate) async fn run(options: Options) -> Result<()> {
    let name = format!("driver-{}-{}", options.containerd.namespace, options.container);
    let _driver = lock::take(&name, Duration::ZERO)
        .await
        .with_context(|| format!("{} is being moved or checkpointed", options.container))?;
    let (id, exit, json) = (new_id(), options.exit, options.json);
    let container = options.container.clone();
    let name = options.name.clone().unwrap_or_else(|| default_name(&container));
    let mut source = Source::find(id, options).await?;
    ensure!(
        source.store.containerd().image(&name).await?.is_none(),
        "there is an image {name} already: give another name, or remove it (ferry discard {name})"
    );
    source.store.create_lease().await?;
    let made = tokio::select! {
        made = source.make(&name) => made,
        stopped = stopped() => Err(stopped),
    };
    let made = match made {
        Ok(made) => made,
        Err(error) => return Err(source.undo(error).await),
    };
    // From here on the image stays, whatever becomes of this process: before the container ends.
    let kept = match exit.then(|| source.still_frozen()) {
        Some(Err(error)) => Err(error),
        _ => cleanup::keep(&source.store).await,
    };
    if let Err(error) = kept {
        return Err(source.undo(error).await);
    }
    if exit {
        source.shim.end(&source.id).await.with_context(|| {
            format!("the checkpoint {name} is complete, but {container} has not ended")
        })?;
    }
    show(&made, json)
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
        let files = Files::of(containerd.writable_layer(&record, &chain).await, &record)?;
        let description = shim.describe().await?;
        let (pids, pre_dump) = (description.pids, description.pre_dump);
        let limit =
            FREEZE + Duration::from_secs(pids.into_iter().map(resident).sum::<u64>() / SLOWEST);
        // All of its files are read while it stands still.
        let limit = if files.stand_still() { limit + FILES } else { limit };
        let place = Place::make(&containerd, &address.namespace, &id).await?;
        let store = containerd.destination(&id)?;
        Ok(Self {
            id,
            options,
            record,
            image,
            blobs,
            chain,
            shim,
            store,
            files,
            place,
            pre_dump,
            limit,
            frozen_at: None,
        })
    }

    /// By its limit the shim has thawed it, and what was read later is of another moment.
    fn still_frozen(&self) -> Result<()> {
        let over = self.frozen_at.is_some_and(|at| at.elapsed() >= self.limit);
        ensure!(!over, "it stood still for {} s, which is its limit", self.limit.as_secs());
        Ok(())
    }

    /// Everything up to the image. With `exit` the container stands still afterwards; else it runs.
    async fn make(&mut self, name: &str) -> Result<Made> {
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
        let request = self.request(&images)?;
        let prepare = PrepareDumpRequest {
            migration: self.id.clone(),
            limit_s,
            fast: FAST.iter().map(|fast| fast.name().to_owned()).collect(),
            keep: Some(request.clone()).into(),
            ..Default::default()
        };
        self.shim.prepare_dump(prepare).await?;
        self.frozen_at = Some(Instant::now());
        let start = Instant::now();
        let freeze = FreezeRequest {
            migration: self.id.clone(),
            limit_s,
            fast: FAST.iter().map(|fast| fast.name().to_owned()).collect(),
            ..Default::default()
        };
        self.shim.freeze(freeze).await?;
        let dumped = self.shim.checkpoint(request, self.limit).await?;
        let dump_us = dumped.dump_us;
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
        statistics.memory_bytes = memory(&images).context("look at the images")?;
        if layer.is_none() {
            layer = self.layer(&looks).await?;
        }
        let index = self.index(&images, layer, statistics).await?;
        let bytes = serde_json::to_vec(&index).context("write the index")?;
        let labels = index.manifests.iter().enumerate().map(|(number, part)| {
            (format!("containerd.io/gc.ref.content.{number}"), part.blob.digest.clone())
        });
        let target = self.put(format::INDEX, &bytes, labels.collect()).await?;
        let (key, value) = format::LABEL;
        let labels = [(key.to_owned(), value.to_owned())].into();
        self.store.create_checkpoint(name, &target, &labels).await?;
        Ok(Made { name: name.to_owned(), digest: target.digest, statistics })
    }

    fn request(&self, images: &Path) -> Result<CheckpointRequest> {
        let work = self.place.folder("work")?;
        Ok(CheckpointRequest {
            id: self.options.container.clone(),
            migration: self.id.clone(),
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

    /// Stores all parts, and lists them.
    async fn index(
        &self,
        images: &Path,
        layer: Option<Descriptor>,
        statistics: Statistics,
    ) -> Result<Index> {
        let record = DumpRecord::read(images).context("read the record of the dump")?;
        let record = record.context("the dump has left no record")?;
        let options = CheckpointOptions {
            exit: self.options.exit,
            open_tcp: record.options.tcp_established,
            external_unix_sockets: record.options.ext_unix_sk,
            terminal: record.options.shell_job,
            file_locks: record.options.file_locks,
            ..Default::default()
        };
        let summary = Summary {
            version: format::VERSION,
            ferry: env!("CARGO_PKG_VERSION").to_owned(),
            criu: record.criu,
            runc: record.runc,
            kernel: kernel(),
            container: self.record.id.clone(),
            created: crate::containerd::rfc3339(std::time::SystemTime::now()),
            exit: self.options.exit,
            chain: self.chain.clone(),
            options: record.options,
            statistics,
        };
        let spec = prost_types::Any::from(self.record.spec.clone()).encode_to_vec();
        let mut parts = vec![self.image.target.clone(), self.put_images(images).await?];
        parts.push(self.put(format::SPEC, &spec, Default::default()).await?);
        let options = options.to_any().encode_to_vec();
        parts.push(self.put(format::OPTIONS, &options, Default::default()).await?);
        if let Some(options) = self.record.runtime_options.clone() {
            let options = prost_types::Any::from(options).encode_to_vec();
            parts.push(self.put(format::RUNTIME_OPTIONS, &options, Default::default()).await?);
        }
        parts.extend(layer);
        let summary = serde_json::to_vec(&summary).context("write the summary")?;
        parts.push(self.put(format::SUMMARY, &summary, Default::default()).await?);
        let platform = Platform {
            architecture: crate::containerd::architecture().to_owned(),
            os: "linux".to_owned(),
        };
        let annotations = [
            (format::IMAGE_NAME, &self.record.image),
            (format::IMAGE_NAME_OLD, &self.record.image),
            (format::RUNTIME_NAME, &self.record.runtime),
            (format::SNAPSHOTTER, &self.record.snapshotter),
        ];
        let part = |blob| Part { blob, platform: Some(platform.clone()) };
        Ok(Index {
            schema_version: 2,
            media_type: format::INDEX.to_owned(),
            manifests: parts.into_iter().map(part).collect(),
            annotations: annotations.map(|(k, v)| (k.to_owned(), v.clone())).into(),
        })
    }

    /// Stores CRIU's images.
    async fn put_images(&self, images: &Path) -> Result<Descriptor> {
        let from = images.to_owned();
        let digest = tokio::task::spawn_blocking(move || archive::digest(&from)).await?;
        let (digest, size) = digest.context("read the images")?;
        let blob = Blob { digest: digest.clone(), size, ..Default::default() };
        if let Some(mut writer) = self.store.write_blob(&blob).await? {
            writer.restart();
            let (mut out, mut chunks) = stream::writer();
            let from = images.to_owned();
            let pack = tokio::task::spawn_blocking(move || archive::pack(&from, &mut out));
            while let Some(chunk) = chunks.recv().await {
                writer.write(&chunk).await?;
            }
            pack.await?.context("read the images")?;
            writer.commit().await?;
        }
        Ok(Descriptor { media_type: format::IMAGES.to_owned(), digest, size })
    }

    /// Stores a small blob.
    async fn put(
        &self,
        media_type: &str,
        bytes: &[u8],
        labels: std::collections::BTreeMap<String, String>,
    ) -> Result<Descriptor> {
        let (digest, size) = (archive::digest_of(bytes), bytes.len() as u64);
        let blob = Blob { digest: digest.clone(), size, labels, ..Default::default() };
        if let Some(mut writer) = self.store.write_blob(&blob).await? {
            writer.restart();
            writer.write(bytes).await?;
            writer.commit().await?;
        }
        Ok(Descriptor { media_type: media_type.to_owned(), digest, size })
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

fn show(made: &Made, json: bool) -> Result<()> {
    let statistics = made.statistics;
    if json {
        let all = serde_json::json!({
            "name": made.name, "digest": made.digest, "statistics": statistics,
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{}", made.name);
    let ms = |us: u64| us as f64 / 1000.0;
    let frozen = match statistics.frozen_us {
        0 => String::new(),
        us => format!(", frozen for {:.1} ms", ms(us)),
    };
    eprintln!(
        "{:.1} MiB of memory, dumped in {:.1} ms{frozen}",
        statistics.memory_bytes as f64 / f64::from(1 << 20),
        ms(statistics.dump_us),
    );
    Ok(())
}

/// Bytes of memory in the images.
fn memory(images: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

fn kernel() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    text.map(|text| text.trim().to_owned()).unwrap_or_default()
}

pub(super) fn new_id() -> String {
    format!("c{}", crate::migrate::new_id())
}

/// A name that says what it is of and when it was made.
fn default_name(container: &str) -> String {
    let time = crate::containerd::rfc3339(std::time::SystemTime::now());
    format!(
        "ferry.local/checkpoint/{}:{}",
        container.to_lowercase(),
        time.replace(':', "").to_lowercase()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ones_that_containerd_takes() {
        let name = default_name("Redis-1");
        let (repository, tag) = name.rsplit_once(':').unwrap();
        assert_eq!(repository, "ferry.local/checkpoint/redis-1");
        assert!(tag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "{tag}");
    }

    #[test]
    fn memory_is_what_the_pages_are() {
        let dir = tempfile::tempdir().unwrap();
        for (name, size) in [("pages-1.img", 5), ("pages-shmem-2.img", 7), ("core-1.img", 9)] {
            std::fs::write(dir.path().join(name), vec![0; size]).unwrap();
        }
        assert_eq!(memory(dir.path()).unwrap(), 12);
    }
}
