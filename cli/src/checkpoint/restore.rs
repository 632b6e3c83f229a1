//! `ferry restore`: a container from a checkpoint.
//!
//! A container whose record is here, and that does not run, is restored as that record says. Any other
//! is made from the image, of which nothing is taken that names this host (see [`spec`]).
//! If it fails, everything is as before.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ferry_oci::announce::Announcement;
use ferry_oci::criu::DumpRecord;
use ferry_oci::criu::images::{Asks, Folder, capabilities};
use ferry_oci::paths;
use serde_json::Value;

use super::addresses;
use super::create::{new_id, stopped};
use super::fits;
use super::format::Summary;
use super::origin::{Base, Origin};
use super::place::{self, Place, Plan};
use super::spec::{self, Allowed};
use super::streams::streams;
use super::trust;
use crate::agent::cleanup;
use crate::containerd::{
    ContainerRecord, Containerd, Descriptor, Destination, SnapshotKind, Stdio, TaskStatus,
};
use crate::describe::checks::RUNTIME;
use crate::describe::host::{self, Machine};
use crate::lock;
use crate::migrate::fault;
use crate::network::address::{self, Cidr};
use crate::network::queue::Held;
use crate::wire::messages::ContainerdAddress;

/// What the operator asked for.
#[derive(Debug)]
pub(crate) struct Options {
    /// Name of the image, or of the file.
    pub(crate) name: String,
    /// Id of the container, if not that of the one that was checkpointed.
    pub(crate) id: Option<String>,
    /// The address that the clients use, if it is to come here.
    pub(crate) ip: Option<Cidr>,
    /// What the image may ask of this host.
    pub(crate) allowed: Vec<Allowed>,
    /// containerd.
    pub(crate) containerd: ContainerdAddress,
    /// Print JSON.
    pub(crate) json: bool,
}

/// A restore under way.
struct Restore {
    options: Options,
    id: String,
    origin: Origin,
    summary: Option<Summary>,
    store: Destination,
    place: Place,
    /// The container that was here before, and its task's streams.
    there: Option<(ContainerRecord, Stdio)>,
    address: Option<Arriving>,
}

/// The address on its way here.
struct Arriving {
    cidr: Cidr,
    held: Held,
    announcement: Announcement,
}

/// Runs `ferry restore`.
///
/// # Errors
/// When the container does not run; everything is as before.
pub(crate) async fn run(options: Options) -> Result<()> {
    let at = &options.containerd;
    let containerd = Containerd::connect(&at.socket, &at.namespace).await?;
    let work = new_id();
    // First of all: it settles what a command has left that was killed.
    let place = Place::make(&containerd, &at.namespace, &work).await?;
    let origin = Origin::open(&containerd, &options.name, &place).await?;
    let summary = origin.summary(&containerd).await?;
    let id = options.id.clone().or_else(|| origin.id(summary.as_ref()));
    let id = id.with_context(|| {
        format!("{} does not say which container it is of: give --id", options.name)
    })?;
    ensure!(paths::is_container_id(&id), "{id:?} is no id of a container: give --id");
    let _driver = lock::driver(&at.namespace, &id).await?;
    let there = there(&containerd, &id).await?;
    let store = containerd.destination(&work)?;
    store.create_lease().await?;
    let json = options.json;
    let mut restore = Restore { options, id, origin, summary, store, place, there, address: None };
    let done = tokio::select! {
        done = restore.prepare() => done,
        stopped = stopped() => Err(stopped),
    };
    // Not to be interrupted: a start has no middle.
    let done = match done {
        Ok(()) => restore.start().await,
        Err(error) => Err(error),
    };
    match done {
        Ok(pid) => restore.keep(pid, json).await,
        Err(error) => Err(restore.undo(error).await),
    }
}

/// The container `id`, if it is here and does not run.
async fn there(containerd: &Containerd, id: &str) -> Result<Option<(ContainerRecord, Stdio)>> {
    let Some(record) = containerd.container(id).await? else { return Ok(None) };
    let stdio = match containerd.task(id).await? {
        None => Stdio::default(),
        Some(task) if task.status == TaskStatus::Stopped => task.stdio,
        Some(_) => bail!("{id} has a task already: end it, or give another --id"),
    };
    Ok(Some((record, stdio)))
}

