//! runc's command line: one small builder per command, and the reader of its log.
//!
//! Nothing here starts a process: a builder becomes a [`std::process::Command`] through
//! [`Runc::command`], and the caller runs it under its own reaper.

mod commands;
mod log;

pub use commands::{
    Checkpoint, Create, Delete, Exec, Kill, Pause, Ps, Restore, Resume, Start, State, Update,
};
pub use log::{LogError, last_error, tail};

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder below which containerd's runc shims keep runc's state, one folder per namespace.
pub const DEFAULT_ROOT: &str = "/run/containerd/runc";

/// The OCI runtime is missing.
#[derive(Debug, thiserror::Error)]
#[error(
    "exec: {0:?}: executable file not found in $PATH; the runtime option BinaryName names it, \
     or the package runc brings it"
)]
pub struct NoBinary(PathBuf);

/// A runc binary and the options that are the same for all of its commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runc {
    /// Binary, looked up in `PATH` unless it is a path.
    pub binary: PathBuf,
    /// `--root`: where runc keeps its state.
    pub root: PathBuf,
    /// `--systemd-cgroup`: cgroups are made through systemd.
    pub systemd_cgroup: bool,
}

impl Runc {
    /// The runc of `namespace`. Empty `binary` and `root` stand for the defaults, as in
    /// containerd's runtime options.
    pub fn new(binary: &str, root: &str, namespace: &str, systemd_cgroup: bool) -> Self {
        let binary = if binary.is_empty() { "runc" } else { binary };
        let root = if root.is_empty() { DEFAULT_ROOT } else { root };
        Self { binary: binary.into(), root: Path::new(root).join(namespace), systemd_cgroup }
    }

    /// The command line of `verb`. runc's errors go to `log` as JSON, see [`last_error`].
    pub fn command(&self, verb: &dyn Verb, log: &Path) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root);
        command.arg("--log").arg(log).args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb.name()).args(verb.args());
        command
    }

    /// Where the binary is.
    ///
    /// # Errors
    /// When it is not there, or no program.
    pub fn find(&self) -> Result<PathBuf, NoBinary> {
        let is_program =
            |path: &Path| path.metadata().is_ok_and(|m| m.is_file() && m.mode() & 0o111 != 0);
        let missing = || NoBinary(self.binary.clone());
        if self.binary.components().count() > 1 {
            let found = is_program(&self.binary).then(|| self.binary.clone());
            return found.ok_or_else(missing);
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates = std::env::split_paths(&path).map(|folder| folder.join(&self.binary));
        candidates.into_iter().find(|path| is_program(path)).ok_or_else(missing)
    }

    /// Folder that holds runc's state of container `id`.
    pub fn state_dir(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }
}

/// One runc command with its options.
pub trait Verb: Send + Sync {
    /// The command's name.
    fn name(&self) -> &'static str;
    /// What follows the name.
    fn args(&self) -> Vec<OsString>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(command: &Command) -> Vec<String> {
        std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn defaults_are_those_of_containerd() {
        let runc = Runc::new("", "", "default", false);
        let command = runc.command(&Start { id: "a" }, Path::new("/b/log.json"));
        assert_eq!(
            argv(&command).join(" "),
            "runc --root /run/containerd/runc/default --log /b/log.json --log-format json start a"
        );
    }

    #[test]
    fn a_missing_binary_is_named() {
        let find = |binary: &str| Runc::new(binary, "", "default", false).find();
        assert!(find("sh").unwrap().is_absolute());
        assert_eq!(find("/bin/sh").unwrap(), Path::new("/bin/sh"));
        for missing in ["no-such-runtime", "/bin/no-such-runtime", "/", "./sh"] {
            let err = find(missing).unwrap_err().to_string();
            assert!(err.contains(&format!("{missing:?}")), "{err}");
        }
    }

    #[test]
    fn options_are_honoured() {
        let runc = Runc::new("/opt/runc", "/r", "k8s.io", true);
        let command = runc.command(&Pause { id: "a" }, Path::new("l"));
        assert_eq!(
            argv(&command).join(" "),
            "/opt/runc --root /r/k8s.io --log l --log-format json --systemd-cgroup pause a"
        );
        assert_eq!(runc.state_dir("a"), Path::new("/r/k8s.io/a"));
    }
}
