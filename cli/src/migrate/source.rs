//! One migration at its source: the mirror of `agent::destination`.
//!
//! Differences from the destination: nothing is made here, so undoing is only thawing; and this
//! side decides first. [`Source::commit`] writes down that the destination shall run the
//! container; from then on the shim never thaws it by itself, and only the destination's word
//! brings it back.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_cli::phase::Phase;
use ferry_oci::api::ferry::{CommitRequest, DumpResponse, FreezeRequest, PrepareDumpRequest};
use ferry_oci::fast::Fast;
use ferry_oci::layer::{self, Manifest, Pass};
use ferry_oci::record::{Decision, Record};
use ferry_oci::{cgroups, paths, tmpfs, warm};

use crate::agent::cleanup;
use crate::containerd::{ContainerRecord, Containerd, Image, ImageContent, WritableLayer};
use crate::describe::container::{ContainerFacts, FromRecord};
use crate::network::address::{self, Cidr};
use crate::shim::{self, Shim};
use crate::transport::link::Link;
use crate::wire::messages::{ContainerdAddress, ImageFile, Reply, Request};
use crate::wire::stream;

/// What the frozen container may cost at least, before its size counts.
const FREEZE_MIN: Duration = Duration::from_secs(120);
/// Slowest link the freeze's limit allows for, bytes per second.
const SLOWEST: u64 = 4 << 20;

/// How long containerd may take to end what a shim has left that was killed.
const ENDED: Duration = Duration::from_secs(10);
/// How much later than the shim the driver may have begun to count the limit.
const MARGIN: Duration = Duration::from_secs(1);

/// What the two ends that wait for the freeze are started with.
pub(super) struct Hold<'a> {
    /// Fast paths to take.
    pub(super) fast: &'a [Fast],
    /// Memory is served from the destination's page store.
    pub(super) lazy: bool,
    /// The address that moves.
    pub(super) ip: Option<Cidr>,
    /// The interface here that has it.
    pub(super) device: &'a str,
}

impl Hold<'_> {
    fn fast_names(&self) -> Vec<String> {
        self.fast.iter().map(|fast| fast.name().to_owned()).collect()
    }

    fn addresses(&self) -> Vec<String> {
        self.ip.iter().map(|cidr| cidr.ip.to_string()).collect()
    }
}

/// The container on its source host.
pub(super) struct Source {
    pub(super) containerd: Containerd,
    shim: Shim,
    pub(super) record: ContainerRecord,
    pub(super) image: Image,
    pub(super) content: ImageContent,
    pub(super) layer: WritableLayer,
    pub(super) facts: ContainerFacts,
    /// Its init, on this host.
    pub(super) init_pid: u32,
    /// Stdio as the task was created with: stdin, stdout, stderr.
    pub(super) stdio: [String; 3],
    migration: String,
    /// Writable layer as it was sent last.
    sent_layer: Manifest,
    /// There are pre-dumps that a checkpoint could build on.
    pre_dumps: bool,
}

impl Source {
    /// Finds the container and gathers its facts. Changes nothing.
    ///
    /// # Errors
    /// When it is not there, does not run, or is not ferry's.
    pub(super) async fn find(
        address: &ContainerdAddress,
        id: &str,
        migration: String,
    ) -> Result<Self> {
        let containerd = Containerd::connect(&address.socket, &address.namespace).await?;
        let record = containerd.container(id).await?.with_context(|| {
            format!("there is no container {id} in namespace {}", address.namespace)
        })?;
        containerd.task(id).await?.with_context(|| format!("{id} is not running: start it"))?;
        let bundle = shim::bundle(&address.socket, &address.namespace, id);
        let shim = Shim::connect(&bundle, id).await?.with_context(|| {
            format!(
                "{id} runs with {}: start it with --runtime {}",
                record.runtime,
                crate::describe::checks::RUNTIME
            )
        })?;
        let description = shim.describe().await?;
        let pre_dumps = !description.pre_dump.is_empty();
        let facts = ContainerFacts::gather(FromRecord::from(&record), &description)?;
        let image = containerd
            .image(&record.image)
            .await?
            .with_context(|| format!("the image {} of {id} is gone", record.image))?;
        let parent =
            containerd.snapshot(&record.snapshotter, &record.snapshot_key).await?.map(|s| s.parent);
        let content = containerd.image_content(&image.target, parent.as_deref()).await?;
        let layer = containerd.writable_layer(&record, content.chain_id()).await?;
        let stdio = [description.stdin, description.stdout, description.stderr];
        Ok(Self {
            containerd,
            shim,
            record,
            image,
            content,
            layer,
            facts,
            init_pid: description.init_pid,
            stdio,
            migration,
            sent_layer: Manifest::default(),
            pre_dumps,
        })
    }