impl Restore {
    /// Everything but the start.
    async fn prepare(&mut self) -> Result<()> {
        if let Some(summary) = &self.summary {
            let criu = tokio::task::spawn_blocking(host::criu).await?;
            fits::check(summary, &Machine::this(), criu.as_deref())?;
        }
        let images = self.place.folder(paths::CHECKPOINT_IMAGES)?;
        self.origin.images(self.store.containerd(), &images).await?;
        let record = DumpRecord::read(&images).context("read the record of the dump")?;
        self.place.plan(&self.plan())?;
        let base = self.origin.base(self.store.containerd(), &self.options.containerd).await?;
        let mut container = match &self.there {
            Some((record, _)) => record.clone(),
            None => self.record_of_checkpoint(&base).await?,
        };
        let spec = container.spec_json()?;
        // Not before: a path that an image names is only opened once that is allowed.
        addresses::check(&spec, record.as_ref(), self.options.ip)?;
        self.trust(&spec, &images, record.as_ref())?;
        let (target, chain) = self.image(base, &mut container).await?;
        log::debug!("{} is based on {}", self.id, target.digest);
        let store = &self.store;
        container.snapshot_key = self.plan().own;
        let (snapshotter, key) = (&container.snapshotter, &container.snapshot_key);
        let layer = self.origin.layer(store).await?;
        let kind = match (&layer, &self.summary) {
            (None, Some(_)) => SnapshotKind::View,
            _ => SnapshotKind::Active,
        };
        let mounts = store.prepare_snapshot(snapshotter, key, &chain, kind).await?;
        if let Some(layer) = &layer {
            store.apply(layer, mounts.iter().cloned().map(Into::into).collect()).await?;
        }
        match &self.there {
            Some((before, _)) => {
                // Nothing refers to it until this is done or undone.
                let (snapshotter, old) = (&before.snapshotter, &before.snapshot_key);
                store.containerd().hold_snapshot(snapshotter, old).await?;
                // First the snapshot: by it an undo sees that something has changed.
                store.containerd().set_snapshot(&self.id, key).await?;
                store.containerd().delete_task(&self.id).await?;
            }
            None => store.create_container(&container).await?,
        }
        if let Some(cidr) = self.options.ip {
            self.address = Some(arrive(cidr, store.migration()).await?);
        }
        // Not before the last task is gone, and a terminal's FIFOs with it.
        let before = self.there.as_ref().map(|(_, stdio)| stdio);
        let namespace = &self.options.containerd.namespace;
        let stdio = streams(namespace, &self.id, &images, &spec, before)?;
        let options = container.runtime_options.as_ref();
        let images = images.display().to_string();
        store.create_task(&self.id, &mounts, &stdio, options, &images).await?;
        Ok(())
    }

    /// CRIU makes what its images say, whatever the spec says.
    fn trust(&self, spec: &Value, images: &Path, record: Option<&DumpRecord>) -> Result<()> {
        let allowed = &self.options.allowed;
        let mut folder = Folder::open(images).context("look into the images")?;
        let had = capabilities(&mut folder).context("read the images")?;
        spec::check_capabilities(spec, had, allowed)?;
        let asks = Asks::read(&mut folder).context("read the images")?;
        trust::check(spec, &asks, record.map(|record| &record.options), allowed)
    }

    /// What changes of what is there.
    fn plan(&self) -> Plan {
        let before = self.there.as_ref().map(|(record, _)| record.clone());
        Plan {
            container: self.id.clone(),
            own: match before {
                Some(_) => format!("{}-{}", self.id, self.store.migration()),
                None => self.id.clone(),
            },
            snapshot: before.map(|before| (before.snapshotter, before.snapshot_key)),
            ip: self.options.ip,
        }
    }

    /// A container as the checkpoint has it.
    async fn record_of_checkpoint(&self, base: &Base) -> Result<ContainerRecord> {
        let containerd = self.store.containerd();
        let spec = self.origin.spec(containerd).await?;
        let spec = spec.with_context(|| {
            format!(
                "there is no container {} here and {} has no spec: give --id of a container that is here",
                self.id, self.options.name
            )
        })?;
        let mut record = ContainerRecord {
            id: self.id.clone(),
            image: base.name.clone(),
            // What the checkpoint says of its runtime and that one's options names programs of this host.
            runtime: RUNTIME.to_owned(),
            spec,
            snapshotter: "overlayfs".to_owned(),
            ..Default::default()
        };
        if let Some(snapshotter) = self.origin.snapshotter()
            && containerd.snapshotters().await?.contains(snapshotter)
        {
            record.snapshotter.clone_from(snapshotter);
        }
        let mut spec = spec::canonical(&record.spec.value)?;
        spec::check(&spec, &self.options.allowed)?;
        spec::localize(&mut spec, &self.options.containerd.namespace, &self.id);
        record.set_spec_json(&spec);
        Ok(record)
    }

