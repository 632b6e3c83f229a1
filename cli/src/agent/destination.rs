//! One migration at its destination: the mirror of `migrate::source`.
//!
//! Differences from the source: everything here is made new and marked with the migration's id,
//! so undoing is removing what carries the mark; and this side decides last. Until [`Commit`]
//! arrives, the end of the lease aborts. `Commit` reaches the shim as a release, and the shim's
//! record of it is the decision: whoever asks later is answered from there.
//!
//! [`Commit`]: crate::wire::messages::Request::Commit

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::announce::Announcement;
use ferry_oci::criu::RESTORE_GATE;
use ferry_oci::fast::Fast;
use ferry_oci::pages::patch;
use ferry_oci::paths::is_plain_name;
use ferry_oci::quarantine::How;
use ferry_oci::{layer, paths, warm};

use super::cleanup;
use super::incoming::Incoming;
use super::memory::Memory;
use crate::containerd::{Blob, Containerd, Destination as Store};
use crate::lock::{self, Lock};
use crate::network::address::{self, Cidr};
use crate::network::queue::Held;
use crate::shim::{self, Shim};
use crate::wire::messages::{
    ContainerdAddress, ImageFile, ImageSpec, NewContainer, Reply, Request,
};
use crate::wire::stream;

/// Restoring a large container from memory takes seconds, not minutes.
const RESTORE: Duration = Duration::from_secs(120);

/// The address that moves, on its way here.
struct Arriving {
    cidr: Cidr,
    device: String,
    /// Until the rules have gone.
    held: Option<Held>,
    announcement: Announcement,
}

/// A migration that has begun here.
pub(super) struct Destination {
    /// containerd, as seen by this migration.
    store: Store,
    address: ContainerdAddress,
    migration: String,
    container: String,
    /// Ready made by `PutContainer`.
    shim: Option<Shim>,
    /// Made by `PutAddress`.
    ip: Option<Arriving>,
    /// Name of the image here, when it had to be another than the source's.
    image: Option<String>,
    /// Opened by `OpenPages`.
    memory: Option<Memory>,
    /// Memory is served from the page store.
    lazy: bool,
    /// Fast paths to take.
    fast: Vec<Fast>,
    /// What patches of images are made of.
    known: Vec<u8>,
    /// A restore waits for its images.
    waiting: bool,
    /// `Commit` was passed to the shim: from here on nothing is undone without its word.
    committed: bool,
    /// Nobody settles this migration while this agent lives.
    _lock: Lock,
}

impl Destination {
    pub(super) async fn begin(
        containerd: &Containerd,
        address: ContainerdAddress,
        migration: String,
        container: String,
    ) -> Result<Self> {
        ensure!(paths::is_migration_id(&migration), "{migration:?} is no id of a migration");
        ensure!(paths::is_container_id(&container), "{container:?} is no id of a container");
        let lock = lock::take(&migration, Duration::ZERO).await?;
        let store = containerd.destination(&migration)?;
        store.create_lease().await?;
        Ok(Self {
            store,
            address,
            migration,
            container,
            shim: None,
            ip: None,
            image: None,
            memory: None,
            lazy: false,
            fast: Vec::new(),
            known: Vec::new(),
            waiting: false,
            committed: false,
            _lock: lock,
        })
    }

    pub(super) async fn answer(&mut self, input: &mut Incoming, request: Request) -> Result<Reply> {
        match request {
            Request::MissingBlobs(blobs) => {
                return Ok(Reply::Missing(self.store.missing(&blobs).await?));
            }
            Request::PutBlob(blob) => self.put_blob(input, blob).await?,
            Request::PutImage(image) => self.put_image(image).await?,
            Request::PutContainer(new) => self.put_container(*new).await?,
            Request::PutLayer => self.put_layer(input).await?,
            Request::PutAddress { cidr, queue, preferred } => {
                return self.put_address(cidr, queue, preferred).await;
            }
            Request::Announce => self.announce_early()?,
            Request::OpenPages => return self.open_pages(),
            Request::Pages => self.put_pages(input).await?,
            Request::PutKnown => self.put_known(input).await?,
            Request::PutImages(files) => self.put_images(input, &files).await?,
            Request::PrepareRestore { files, fast, lazy, code } => {
                self.prepare_restore(input, &files, &fast, lazy, code).await?;
            }
            Request::Restore(files) => return self.restore(input, &files).await,
            Request::Commit => return self.commit().await,
            other => bail!("{other:?} is out of order"),
        }
        Ok(Reply::Done)
    }