    /// Forgets the pre-dumps of the container: memory is tracked for one purpose only.
    ///
    /// # Errors
    /// When its shim cannot be asked.
    pub(super) async fn end_pre_dumps(&self) -> Result<()> {
        if self.pre_dumps { self.shim.end_pre_dumps().await } else { Ok(()) }
    }

    /// How long the container may stay frozen without a commit, from its size.
    pub(super) fn freeze_limit(&self) -> Duration {
        super::fault::limit().unwrap_or(FREEZE_MIN)
            + Duration::from_secs(self.facts.resident / SLOWEST)
    }

    fn limit_s(&self) -> u32 {
        u32::try_from(self.freeze_limit().as_secs()).unwrap_or(u32::MAX)
    }

    /// Sends the blobs of the image that the destination lacks.
    ///
    /// # Errors
    /// When a blob cannot be read or the destination refuses it.
    pub(super) async fn send_blobs(&self, link: &mut Link, patience: Duration) -> Result<u64> {
        let wanted = Request::MissingBlobs(self.content.blobs.clone());
        let missing = match link.ask(&wanted, patience).await? {
            Reply::Missing(missing) => missing,
            other => return Err(crate::transport::link::unexpected(&other)),
        };
        let mut total = 0;
        for blob in missing {
            let reader = self.containerd.read_blob(&blob.digest, 0).await?;
            link.send(&Request::PutBlob(blob)).await?;
            total += link.blob(reader).await?;
            link.done(patience).await?;
        }
        Ok(total)
    }

    /// Sends what changed in the writable layer since it was sent last; bytes sent.
    ///
    /// # Errors
    /// When the layer cannot be read or the destination cannot write it.
    pub(super) async fn send_layer(
        &mut self,
        link: &mut Link,
        pass: Pass,
        patience: Duration,
    ) -> Result<u64> {
        let sent = self.send_layer_on(link, pass).await?;
        if sent > 0 {
            link.done(patience).await?;
        }
        Ok(sent)
    }

    /// [`Self::send_layer`]; the answer is still to come if anything was sent.
    ///
    /// # Errors
    /// When the layer cannot be read or the connection breaks.
    pub(super) async fn send_layer_on(&mut self, link: &mut Link, pass: Pass) -> Result<u64> {
        let Some(upper) = self.layer.upperdir.clone() else { return Ok(0) };
        let before = std::mem::take(&mut self.sent_layer);
        let live = matches!(pass, Pass::Live);
        let from = upper.clone();
        let (manifest, changes) = tokio::task::spawn_blocking(move || {
            let now = if live { layer::scan(&from)? } else { layer::rescan(&from, &before)? };
            let changes = layer::delta(&before, &now);
            anyhow::Ok((now, changes))
        })
        .await?
        .context("read the writable layer")?;
        self.sent_layer = manifest;
        if changes.is_empty() {
            return Ok(0);
        }
        link.send(&Request::PutLayer).await?;
        let (mut writer, chunks) = stream::writer();
        let encode = tokio::task::spawn_blocking(move || {
            let encoded = layer::encode(&upper, &changes, pass, &mut writer)?;
            std::io::Write::flush(&mut writer)?;
            anyhow::Ok(encoded)
        });
        let sent = link.stream(chunks).await?;
        let encoded = encode.await?.context("read the writable layer")?;
        self.sent_layer.forget(&encoded.unsettled);
        Ok(sent)
    }

    /// Starts a dump that waits for the freeze, and has the destination start a restore that waits
    /// for the images.
    ///
    /// # Errors
    /// When one of them cannot start; the container runs as before.
    pub(super) async fn hold(
        &self,
        link: &mut Link,
        hold: &Hold<'_>,
        patience: Duration,
    ) -> Result<()> {
        let (dir, names) = self.hold_dump(hold).await?;
        if !hold.lazy && !hold.fast.contains(&Fast::HeldRestore) {
            return Ok(());
        }
        let files = names.into_iter().map(|name| {
            let size = std::fs::metadata(dir.join(&name))?.len();
            anyhow::Ok(ImageFile::whole(name, size))
        });
        let files = files.collect::<Result<Vec<_>>>().context("read what the dump has written")?;
        let (fast, code) = (hold.fast.to_vec(), self.read_ahead(hold).await?);
        let prepare = Request::PrepareRestore { files: files.clone(), fast, lazy: hold.lazy, code };
        link.send(&prepare).await?;
        for file in &files {
            link.file(&dir.join(&file.name), file.size).await?;
        }
        link.end_stream().await?;
        link.done(patience).await
    }

