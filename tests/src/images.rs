//! Container images without a registry: made from programs of the base system, imported once into
//! a containerd whose folder every host then starts with a copy of.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::FlockArg;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::exec::run;
use crate::lab::Lab;
use crate::{base, cache, layers, prereq, sweep};

/// Raised when the recipes below change.
const RECIPE: &str = "6";
/// Sources of the workloads; each uses nothing but the standard library.
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bin");
/// The workloads that are compiled for the images.
const WORKLOADS: [&str; 3] = ["ferry-echo", "ferry-memory", "ferry-survive"];

/// How one image is made.
struct Recipe {
    name: &'static str,
    /// Programs and folders of the base system; programs come with the libraries they need.
    paths: &'static [&'static str],
    /// One of [`WORKLOADS`], if it is for one.
    workload: Option<&'static str>,
    /// Whether a shell and the usual small programs are in it.
    busybox: bool,
    command: &'static [&'static str],
}

const RECIPES: &[Recipe] = &[
    Recipe { name: "busybox", paths: &[], workload: None, busybox: true, command: &["/bin/sh"] },
    // Holds the namespaces of a pod.
    Recipe {
        name: "pause",
        paths: &[],
        workload: None,
        busybox: true,
        command: &["tail", "-f", "/dev/null"],
    },
    Recipe {
        name: "redis",
        paths: &["/usr/bin/redis-server", "/usr/bin/redis-cli"],
        workload: None,
        busybox: true,
        command: &[
            "redis-server",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--enable-debug-command",
            "yes",
        ],
    },
    Recipe {
        name: "python",
        paths: &["/usr/bin/python3", "/usr/lib/python3*"],
        workload: None,
        busybox: true,
        command: &["python3"],
    },
    Recipe {
        name: "ferry-echo",
        paths: &[],
        workload: Some("ferry-echo"),
        busybox: false,
        command: &["ferry-echo", "serve", "--port", "7777"],
    },
    Recipe {
        name: "memory",
        paths: &[],
        workload: Some("ferry-memory"),
        busybox: false,
        command: &["ferry-memory", "check"],
    },
    Recipe {
        name: "survive",
        paths: &[],
        workload: Some("ferry-survive"),
        busybox: false,
        command: &["ferry-survive", "pipes"],
    },
];

/// A folder for `/var/lib/containerd` that holds all images, to be copied; made where missing.
pub fn ensure() -> Result<PathBuf> {
    Ok(folder()?.join("containerd"))
}

/// The folder in the cache that [`ensure`]'s is in; made where missing.
pub fn folder() -> Result<PathBuf> {
    let key = key()?;
    let folder = cache::folder("images", &key, |new| {
        eprintln!("making the test images (some seconds, once)");
        build(new)
    });
    folder.context("make the test images")
}

/// Removes base systems, layers and images that this version does not use, unless some lab may.
pub fn prune() -> Result<()> {
    let kinds = [("base", base::key()), ("images", key()?)];
    let kinds = kinds.map(|(kind, key)| (kind, cache::place(kind, &key)));
    let layers = layers::ALL.iter().map(|layer| (layer.name, layer.place()));
    for (kind, current) in kinds.into_iter().chain(layers) {
        let _lock = cache::lock(kind, FlockArg::LockExclusive)?;
        cache::prune(kind, &current)?;
    }
    Ok(())
}

/// Names this version of the images.
fn key() -> Result<String> {
    let (sources, base) = (sources()?, base::key());
    let parts = [RECIPE.as_bytes(), base.as_bytes()];
    Ok(cache::key(parts.into_iter().chain(sources.iter().map(Vec::as_slice))))
}

fn sources() -> Result<Vec<Vec<u8>>> {
    let mut files = Vec::new();
    for workload in WORKLOADS {
        let folder = Path::new(SOURCES).join(workload);
        let found = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
        files.extend(found.flatten().map(|entry| entry.path()));
    }
    files.sort();
    files.iter().map(|file| fs::read(file).context("read a workload")).collect()
}

fn build(new: &Path) -> Result<()> {
    prereq::check_makers()?;
    let base = base::ensure()?;
    for workload in WORKLOADS {
        compile(workload, new)?;
    }
    let mut archives = Vec::new();
    for recipe in RECIPES {
        let stage = new.join("stage").join(recipe.name);
        fill(recipe, &base, new, &stage)?;
        archives.push(pack(recipe, &stage)?);
    }
    import(&archives, &new.join("containerd"))?;
    fs::remove_dir_all(new.join("stage")).context("remove the stage")
}

fn compile(workload: &str, folder: &Path) -> Result<()> {
    run(Command::new("rustc")
        .args(["--edition", "2024", "--crate-name", &workload.replace('-', "_"), "-O"])
        .args(["-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"])
        .arg(folder.join(workload))
        .arg(Path::new(SOURCES).join(workload).join("main.rs")))
    .with_context(|| format!("compile {workload}"))?;
    Ok(())
}

