//! Records of decided migrations: who runs the container, written down before it is acted on.
//!
//! Records lie on a tmpfs. They speak of frozen or running tasks, and those end with the host's
//! kernel as the tmpfs does, so a record on a disk would outlive what it speaks of and buy
//! nothing; and the pause pays for no flush.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::paths;

/// Version of the record's format, apart from the product's.
const VERSION: u32 = 1;

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Source: the destination shall run the container; the source never thaws it by itself.
    Committed,
    /// Source: nothing of the container is left here; the destination may forget the migration.
    Retired,
    /// Destination: the container runs here, if the file [`paths::decided`] was made by it.
    Released,
    /// Destination: the restore failed after it was let go, and nothing of it is left.
    Failed,
}

/// One decided migration on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Id of the migration.
    pub migration: String,
    /// Container id.
    pub container: String,
    /// containerd namespace.
    pub namespace: String,
    /// What was decided.
    pub decision: Decision,
    /// Source: where it goes, as given to `--to`. Empty on the destination.
    #[serde(default)]
    pub destination: String,
    /// Source: `address/prefix` that moves, or empty.
    #[serde(default)]
    pub ip: String,
    /// Source: interface that had the address, or empty.
    #[serde(default)]
    pub device: String,
    /// Source: epoch of the destination, which ends when that host restarts.
    #[serde(default)]
    pub epoch: String,
}

impl Record {
    /// A record that is not yet written.
    pub fn new(migration: &str, container: &str, namespace: &str, decision: Decision) -> Self {
        Self {
            version: VERSION,
            migration: migration.to_owned(),
            container: container.to_owned(),
            namespace: namespace.to_owned(),
            decision,
            destination: String::new(),
            ip: String::new(),
            device: String::new(),
            epoch: String::new(),
        }
    }

    /// Writes the record so that a reader sees all of it or none of it.
    ///
    /// # Errors
    /// When the folder cannot be made or the file not written.
    pub fn write(&self) -> io::Result<()> {
        self.write_in(Path::new(paths::RECORDS))
    }

    fn write_in(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let path = dir.join(format!("{}.json", self.migration));
        let draft = dir.join(format!(".{}.draft", self.migration));
        let mut file = fs::File::create(&draft)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&draft, &path)
    }

    /// The record of `migration`, if there is one.
    ///
    /// # Errors
    /// When it is there and cannot be read, or is of another version.
    pub fn read(migration: &str) -> io::Result<Option<Self>> {
        Self::read_file(&paths::record(migration))
    }

    fn read_file(path: &Path) -> io::Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let record: Self = serde_json::from_slice(&bytes)
            .map_err(|e| io::Error::other(format!("record {}: {e}", path.display())))?;
        if record.version != VERSION {
            return Err(io::Error::other(format!(
                "record {} is of version {}, this ferry reads {VERSION}",
                path.display(),
                record.version
            )));
        }
        Ok(Some(record))
    }

    /// Every record on this host.
    ///
    /// # Errors
    /// When the folder or a record cannot be read.
    pub fn all() -> io::Result<Vec<Self>> {
        Self::all_in(Path::new(paths::RECORDS))
    }

    fn all_in(dir: &Path) -> io::Result<Vec<Self>> {
        let entries = match fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                records.extend(Self::read_file(&path)?);
            }
        }
        records.sort_by(|a, b| a.migration.cmp(&b.migration));
        Ok(records)
    }

    /// Removes the record of `migration` and what belongs to it; no error when there is none.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(migration: &str) -> io::Result<()> {
        let marks = [paths::decided(migration), paths::preferred(migration)];
        for path in [paths::record(migration)].into_iter().chain(marks) {
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new("m-12345678", "redis", "default", Decision::Committed);
        record.ip = "10.0.0.1/24".into();
        record.write_in(dir.path()).unwrap();
        assert_eq!(Record::all_in(dir.path()).unwrap(), [record]);
    }

    #[test]
    fn a_record_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new("m-12345678", "redis", "default", Decision::Released);
        record.version = 99;
        record.write_in(dir.path()).unwrap();
        let error = Record::all_in(dir.path()).unwrap_err().to_string();
        assert!(error.contains("version 99"), "{error}");
    }

    #[test]
    fn no_folder_means_no_records() {
        assert_eq!(Record::all_in(Path::new("/nonexistent-ferry")).unwrap(), []);
    }
}