    /// Has the kernel read what CRIU will look into here, if that fast path is taken. Paths of that.
    async fn read_ahead(&self, hold: &Hold<'_>) -> Result<Vec<String>> {
        if !hold.fast.contains(&Fast::Warm) {
            return Ok(Vec::new());
        }
        let init = self.init_pid;
        let read = tokio::task::spawn_blocking(move || {
            std::io::Result::Ok(warm::processes(cgroups::processes(init)?))
        });
        read.await?.context("look for the container's programs")
    }

    /// Starts a dump that waits for the freeze, if that fast path is taken. Folder and names of the
    /// files that a restore reads before its first image.
    ///
    /// # Errors
    /// When it cannot start; the container runs as before.
    pub(super) async fn hold_dump(&self, hold: &Hold<'_>) -> Result<(PathBuf, Vec<String>)> {
        if !hold.fast.contains(&Fast::HeldDump) {
            return Ok(Default::default());
        }
        let hide = match hold.fast.contains(&Fast::Hide) && hold.lazy {
            true => paths::hide(&self.migration).display().to_string(),
            false => String::new(),
        };
        let request = PrepareDumpRequest {
            migration: self.migration.clone(),
            limit_s: self.limit_s(),
            fast: hold.fast_names(),
            lock_addresses: hold.addresses(),
            device: hold.device.to_owned(),
            hide_folder: hide,
            ..Default::default()
        };
        let prepared = self.shim.prepare_dump(request).await?;
        Ok((PathBuf::from(prepared.images_path), prepared.early_files))
    }

    /// The same after a dump that has failed. File systems in memory that were packed for it may have
    /// changed while the container ran.
    ///
    /// # Errors
    /// As [`Self::hold_dump`]; when the connection breaks.
    pub(super) async fn hold_dump_again(&self, link: &mut Link, hold: &Hold<'_>) -> Result<()> {
        let (dir, names) = self.hold_dump(hold).await?;
        for name in names.into_iter().filter(|name| tmpfs::is_early_archive(name)) {
            let path = dir.join(&name);
            let size = std::fs::metadata(&path).context("read what the dump has written")?.len();
            link.send_on(&Request::PutImages(vec![ImageFile::whole(name, size)])).await?;
            link.file(&path, size).await?;
            link.end_stream().await?;
            link.done(Phase::Hold.deadline()).await?;
        }
        Ok(())
    }

    /// Freezes, and locks the connections on the moved address. Microseconds the freezer took.
    ///
    /// # Errors
    /// When it cannot be frozen; it runs then.
    pub(super) async fn freeze(&self, hold: &Hold<'_>) -> Result<u64> {
        let request = FreezeRequest {
            migration: self.migration.clone(),
            limit_s: self.limit_s(),
            fast: hold.fast_names(),
            lock_addresses: hold.addresses(),
            device: hold.device.to_owned(),
            ..Default::default()
        };
        Ok(self.shim.freeze(request).await?.freeze_us)
    }

    /// Dumps the frozen container.
    ///
    /// # Errors
    /// With CRIU's first error.
    pub(super) async fn dump(&self) -> Result<DumpResponse> {
        self.shim.dump(&self.migration, self.freeze_limit()).await
    }

    /// **The commit.** When this returns, the shim has written down that the destination shall run
    /// the container, and no error from here on may reach a rollback: it is settled with the
    /// destination instead.
    ///
    /// # Errors
    /// When the shim has rolled back already (its lease or its limit ended); nothing is decided.
    pub(super) async fn commit(
        &self,
        to: &str,
        ip: Option<Cidr>,
        device: &str,
        epoch: &str,
    ) -> Result<()> {
        let request = CommitRequest {
            migration: self.migration.clone(),
            destination: to.to_owned(),
            ip: ip.map(|c| c.to_string()).unwrap_or_default(),
            device: device.to_owned(),
            epoch: epoch.to_owned(),
            ..Default::default()
        };
        self.shim.commit(request).await
    }