    async fn put_blob(&self, input: &mut Incoming, blob: Blob) -> Result<()> {
        let Some(mut writer) = self.store.write_blob(&blob).await? else {
            return input.skip_stream().await;
        };
        writer.restart();
        while let Some(chunk) = input.chunk().await? {
            writer.write(&chunk).await?;
        }
        Ok(writer.commit().await?)
    }

    async fn put_image(&mut self, image: ImageSpec) -> Result<()> {
        let name = self.store.create_image(&image.name, &image.target, &image.labels).await?;
        self.image = Some(name.name);
        let chain =
            self.store.unpack(&image.target, &image.snapshotter, Some(&image.chain)).await?;
        ensure!(chain == image.chain, "the image unpacks to {chain}, not to {}", image.chain);
        Ok(())
    }

    async fn put_container(&mut self, new: NewContainer) -> Result<()> {
        let mut record = new.record;
        ensure!(record.id == self.container, "{} is not the container announced", record.id);
        if let Some(image) = &self.image {
            record.image.clone_from(image);
        }
        let (snapshotter, key) = (&record.snapshotter, &record.snapshot_key);
        let mounts =
            self.store.prepare_snapshot(snapshotter, key, &new.chain, new.snapshot).await?;
        self.store.create_container(&record).await?;
        let images = paths::images(&self.migration);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&images)
            .with_context(|| format!("create {}", images.display()))?;
        let options = record.runtime_options.as_ref();
        let path = images.display().to_string();
        self.store.create_task(&record.id, &mounts, &new.stdio, options, &path).await?;
        let shim = Shim::connect(&self.bundle(), &self.container)
            .await?
            .context("the task's shim is not ferry's")?;
        self.shim = Some(shim);
        Ok(())
    }

    fn bundle(&self) -> PathBuf {
        shim::bundle(&self.address.socket, &self.address.namespace, &self.container)
    }

    async fn put_layer(&self, input: &mut Incoming) -> Result<()> {
        let root = self.bundle().join("rootfs");
        let (to, mut from) = stream::reader();
        let apply = tokio::task::spawn_blocking(move || {
            layer::apply(BufReader::with_capacity(1 << 16, &mut from), &root)
        });
        let forwarded = input.forward(to).await;
        apply.await?.context("write the writable layer")?;
        forwarded
    }

    async fn put_address(&mut self, cidr: Cidr, queue: bool, preferred: bool) -> Result<Reply> {
        let device = address::device_for(&cidr)?
            .with_context(|| format!("no interface here is in the network of {cidr}"))?;
        // Silent first: the kernel must not answer for it before the sockets are there.
        let migration = self.migration.clone();
        let start = move || Held::start(&migration, &[cidr.ip], queue);
        let held = tokio::task::spawn_blocking(start).await??;
        if preferred {
            let mark = paths::preferred(&self.migration);
            fs::create_dir_all(paths::RECORDS).context("make the folder of records")?;
            fs::write(&mark, "").with_context(|| format!("write {}", mark.display()))?;
        }
        address::add(cidr, &device).await?;
        let announcement =
            Announcement::prepare(cidr.ip, &device).context("prepare to announce")?;
        let queued = matches!(held.how(), How::Queued(_));
        self.ip = Some(Arriving { cidr, device, held: Some(held), announcement });
        Ok(Reply::Address { queued })
    }

    /// Leads the clients here while everything is still silent: what they send waits.
    fn announce_early(&self) -> Result<()> {
        let ip = self.ip.as_ref().context("there is no address to announce")?;
        ip.announcement.send().with_context(|| format!("announce {}", ip.cidr))
    }

    async fn prepare_restore(
        &mut self,
        input: &mut Incoming,
        files: &[ImageFile],
        fast: &[Fast],
        lazy: bool,
        code: Vec<String>,
    ) -> Result<()> {
        self.put_images(input, files).await?;
        let root = self.bundle().join("rootfs");
        // The kernel goes on reading while the rest is prepared.
        tokio::task::spawn_blocking(move || warm::files(&root, &code));
        let shim = self.shim.as_ref().context("there is no task to restore")?;
        if lazy {
            let memory = self.memory.as_ref().context("no page store is open")?;
            let pid = shim.describe().await?.shim_pid;
            memory.listen(&self.bundle().join(paths::RESTORE_WORK), pid)?;
        }
        self.lazy = lazy;
        self.fast = fast.to_vec();
        if fast.contains(&Fast::HeldRestore) {
            let images = paths::images(&self.migration);
            shim.prepare_restore(&self.migration, &images, fast, lazy).await?;
            self.waiting = true;
        }
        Ok(())
    }

    fn open_pages(&mut self) -> Result<Reply> {
        let (namespace, migration) = (&self.address.namespace, &self.migration);
        let memory = Memory::open(namespace, &self.container, migration)?;
        let pages = memory.pages();
        self.memory = Some(memory);
        Ok(Reply::PageStore { pages })
    }

    /// The hashes of the pages that an earlier attempt has left.
    pub(super) fn page_hashes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.memory.as_ref().context("no page store is open")?.send_hashes(&mut bytes)?;
        Ok(bytes)
    }

    async fn put_pages(&mut self, input: &mut Incoming) -> Result<()> {
        let memory = self.memory.as_mut().context("no page store is open")?;
        while let Some(chunk) = input.chunk().await? {
            tokio::task::block_in_place(|| memory.push(&chunk))?;
        }
        Ok(())
    }

    async fn put_known(&mut self, input: &mut Incoming) -> Result<()> {
        self.known.clear();
        while let Some(chunk) = input.chunk().await? {
            self.known.extend(chunk);
            ensure!(self.known.len() as u64 <= patch::MOST, "too many known pages");
        }
        Ok(())
    }

    async fn put_images(&self, input: &mut Incoming, files: &[ImageFile]) -> Result<()> {
        let dir = paths::images(&self.migration);
        let mut left: Vec<u8> = Vec::new();
        for file in files {
            ensure!(is_plain_name(&file.name), "{:?} is no name of an image", file.name);
            // The restore waits where its first image would be.
            let held = self.waiting && file.name == RESTORE_GATE;
            let path = dir.join(if held { paths::INVENTORY_FILE } else { &file.name });
            let mut opened = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&path)
                .with_context(|| format!("create {}", path.display()))?;
            let (mut missing, mut patch) = (file.size, Vec::new());
            while missing > 0 {
                if left.is_empty() {
                    left = input.chunk().await?.context("the images are incomplete")?;
                }
                let take = left.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
                let rest = left.split_off(take);
                // Into memory: quicker here than on another thread.
                match file.patch {
                    true => patch.extend(left),
                    false => opened
                        .write_all(&left)
                        .with_context(|| format!("write {}", path.display()))?,
                }
                left = rest;
                missing -= take as u64;
            }
            if file.patch {
                patch::apply(&self.known, &patch, &mut opened)
                    .with_context(|| format!("write {}", path.display()))?;
            }
        }
        ensure!(left.is_empty(), "the images are longer than announced");
        Ok(())
    }

    async fn restore(&mut self, input: &mut Incoming, files: &[ImageFile]) -> Result<Reply> {
        self.put_images(input, files).await?;
        input.skip_stream().await?;
        if self.lazy
            && let Some(memory) = &mut self.memory
        {
            memory.complete()?;
        }
        let shim = self.shim.as_ref().context("there is no task to restore")?;
        let start = Instant::now();
        let images = paths::images(&self.migration);
        let restored =
            shim.restore(&self.migration, &images, &self.fast, self.lazy, RESTORE).await?;
        log::debug!("restore: {} us, of them {} in the shim", micros(start), restored.restore_us);
        Ok(Reply::Held { restore_us: restored.restore_us })
    }

    /// The commit. An error from here on does not mean that the container is not here.
    async fn commit(&mut self) -> Result<Reply> {
        let shim = self.shim.as_ref().context("there is nothing to commit")?;
        // Before anything runs, or the program would see its packets refused. What comes for it
        // waits on.
        if let Some(held) = self.ip.as_ref().and_then(|ip| ip.held.as_ref()) {
            held.open()?;
        }
        self.committed = true;
        let released = shim.release(&self.migration).await?;
        let start = Instant::now();
        let packets = self.open_address();
        let network_us = micros(start);
        if self.lazy
            && let Some(memory) = &self.memory
            && let Err(error) = memory.fill()
        {
            log::warn!("fill the container's memory: {error:#}");
        }
        Ok(Reply::Running { release_us: released.release_us, network_us, packets })
    }

    /// It runs here: what fails now is no reason to say that it does not. Packets that had waited.
    fn open_address(&self) -> u64 {
        let Some(ip) = &self.ip else { return 0 };
        let let_through = ip.held.as_ref().map(Held::release).transpose();
        if let Err(error) = ip.announcement.send() {
            log::warn!("announce {}: {error}", ip.cidr);
        }
        match let_through {
            Ok(count) => count.unwrap_or_default(),
            Err(error) => {
                log::warn!("let packets for {} through: {error:#}", ip.cidr);
                0
            }
        }
    }

    /// Takes the rules of the address away, after the last packet that they held.
    async fn end_rules(&mut self) {
        let Some(ip) = &mut self.ip else { return };
        let Some(held) = ip.held.take() else { return };
        let cidr = ip.cidr;
        match tokio::task::spawn_blocking(move || held.finish()).await {
            Ok(Ok(())) => {}
            // What is left goes with the migration's other marks.
            failed => log::warn!("remove the rules of {cidr}: {failed:?}"),
        }
        cleanup::announce(&self.migration, cidr, &ip.device).await;
    }

    /// Whether this is `migration`.
    pub(super) fn is(&self, migration: &str) -> bool {
        self.migration == migration
    }

    /// Makes what was created permanent and forgets the migration.
    pub(super) async fn finish(mut self) -> Result<()> {
        ensure!(self.committed, "the migration has not been committed");
        // Announced again, for neighbours that missed the first one.
        self.end_rules().await;
        cleanup::keep(&self.store).await?;
        Ok(())
    }

    /// Undoes everything, unless it was committed.
    pub(super) async fn abort(self) -> Result<()> {
        ensure!(!self.committed, "the migration has been committed");
        if let Some(shim) = &self.shim
            && let Err(error) = shim.abort(&self.migration).await
        {
            log::debug!("abort: {error:#}");
        }
        if let Some(memory) = self.memory {
            memory.abort();
        }
        // They are for a container that does not run here: their senders repeat them.
        if let Some(held) = self.ip.as_ref().and_then(|ip| ip.held.as_ref())
            && let Err(error) = held.drop_all()
        {
            log::debug!("drop held packets: {error:#}");
        }
        let ip = self.ip.map(|ip| ip.cidr);
        cleanup::remove(&self.store, ip).await?;
        Ok(())
    }

    /// The driver is gone.
    pub(super) async fn lease_ended(self) {
        if self.committed {
            // It runs here; the next driver that asks is told so and finishes.
            return;
        }
        if let Err(error) = self.abort().await {
            log::error!("undo after the driver was lost: {error:#}");
        }
    }
}

fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}
