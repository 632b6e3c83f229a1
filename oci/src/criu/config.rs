//! CRIU's configuration file for one run.

use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// Environment variable that names a configuration file. It reaches CRIU through runc, and works
/// where `network-lock` in runc.conf crashes CRIU 4.1.1.
pub const CONFIG_ENV: &str = "CRIU_CONFIG_FILE";

/// How CRIU silences a container's connections during a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkLock {
    /// Whatever CRIU does by itself.
    #[default]
    Default,
    /// Nothing: the caller has a lock of its own.
    Skip,
    /// A table of CRIU's own.
    Nftables,
    /// Rules in the host's chains.
    Iptables,
}

impl NetworkLock {
    /// The value of `network-lock`, if one is to be given.
    pub fn value(self) -> Option<&'static str> {
        match self {
            Self::Default => None,
            Self::Skip => Some("skip"),
            Self::Nftables => Some("nftables"),
            Self::Iptables => Some("iptables"),
        }
    }
}

/// The lines of a configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Keep established TCP connections.
    pub tcp_established: bool,
    /// Network lock.
    pub network_lock: NetworkLock,
    /// Script that CRIU calls at each of its actions.
    pub action_script: Option<PathBuf>,
    /// Further lines. An option with an optional argument needs `=` (`manage-cgroups=ignore`).
    pub extra: Vec<String>,
}

impl Config {
    /// The file's text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if self.tcp_established {
            text.push_str("tcp-established\n");
        }
        if let Some(lock) = self.network_lock.value() {
            let _ = writeln!(text, "network-lock {lock}");
        }
        if let Some(script) = &self.action_script {
            let _ = writeln!(text, "action-script {}", script.display());
        }
        for line in &self.extra {
            let _ = writeln!(text, "{line}");
        }
        text
    }

    /// Writes the file as `dir`/criu.conf and returns its path.
    pub fn write(&self, dir: &Path) -> io::Result<PathBuf> {
        let path = dir.join("criu.conf");
        std::fs::write(&path, self.text())?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_configuration_is_an_empty_file() {
        assert_eq!(Config::default().text(), "");
    }

    #[test]
    fn every_option_is_a_line() {
        let config = Config {
            tcp_established: true,
            network_lock: NetworkLock::Skip,
            action_script: Some("/w/hold.sh".into()),
            extra: vec!["manage-cgroups=ignore".into()],
        };
        assert_eq!(
            config.text(),
            "tcp-established\nnetwork-lock skip\naction-script /w/hold.sh\n\
             manage-cgroups=ignore\n"
        );
    }
}
