//! The options of a dump, kept beside its images and replayed at restore.
//!
//! runc and CRIU do not record which of their options a dump was made with, and a restore without
//! the same ones fails (stock containerd cannot restore a connection for this reason). The format
//! has a version of its own; a reader refuses versions that it does not know.

use super::NetworkLock;
use crate::limited;
#[cfg(doc)]
use crate::quarantine::connections;
use crate::quarantine::connections::Connection;
use crate::tmpfs::Tmpfs;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// The record's file in the images directory.
pub const RECORD_FILE: &str = "ferry.json";
/// Version of the record's format. Since 2 there is [`DumpOptions::in_netns`]; who does not know it
/// would restore into the host's network. Since 3 there is [`DumpOptions::tmpfs`], without which a
/// restore fails; since 4 [`DumpOptions::locked`], without which peers may be answered with a reset.
pub const RECORD_VERSION: u32 = 4;
/// A record is small, but for a line for each connection; anything larger is not one.
const MAX_BYTES: u64 = 16 << 20;

/// What a dump and its restore must agree on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DumpOptions {
    /// Established TCP connections are kept.
    pub tcp_established: bool,
    /// File locks are kept.
    pub file_locks: bool,
    /// Unix sockets may have their other end outside.
    pub ext_unix_sk: bool,
    /// The process has a terminal.
    pub shell_job: bool,
    /// Namespaces restored empty.
    pub empty_ns: Vec<String>,
    /// Mode of CRIU's cgroup handling; `None` is CRIU's own default.
    pub manage_cgroups: Option<String>,
    /// How connections were silenced.
    pub network_lock: NetworkLock,
    /// runc and CRIU were in the container's network namespace, which is given by path: to CRIU it
    /// was the host's, and whoever restores must be in such a one too.
    pub in_netns: bool,
    /// File systems that were left out, and are put in place by whoever restores.
    pub tmpfs: Vec<Tmpfs>,
    /// Connections that are kept silent until the restore.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locked: Option<Locked>,
}

/// The lock that a dump leaves behind when its container has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locked {
    /// Id of the lock, see [`connections`].
    pub id: String,
    /// When it ends by itself, in seconds since 1970.
    pub until: u64,
    /// What is locked.
    pub connections: Vec<Connection>,
}

impl Locked {
    /// Whether `id` can be one, as [`connections::table`] takes it.
    pub fn is_id(id: &str) -> bool {
        id.len() == 16 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    }
}

impl Default for DumpOptions {
    /// What is assumed of images that carry no record: connections are restored if there are any.
    fn default() -> Self {
        Self {
            tcp_established: true,
            file_locks: false,
            ext_unix_sk: false,
            shell_job: false,
            empty_ns: Vec::new(),
            manage_cgroups: None,
            network_lock: NetworkLock::Default,
            in_netns: false,
            tmpfs: Vec::new(),
            locked: None,
        }
    }
}

/// The record of one dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpRecord {
    /// [`RECORD_VERSION`] at the time of writing.
    pub version: u32,
    /// The options used.
    pub options: DumpOptions,
    /// Version of CRIU, as it says itself; empty if unknown.
    #[serde(default)]
    pub criu: String,
    /// Version of runc, as it says itself; empty if unknown.
    #[serde(default)]
    pub runc: String,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be read or written.
    #[error("access the dump's record")]
    Io(#[from] io::Error),
    /// The file is not a record.
    #[error("the dump's record is not readable")]
    Format(#[from] serde_json::Error),
    /// The file is larger than a record can be.
    #[error("the dump's record is too large")]
    Size,
    /// The record was made by a newer ferry.
    #[error("the dump's record has version {0}, this ferry reads up to {RECORD_VERSION}")]
    Version(u32),
}

impl DumpRecord {
    /// A record of this version.
    pub fn new(options: DumpOptions, criu: String, runc: String) -> Self {
        Self { version: RECORD_VERSION, options, criu, runc }
    }

    /// Writes the record into `images`.
    pub fn write(&self, images: &Path) -> Result<(), RecordError> {
        let text = serde_json::to_vec_pretty(self)?;
        Ok(std::fs::write(images.join(RECORD_FILE), text)?)
    }

    /// Reads the record in `images`; `None` if there is none.
    pub fn read(images: &Path) -> Result<Option<Self>, RecordError> {
        match limited::read(&images.join(RECORD_FILE), MAX_BYTES) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(err) if err.kind() == io::ErrorKind::FileTooLarge => Err(RecordError::Size),
            Err(err) => Err(err.into()),
            Ok(text) => Self::parse(&text).map(Some),
        }
    }

    /// Decodes a record.
    pub fn parse(text: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        // The version first: a newer format may not parse as this one.
        let Version { version } = serde_json::from_slice(text)?;
        if version == 0 || version > RECORD_VERSION {
            return Err(RecordError::Version(version));
        }
        Ok(serde_json::from_slice(text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let options = DumpOptions {
            file_locks: true,
            empty_ns: vec!["network".into()],
            manage_cgroups: Some("ignore".into()),
            network_lock: NetworkLock::Skip,
            in_netns: true,
            ..Default::default()
        };
        let record = DumpRecord::new(options, "4.2".into(), "1.3.6".into());
        record.write(dir.path()).unwrap();
        assert_eq!(DumpRecord::read(dir.path()).unwrap(), Some(record));
    }

    #[test]
    fn images_without_a_record_have_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(DumpRecord::read(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_newer_version_is_refused_by_number() {
        let newer = br#"{"version":5,"options":"of another shape"}"#;
        let err = DumpRecord::parse(newer).unwrap_err();
        assert!(matches!(err, RecordError::Version(5)), "{err}");
    }

    #[test]
    fn bad_and_oversized_records_are_refused() {
        assert!(matches!(DumpRecord::parse(b""), Err(RecordError::Format(_))));
        assert!(matches!(DumpRecord::parse(b"{}"), Err(RecordError::Format(_))));
        assert!(matches!(DumpRecord::parse(b"{\"version\":0}"), Err(RecordError::Version(0))));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(RECORD_FILE), vec![b' '; (16 << 20) + 1]).unwrap();
        assert!(matches!(DumpRecord::read(dir.path()), Err(RecordError::Size)));
    }

    #[test]
    fn missing_options_take_their_defaults() {
        let record = DumpRecord::parse(br#"{"version":1,"options":{"file_locks":true}}"#).unwrap();
        assert!(record.options.tcp_established && record.options.file_locks);
    }
}