    /// Has the image of the container unpacked: what it is, and the chain id of its layers.
    async fn image(
        &self,
        base: Base,
        container: &mut ContainerRecord,
    ) -> Result<(Descriptor, String)> {
        let containerd = self.store.containerd();
        let chain = self.summary.as_ref().map(|summary| summary.chain.as_str());
        let target = match base.target {
            Some(target) => target,
            None => match containerd.image(&container.image).await? {
                Some(named) => named.target,
                None => {
                    bail!("the image {:?} of the container is not here: pull it", container.image)
                }
            },
        };
        if self.there.is_none() {
            let labels = Default::default();
            container.image =
                self.store.create_image(&container.image, &target, &labels).await?.name;
        }
        let unpacked = self.store.unpack(&target, &container.snapshotter, chain).await?;
        ensure!(
            chain.is_none_or(|chain| chain == unpacked),
            "the image unpacks to {unpacked}, not to {} as the checkpoint says",
            chain.unwrap_or_default()
        );
        Ok((target, unpacked))
    }

    /// The container runs. Its pid.
    async fn start(&self) -> Result<u32> {
        if let Some(address) = &self.address {
            // Its clients are led here; what they send waits.
            address.announcement.send().with_context(|| format!("announce {}", address.cidr))?;
            address.held.open()?;
        }
        let pid = self.store.start_task(&self.id).await?;
        // The shim opens the address should this be killed here.
        fault::at(fault::RESTORED).await;
        self.place.started();
        Ok(pid)
    }

    /// It runs: what fails from here on does not change that.
    async fn keep(mut self, pid: u32, json: bool) -> Result<()> {
        if let Some(Arriving { cidr, held, announcement }) = self.address.take() {
            if let Err(error) = held.release() {
                log::warn!("let packets for {cidr} through: {error:#}");
            }
            if let Err(error) = announcement.send() {
                log::warn!("announce {cidr}: {error}");
            }
            if let Err(error) = tokio::task::spawn_blocking(move || held.finish()).await? {
                log::warn!("remove the rules of {cidr}: {error:#}");
            }
        }
        let kept = place::keep(self.store.containerd(), &self.store, &self.plan()).await;
        if kept.is_err() {
            self.place.leave();
        }
        kept.with_context(|| format!("{} runs, but what it needs may not stay", self.id))?;
        match json {
            true => println!("{}", serde_json::json!({ "id": self.id, "pid": pid })),
            false => println!("{}", self.id),
        }
        Ok(())
    }

    /// Everything is as before.
    async fn undo(mut self, error: anyhow::Error) -> anyhow::Error {
        let mut left = Vec::new();
        if let Some(address) = self.address.take()
            && let Err(error) = address.held.drop_all()
        {
            log::debug!("drop held packets: {error:#}");
        }
        if let Err(error) = place::undo(self.store.containerd(), &self.plan()).await {
            left.push(format!("{error:#}"));
        }
        if left.is_empty()
            && let Err(error) = cleanup::remove(&self.store, self.options.ip).await
        {
            left.push(format!("{error:#}"));
        }
        let error = error.context(format!("{} was not restored", self.id));
        if left.is_empty() {
            return error;
        }
        self.place.leave();
        let text = format!("{}: the next ferry checkpoint or restore tries again", left.join("; "));
        error.context(text)
    }
}

/// Has an address come here, silent until it is opened.
async fn arrive(cidr: Cidr, id: &str) -> Result<Arriving> {
    ensure!(
        address::device_with(cidr.ip)?.is_none(),
        "{} is here already: leave --ip out",
        cidr.ip
    );
    let device = address::device_for(&cidr)?
        .with_context(|| format!("no interface here is in the network of {cidr}"))?;
    let id = id.to_owned();
    let start = move || Held::start(&id, &[cidr.ip], true);
    let held = tokio::task::spawn_blocking(start).await??;
    address::add(cidr, &device).await?;
    let announcement = Announcement::prepare(cidr.ip, &device).context("prepare to announce")?;
    Ok(Arriving { cidr, held, announcement })
}