/// Lays out the image's root in `stage`.
fn fill(recipe: &Recipe, base: &Path, workloads: &Path, stage: &Path) -> Result<()> {
    for dir in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "root", "var", "run"] {
        fs::create_dir_all(stage.join(dir)).context("lay out an image")?;
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{name}"), stage.join(name)).context("lay out an image")?;
    }
    run(Command::new("mkdir").args(["-m", "1777"]).arg(stage.join("tmp")))?;
    fs::write(stage.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(stage.join("etc/group"), "root:x:0:\n")?;

    if let Some(workload) = recipe.workload {
        fs::copy(workloads.join(workload), stage.join("usr/bin").join(workload))
            .with_context(|| format!("copy {workload}"))?;
    }
    if recipe.busybox {
        fs::copy(base.join("bin/busybox"), stage.join("usr/bin/busybox"))
            .context("copy busybox")?;
        let list = run(Command::new("chroot").arg(base).args(["/bin/busybox", "--list"]))?;
        for applet in list.stdout.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", stage.join("usr/bin").join(applet)).context("link an applet")?;
        }
    }
    if !recipe.paths.is_empty() {
        copy_with_libraries(recipe, base, stage)?;
    }
    Ok(())
}

/// Copies paths of the base system, links followed to their targets, and every shared library
/// that anything in them needs.
fn copy_with_libraries(recipe: &Recipe, base: &Path, stage: &Path) -> Result<()> {
    let script = format!(
        "for file in $(find {} ! -type d); do echo \"$file\"; readlink -f \"$file\"; done",
        recipe.paths.join(" ")
    );
    let inside = |script: &str| {
        run(Command::new("chroot").arg(base).args(["/bin/sh", "-c", script]))
            .map(|done| done.stdout)
    };
    let mut files: BTreeSet<String> = inside(&script)?.lines().map(str::to_owned).collect();
    let programs: Vec<_> = files
        .iter()
        .filter(|file| file.contains("/bin/") || file.contains(".so"))
        .map(String::as_str)
        .collect();
    let libraries = inside(&format!(
        "for file in {}; do ldd \"$file\" || true; done 2>/dev/null | grep -o '/[^ ]*' | sort -u |
         while read -r file; do echo \"$file\"; readlink -f \"$file\"; done",
        programs.join(" ")
    ))?;
    files.extend(libraries.lines().map(str::to_owned));
    // /lib is a link to /usr/lib on both sides.
    let list: Vec<_> = files
        .iter()
        .map(|file| file.trim_start_matches('/'))
        .map(|file| if file.starts_with("usr/") { file.into() } else { format!("usr/{file}") })
        .collect();
    let list_file = stage.with_extension("list");
    fs::write(&list_file, list.join("\n")).context("write the list of files")?;
    let script = "tar -C \"$1\" -cf - --no-recursion -T \"$2\" | tar -C \"$3\" -xf -";
    run(Command::new("/bin/sh").args(["-ec", script, "copy"]).args([base, &list_file, stage]))?;
    Ok(())
}

/// Packs `stage` as a docker archive of one layer.
fn pack(recipe: &Recipe, stage: &Path) -> Result<PathBuf> {
    let folder = stage.with_extension("archive");
    fs::create_dir_all(&folder).context("make an archive's folder")?;
    let layer = folder.join("layer.tar");
    tar(stage, &layer, &["."])?;
    let digest = Sha256::digest(fs::read(&layer).context("read the layer")?);
    let name = format!("docker.io/library/{}:latest", recipe.name);
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Cmd": recipe.command,
            "Env": [format!("PATH={}", crate::exec::PATH)],
            "WorkingDir": "/",
        },
        "rootfs": {
            "type": "layers",
            "diff_ids": [format!("sha256:{}", cache::hex(&digest))],
        },
        "history": [{ "created": "1970-01-01T00:00:00Z", "created_by": "ferry-tests" }],
    });
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(folder.join("config.json"), config.to_string()).context("write the config")?;
    fs::write(folder.join("manifest.json"), manifest.to_string()).context("write the manifest")?;
    let archive = stage.with_extension("tar");
    tar(&folder, &archive, &["manifest.json", "config.json", "layer.tar"])?;
    Ok(archive)
}

fn tar(from: &Path, to: &Path, what: &[&str]) -> Result<()> {
    run(Command::new("tar")
        .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"])
        .arg("-C")
        .arg(from)
        .arg("-cf")
        .arg(to)
        .args(what))?;
    Ok(())
}

/// Imports the archives on a host of its own and takes over what its containerd made of them.
fn import(archives: &[PathBuf], target: &Path) -> Result<()> {
    let lab = Lab::bare()?;
    let host = lab.host("a");
    for archive in archives {
        let copy = host.root().join("var/tmp/image.tar");
        fs::copy(archive, &copy).context("copy an image to the host")?;
        host.run("ctr image import /var/tmp/image.tar")?;
    }
    // What an import has needed and nothing refers to any more goes now, not in the middle of a test that
    // looks for what is left behind.
    host.run(
        "ctr image tag docker.io/library/busybox:latest collect:latest; \
         ctr image rm --sync collect:latest; sync -f /var/lib/containerd",
    )?;
    host.stop()?;
    fs::rename(sweep::disk(lab.id()).join("a/containerd"), target).context("keep the images")
}