    /// The commit in place of a shim that has been killed: whether its container has ended with it,
    /// so that it can only run at the destination, and that is written down.
    pub(super) async fn commit_alone(
        &self,
        to: &str,
        ip: Option<Cidr>,
        device: &str,
        epoch: &str,
        address: &ContainerdAddress,
        frozen_at: Instant,
    ) -> bool {
        if !self.is_gone(address).await {
            return false;
        }
        // Later, it may have thawed by its limit before it was killed, and answered its clients.
        if frozen_at.elapsed() + MARGIN > Duration::from_secs(self.limit_s().into()) {
            return false;
        }
        if !self.has_ended().await {
            return false;
        }
        let (id, namespace) = (&self.record.id, &address.namespace);
        let mut record = Record::new(&self.migration, id, namespace, Decision::Committed);
        record.destination = to.to_owned();
        record.ip = ip.map(|c| c.to_string()).unwrap_or_default();
        record.device = device.to_owned();
        record.epoch = epoch.to_owned();
        record.write().is_ok()
    }

    /// Waits until containerd has ended what a killed shim has left; false if it does not.
    async fn has_ended(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < ENDED {
            if cgroups::has_ended(self.init_pid) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    /// Thaws and unlocks. Only before the commit.
    ///
    /// # Errors
    /// When the shim cannot; it says why.
    pub(super) async fn thaw(&self) -> Result<()> {
        self.shim.thaw(&self.migration).await
    }

    /// Whether the shim has ended, and its container with it.
    pub(super) async fn is_gone(&self, address: &ContainerdAddress) -> bool {
        let id = &self.record.id;
        let bundle = shim::bundle(&address.socket, &address.namespace, id);
        matches!(Shim::connect(&bundle, id).await, Ok(None))
    }
}

/// Ends what is left on the source of a container that runs on the destination. Every step can be
/// repeated, so that it can be taken up by another driver; the record says so at the end.
///
/// # Errors
/// When a step fails; the ones after it have not been taken.
pub(super) async fn retire(
    containerd: &Containerd,
    address: &ContainerdAddress,
    record: &Record,
) -> Result<()> {
    let bundle = shim::bundle(&address.socket, &address.namespace, &record.container);
    let there = match Shim::connect(&bundle, &record.container).await? {
        Some(shim) => shim.find().await?.map(|d| (shim, d.migration)),
        // A shim that is gone has taken the frozen tasks with it.
        None => None,
    };
    // A container of that name that has come back since is none of this migration's.
    let another = there.as_ref().is_some_and(|(_, migration)| *migration != record.migration);
    if !another {
        if let Some((shim, migration)) = &there {
            shim.retire(migration).await.context("end the frozen tasks")?;
        }
        if let Ok(cidr) = record.ip.parse::<Cidr>() {
            address::remove(cidr.ip).await?;
        }
    }
    clear(&record.migration).await?;
    if !another {
        containerd.delete_source(&record.container).await?;
    }
    let mut retired = record.clone();
    retired.decision = Decision::Retired;
    retired.write().context("record that nothing is left here")
}

/// Brings a container back whose destination has said that it does not run it.
///
/// # Errors
/// When the shim is gone, and the container with it.
pub(super) async fn revert(address: &ContainerdAddress, record: &Record) -> Result<()> {
    let bundle = shim::bundle(&address.socket, &address.namespace, &record.container);
    if let Some(shim) = Shim::connect(&bundle, &record.container).await?
        && shim.find().await?.is_some_and(|d| d.migration == record.migration)
    {
        return shim.revert(&record.migration).await;
    }
    clear(&record.migration).await?;
    forget(&record.migration)?;
    bail!("{} has ended here too: its shim is gone, and its processes with it", record.container)
}

/// Removes what a shim leaves that was killed in a migration.
///
/// # Errors
/// When the kernel refuses.
pub(super) async fn clear(migration: &str) -> Result<()> {
    cleanup::clear(migration).await?;
    remove_images(migration)
}

/// Forgets a migration that is over on both sides.
///
/// # Errors
/// When the record cannot be removed.
pub(super) fn forget(migration: &str) -> Result<()> {
    Record::remove(migration).context("remove the migration's record")
}

fn remove_images(migration: &str) -> Result<()> {
    let path = paths::images(migration);
    match std::fs::remove_dir_all(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
