//! Mounts that podman adds to every container, with files of its own as their source: its hosts,
//! hostname, resolv.conf and mark, and `/dev/shm`. This host has no such files, and what is in them is not in
//! the archive. So the container gets files of the same names in its root, and a `/dev/shm` of its own;
//! CRIU's images, which call them external, are changed to match.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use ferry_oci::criu::images::{Folder, Outside, Source as _, take_in};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::read_text;
use crate::checkpoint::export::KEPT_SHM;

const HOSTS: &str = "/etc/hosts";
const HOSTNAME: &str = "/etc/hostname";
const RESOLV: &str = "/etc/resolv.conf";
const FILES: [&str; 4] = [HOSTS, HOSTNAME, RESOLV, "/run/.containerenv"];
const SHM: &str = "/dev/shm";

/// Takes podman's own mounts out of a spec; where they were.
pub(super) fn take_out(spec: &mut Value) -> Vec<&'static str> {
    let mut found = Vec::new();
    let Some(mounts) = spec["mounts"].as_array_mut() else { return found };
    mounts.retain_mut(|mount| {
        let Some(target) = podmans(mount) else { return true };
        found.push(target);
        if target != SHM {
            return false;
        }
        *mount = own_shm();
        true
    });
    found
}

fn own_shm() -> Value {
    let options = json!(["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]);
    json!({"destination": SHM, "type": "tmpfs", "source": "shm", "options": options})
}

/// Gives a spec that has no `/dev/shm` one, for processes that have one `in_memory`: podman takes it out of what it
/// imports. One that an export of ours has kept from that has its name again.
pub(super) fn put_in(spec: &mut Value, in_memory: &[String]) {
    let Some(mounts) = spec["mounts"].as_array_mut() else { return };
    for mount in mounts.iter_mut().filter(|mount| mount["destination"] == KEPT_SHM) {
        mount["destination"] = json!(SHM);
    }
    let there = mounts.iter().any(|mount| mount["destination"] == SHM);
    if !there && in_memory.iter().any(|target| target == SHM) {
        mounts.push(own_shm());
    }
}

/// Where a mount is, if it is one of podman's own: its source is called as it is, in podman's folder of the
/// container.
fn podmans(mount: &Value) -> Option<&'static str> {
    let text = |key: &str| mount[key].as_str().unwrap_or_default();
    let target = FILES.into_iter().chain([SHM]).find(|target| *target == text("destination"))?;
    let name = target.rsplit('/').next()?;
    let own = text("source").ends_with(&format!("/userdata/{name}"));
    (own && text("type") == "bind").then_some(target)
}

/// Changes what CRIU's images say of the mounts at `targets`. What was in `/dev/shm` is in the archive
/// `shm`, if that is there; each file system that gets it takes of the `room`, in bytes. Where file systems in
/// memory are mounted that are the container's own.
///
/// # Errors
/// When an image is not as it should be, or cannot be written; when there is no room.
pub(super) fn change(
    images: &Path,
    targets: &[&str],
    shm: &Path,
    room: &mut u64,
) -> Result<Vec<String>> {
    let each = fs::metadata(shm).map_or(0, |meta| meta.len());
    let mut own = Vec::new();
    let files: Vec<&str> = targets.iter().copied().filter(|target| *target != SHM).collect();
    let tmpfs: Vec<&str> = targets.iter().copied().filter(|target| *target == SHM).collect();
    let outside = Outside { files: &files, tmpfs: &tmpfs };
    let mut folder = Folder::open(images).context("look into the images")?;
    let is_mounts = |name: &String| name.starts_with("mountpoints-") && name.ends_with(".img");
    for name in folder.names().into_iter().filter(is_mounts) {
        let Some(image) = folder.read(&name).with_context(|| name.clone())? else { continue };
        let taken = take_in(&image, outside).with_context(|| name.clone())?;
        fs::write(images.join(&name), &taken.image).with_context(|| name.clone())?;
        own.extend(taken.own);
        for (_, name) in taken.tmpfs {
            *room = room.checked_sub(each).with_context(|| {
                format!("what is in {SHM} comes more often than there is room for")
            })?;
            let packed = File::create_new(images.join(&name)).and_then(|to| pack(shm, to));
            packed.with_context(|| format!("write {name}"))?;
        }
    }
    Ok(own)
}

/// The archive `from` as CRIU takes it; an empty one where there is none.
fn pack(from: &Path, to: File) -> io::Result<()> {
    let mut to = GzEncoder::new(BufWriter::new(to), Compression::fast());
    if from.exists() {
        io::copy(&mut BufReader::new(File::open(from)?), &mut to)?;
    } else {
        to.write_all(&[0; 1024])?;
    }
    to.finish()?.flush()
}

/// The files that take the place of podman's at `targets`.
pub(super) fn files(targets: &[&str], spec: &Value) -> Vec<(String, Vec<u8>)> {
    let is_plain = |name: &&str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
    };
    let name = spec["hostname"].as_str().filter(is_plain).unwrap_or("localhost");
    let text = |target: &str| match target {
        HOSTS => format!("127.0.0.1 localhost\n::1 localhost\n127.0.0.1 {name}\n").into_bytes(),
        HOSTNAME => format!("{name}\n").into_bytes(),
        // As every container has the host's.
        RESOLV => read_text(Path::new(RESOLV)).unwrap_or_default(),
        _ => Vec::new(),
    };
    let files = targets.iter().filter(|target| **target != SHM);
    files.map(|target| ((*target).to_owned(), text(target))).collect()
}
