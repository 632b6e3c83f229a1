//! What a checkpoint has made, and what it is called.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use crate::checkpoint::format::Statistics;

/// What was made of it.
#[derive(Serialize)]
pub(super) struct Made {
    /// Name of the image, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) digest: Option<String>,
    /// The file, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) file: Option<PathBuf>,
    /// Its size, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) file_bytes: Option<u64>,
    pub(super) statistics: Statistics,
}

impl Made {
    /// Tells the operator.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub(super) fn show(&self, json: bool) -> Result<()> {
        let statistics = self.statistics;
        if json {
            println!("{}", serde_json::to_string_pretty(self)?);
            return Ok(());
        }
        if let Some(name) = &self.name {
            println!("{name}");
        }
        if let Some(file) = &self.file {
            println!("{}", file.display());
        }
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
}

/// A name that says what it is of and when it was made.
pub(super) fn default_name(container: &str) -> String {
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
}
