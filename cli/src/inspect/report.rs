//! What is told of a checkpoint.

use anyhow::{Context, Result};
use ferry_oci::criu::DumpOptions;
use ferry_oci::criu::images::{Contents, Source};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::record::{Podman, Recorded, Spec, Taken};

/// All of it. What is not known is empty or missing.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    /// `image`, `archive` or `folder`.
    pub(super) kind: &'static str,
    /// Its name or path.
    pub(super) name: String,
    /// Container it is of.
    pub(super) container: Option<String>,
    /// Image of the container.
    pub(super) image: Option<String>,
    /// Runtime of the container.
    pub(super) runtime: Option<String>,
    /// Snapshotter of the container.
    pub(super) snapshotter: Option<String>,
    /// What the container was started with.
    pub(super) command: Option<Vec<String>>,
    /// When it was made.
    pub(super) created: Option<String>,
    /// Whether the container ended with it.
    pub(super) exit: Option<bool>,
    /// By what.
    pub(super) versions: Versions,
    /// How.
    pub(super) options: Option<DumpOptions>,
    /// What that took.
    pub(super) statistics: Option<Taken>,
    /// The blobs of an image.
    pub(super) parts: Vec<Part>,
    /// What CRIU's images say; `None` for a checkpoint without processes.
    pub(super) contents: Option<Contents>,
}

/// What made it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Versions {
    pub(super) ferry: Option<String>,
    pub(super) criu: Option<String>,
    pub(super) runc: Option<String>,
    pub(super) kernel: Option<String>,
    /// Of the record of ferry's.
    pub(super) record: Option<u32>,
}

/// A blob.
#[derive(Debug, Serialize)]
pub(super) struct Part {
    pub(super) media_type: String,
    pub(super) digest: String,
    /// Bytes.
    pub(super) size: u64,
}

impl Report {
    pub(super) fn new(kind: &'static str, name: String) -> Self {
        Self { kind, name, ..Self::default() }
    }

    /// Takes what is written down beside the images.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn take_records(&mut self, files: &mut dyn Source) -> Result<()> {
        if let Some(recorded) = decode(files, "ferry.json")? {
            self.recorded(recorded);
        }
        if let Some(podman) = decode::<Podman>(files, "config.dump")? {
            set(&mut self.container, podman.name.or(podman.id));
            set(&mut self.image, podman.rootfs_image_name);
            set(&mut self.runtime, podman.oci_runtime);
            set(&mut self.created, podman.checkpointed_time);
        }
        if let Some(spec) = decode::<Spec>(files, "spec.dump")? {
            set(&mut self.command, spec.command());
        }
        // A log in a folder may be longer than what is read of files.
        if let Ok(Some(log)) = files.read("dump.log") {
            let log = String::from_utf8_lossy(&log);
            let version = log.lines().take(50).find_map(|line| line.split_once("Version: "));
            let version = version.and_then(|(_, rest)| rest.split_whitespace().next());
            set(&mut self.versions.criu, version.map(str::to_owned));
        }
        Ok(())
    }

    /// Takes what ferry has written down. What is known already stays.
    pub(super) fn recorded(&mut self, recorded: Recorded) {
        let known = |text: Option<String>| text.filter(|text| !text.is_empty());
        set(&mut self.versions.record, recorded.version);
        set(&mut self.versions.ferry, known(recorded.ferry));
        set(&mut self.versions.criu, known(recorded.criu));
        set(&mut self.versions.runc, known(recorded.runc));
        set(&mut self.versions.kernel, known(recorded.kernel));
        set(&mut self.container, known(recorded.container));
        set(&mut self.created, known(recorded.created));
        set(&mut self.snapshotter, known(recorded.snapshotter));
        set(&mut self.exit, recorded.exit);
        set(&mut self.options, recorded.options);
        set(&mut self.statistics, recorded.statistics);
    }
}

/// What is known first stays.
pub(super) fn set<T>(place: &mut Option<T>, value: Option<T>) {
    if place.is_none() {
        *place = value;
    }
}

fn decode<T: DeserializeOwned>(files: &mut dyn Source, name: &str) -> Result<Option<T>> {
    let bytes = files.read(name).with_context(|| format!("read {name}"))?;
    let decoded = bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose();
    decoded.with_context(|| format!("{name} is not readable"))
}
