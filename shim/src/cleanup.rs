//! The `delete` action: containerd calls it after a shim has died, or could not be started.

use crate::boot;
use crate::error::{Context as _, Result};
use crate::mounts;
use crate::options::TaskOptions;
use crate::rules;
use crate::strays;
use ferry_oci::runc::Delete;
use ferry_oci::sockets::{self, Silenced};
use ferry_oci::{cgroups, paths, quarantine};
use log::warn;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Exit code of a container that was killed with its shim.
pub(crate) const KILLED: u32 = 128 + 9;

/// An image that CRIU writes at the end of a dump.
const LAST_IMAGE: &str = "inventory.img";

/// Kills what is left of container `id` and removes all of it. Every step is tried; what fails is
/// reported on stderr, which containerd logs. Returns the pid of init, 0 if unknown.
pub(crate) fn cleanup(namespace: &str, id: &str, bundle: &Path) -> u32 {
    let silenced = silence(bundle);
    let steps = [
        ("end what works on the container", end_commands(namespace, bundle)),
        ("remove the container", delete(namespace, id, bundle)),
        ("remove its cgroups", strays::remove_cgroups(bundle)),
        ("unmount its root file system", mounts::umount(&bundle.join("rootfs"))),
        // CRIU mounts cgroups in its work folder while it restores.
        ("unmount what CRIU has left", mounts::umount(&bundle.join("work"))),
        ("unmount its layers", mounts::umount(&bundle.join(mounts::SHIFTED))),
        ("remove the rules of its dump", rules::remove_noted(bundle)),
        ("remove what is left of its migration", remove_migration(bundle)),
        ("remove its pre-dumps", remove(&paths::pre_dumps(namespace, id))),
        ("remove its terminal's FIFOs", remove(&paths::terminal(namespace, id))),
        ("remove the Ferry service's socket", remove_ferry_socket(bundle)),
        ("remove the Task service's socket", remove_task_socket(bundle)),
    ];
    for (what, result) in steps {
        if let Err(err) = result {
            warn!("{what}: {err}");
            eprintln!("{what}: {err}");
        }
    }
    if let Some(silenced) = silenced {
        silenced.leave();
    }
    init_pid(bundle)
}

/// A container that was dumped may live on elsewhere with its connections: their peers must not hear
/// of its end here. To be held until it has ended.
fn silence(bundle: &Path) -> Option<Silenced> {
    let migration = migration(bundle)?;
    if !paths::images(&migration).join(LAST_IMAGE).exists() {
        return None;
    }
    let pids = cgroups::pids(init_pid(bundle)).ok()?;
    sockets::silence(&pids).inspect_err(|err| warn!("silence the connections: {err}")).ok()
}

/// The migration that the container was leaving by.
fn migration(bundle: &Path) -> Option<String> {
    let migration = std::fs::read_to_string(bundle.join(paths::MIGRATION_FILE)).ok()?;
    paths::is_migration_id(&migration).then_some(migration)
}

fn init_pid(bundle: &Path) -> u32 {
    let pid = std::fs::read_to_string(bundle.join("init.pid")).unwrap_or_default();
    pid.trim().parse().unwrap_or_default()
}

fn end_commands(namespace: &str, bundle: &Path) -> Result<()> {
    let runc = TaskOptions::read(bundle)?.runc(namespace);
    strays::end(&runc.binary, bundle)
}

fn delete(namespace: &str, id: &str, bundle: &Path) -> Result<()> {
    let runc = TaskOptions::read(bundle)?.runc(namespace);
    let state = runc.state_dir(id);
    if !state.exists() {
        return Ok(());
    }
    mounts::detach_criu_root(&state)?;
    let log = bundle.join("log-delete.json");
    let mut command: Command = runc.command(&Delete { id, force: true }, &log);
    // Nothing reaps behind our back here: this process runs one action and ends.
    let output = command.stdin(Stdio::null()).output().context("run runc")?;
    match output.status.success() || !state.exists() {
        true => Ok(()),
        false => {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
            Err(crate::error::Error::internal(format!("runc delete: {text}")))
        }
    }
}

/// A shim that was killed in a migration leaves the connection lock and the images; the frozen
/// tasks have ended with it. A record stays: its driver has to hear of it.
fn remove_migration(bundle: &Path) -> Result<()> {
    let Some(migration) = migration(bundle) else { return Ok(()) };
    let images = std::fs::remove_dir_all(paths::images(&migration));
    // A network namespace that is given by path outlives its container, and what locks it would too.
    let unlocked = rules::inside(bundle, None, || quarantine::clear(&migration));
    let _ = std::fs::remove_dir_all(paths::hide(&migration));
    quarantine::clear(&migration).context("forget the migration")?;
    match images {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(err).context("remove the images")
        }
        _ => unlocked,
    }
}

/// Removes a folder that may not be there.
///
/// # Errors
/// When it stays.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(err).context(format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// A dead shim cannot remove its sockets itself. Not those that the shim of a group still serves.
fn remove_ferry_socket(bundle: &Path) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Announced {
        socket: PathBuf,
    }
    let Ok(text) = std::fs::read(bundle.join(paths::BUNDLE_FILE)) else {
        return Ok(());
    };
    let announced: Announced = serde_json::from_slice(&text).context("read ferry.json")?;
    if !boot::is_dead(&announced.socket) {
        return Ok(());
    }
    // Those that CRIU was to answer on are named after it.
    let stem = announced.socket.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    for entry in std::fs::read_dir(paths::SOCKETS).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{stem}-")) {
            remove_below(&entry.path(), paths::SOCKETS)?;
        }
    }
    remove_below(&announced.socket, paths::SOCKETS)
}

/// Not one that the shim of a group still serves.
fn remove_task_socket(bundle: &Path) -> Result<()> {
    let Ok(address) = std::fs::read_to_string(bundle.join(boot::ADDRESS)) else {
        return Ok(());
    };
    let path = Path::new(address.trim().strip_prefix("unix://").unwrap_or(address.trim()));
    match boot::is_dead(path) {
        true => remove_file(path),
        false => Ok(()),
    }
}

/// Removes the file `path` if it lies directly in `folder`.
fn remove_below(path: &Path, folder: &str) -> Result<()> {
    match path.parent() == Some(Path::new(folder)) {
        true => remove_file(path),
        false => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(err).context(format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
