//! `ferry predump`: memory is written down while the container runs, and the next checkpoint dumps only
//! what has changed since.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ferry_oci::api::ferry::PreDumpResponse;
use ferry_oci::paths;

use crate::describe::checks::RUNTIME;
use crate::lock;
use crate::shim::{self, Shim};
use crate::wire::messages::ContainerdAddress;

/// Makes a pre-dump of `container`: in a folder of ferry's own that goes with its task, or below `folder`.
///
/// # Errors
/// When there is none; the container runs as before, and the next pre-dump is a first one.
pub(crate) async fn run(
    containerd: &ContainerdAddress,
    container: &str,
    folder: Option<&Path>,
    json: bool,
) -> Result<()> {
    let _driver = lock::driver(&containerd.namespace, container).await?;
    let shim = connect(containerd, container).await?;
    let last = Some(PathBuf::from(shim.describe().await?.pre_dump));
    let last = last.filter(|last| !last.as_os_str().is_empty());
    let own = paths::pre_dumps(&containerd.namespace, container);
    let wanted = folder.map(std::path::absolute).transpose().context("find the folder")?;
    let continued = last.as_deref().and_then(Path::parent).map(Path::to_owned);
    let above = wanted.or(continued).unwrap_or_else(|| own.clone());
    // Those in another folder may be moved away.
    let last = last.filter(|last| last.parent() == Some(above.as_path()));
    if last.is_none() && above == own {
        // What nothing builds on any more.
        shim.end_pre_dumps().await?;
    }
    let number = next_number(&above)?;
    let folder = above.join(number.to_string());
    sweep(containerd);
    let done = shim.pre_dump(&folder, last.as_deref()).await;
    let done = done.with_context(|| format!("there is no pre-dump of {container}"))?;
    show(&folder, last.as_deref(), &done, json)
}

/// Forgets the pre-dumps of `container`: nothing is tracked any more.
///
/// # Errors
/// When its shim cannot be asked.
pub(crate) async fn end(containerd: &ContainerdAddress, container: &str) -> Result<()> {
    let _driver = lock::driver(&containerd.namespace, container).await?;
    connect(containerd, container).await?.end_pre_dumps().await
}

async fn connect(containerd: &ContainerdAddress, container: &str) -> Result<Shim> {
    if !paths::is_container_id(container) {
        bail!("{container:?} is no id of a container");
    }
    let bundle = shim::bundle(&containerd.socket, &containerd.namespace, container);
    if !bundle.exists() {
        bail!("{container} does not run in namespace {}: start it", containerd.namespace);
    }
    Shim::connect(&bundle, container).await?.with_context(|| {
        format!("{container} runs with another runtime: start it with --runtime {RUNTIME}")
    })
}

/// Removes pre-dumps of containers that are gone: a host that was switched off has left them.
fn sweep(containerd: &ContainerdAddress) {
    for entry in std::fs::read_dir(paths::PRE_DUMPS).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let lives = splits(&name)
            .any(|(namespace, id)| shim::bundle(&containerd.socket, namespace, id).exists());
        if !lives && let Err(error) = std::fs::remove_dir_all(entry.path()) {
            log::warn!("remove {}: {error}", entry.path().display());
        }
    }
}

/// What `NAMESPACE.CONTAINER` may stand for: both may have dots.
fn splits(name: &str) -> impl Iterator<Item = (&str, &str)> {
    name.match_indices('.').map(|(at, _)| (&name[..at], &name[at + 1..]))
}

/// One more than the highest that is there.
fn next_number(above: &Path) -> Result<u32> {
    let entries = match std::fs::read_dir(above) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(1),
        entries => entries.with_context(|| format!("read {}", above.display()))?,
    };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(numbers.max().unwrap_or(0_u32).saturating_add(1))
}

fn show(folder: &Path, parent: Option<&Path>, done: &PreDumpResponse, json: bool) -> Result<()> {
    if json {
        let all = serde_json::json!({
            "folder": folder,
            "parent": parent,
            "bytes": done.bytes,
            "in_parent_bytes": done.in_parent,
            "processes": done.processes,
            "took_us": done.took_us,
            "stopped_us": done.stopped_us,
            "by_criu": done.by_criu,
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{}", folder.display());
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let ms = |us: u64| us as f64 / 1000.0;
    let kept = match parent {
        Some(_) if !done.by_criu => format!(", {:.1} MiB in those before", mib(done.in_parent)),
        _ => String::new(),
    };
    let by = match done.by_criu {
        true => ", by CRIU".to_owned(),
        false => format!(", processes stopped for {:.2} ms", ms(done.stopped_us)),
    };
    eprintln!("{:.1} MiB written{kept} in {:.1} ms{by}", mib(done.bytes), ms(done.took_us));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reading_of_a_name_counts() {
        let all: Vec<_> = splits("k8s.io.redis").collect();
        assert_eq!(all, [("k8s", "io.redis"), ("k8s.io", "redis")]);
        assert_eq!(splits("none").count(), 0);
    }

    #[test]
    fn pre_dumps_are_numbered_and_other_names_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(next_number(&dir.path().join("missing")).unwrap(), 1);
        for name in ["1", "9", "10", "x", "-3"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(next_number(dir.path()).unwrap(), 11);
    }
}
