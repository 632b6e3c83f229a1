//! `delete`: containerd calls it after a shim has died, or could not be started.

use crate::container::noted_exit;
use crate::reaper::Exit;
use crate::{cleanup, service};
use anyhow::{Context as _, Result};
use containerd_shim::Flags;
use containerd_shim::api::DeleteResponse;
use containerd_shim::protos::protobuf::Message;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Cleans up and answers on standard output. What goes wrong is said on standard error, which
/// containerd logs.
pub(super) fn run(flags: &Flags) -> Result<()> {
    let given = match flags.bundle.as_str() {
        "" => std::env::current_dir().context("find the bundle")?,
        bundle => bundle.into(),
    };
    let bundle = bundle(given, &flags.id);
    let exit = noted_exit(&bundle).unwrap_or_else(|| Exit::now(cleanup::KILLED));
    let response = DeleteResponse {
        pid: cleanup::cleanup(&flags.namespace, &flags.id, &bundle),
        exit_status: exit.status,
        exited_at: service::timestamp(exit.at),
        ..Default::default()
    };
    let answer = response.write_to_bytes().context("encode the answer")?;
    std::io::stdout().write_all(&answer).context("answer")
}

/// containerd may run it in the bundle, or beside it.
fn bundle(given: PathBuf, id: &str) -> PathBuf {
    match given.file_name() {
        Some(name) if name == id => given,
        _ => given.parent().unwrap_or(Path::new("/")).join(id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundle_is_here_or_beside() {
        assert_eq!(bundle("/r/ns/c".into(), "c"), Path::new("/r/ns/c"));
        assert_eq!(bundle("/r/ns/d".into(), "c"), Path::new("/r/ns/c"));
    }
}
