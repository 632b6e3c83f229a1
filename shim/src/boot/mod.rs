//! What containerd runs the binary for.
//!
//! ```text
//!   containerd ── start ──> start.rs   finds the shim of the group, or makes one and answers (answer.rs)
//!                             │          where to reach it
//!                             └─ spawns ──> serve.rs   the shim itself; its log goes to log.rs
//!   containerd ── delete ─> delete.rs  a shim is gone: what is left of its container
//!   containerd ── -info ──> info.rs    what this runtime is
//! ```
//! Not by the crate's `run`: it serves one version of the Task API, answers a containerd before 2.0 with
//! what that refuses, and takes no further service.

mod answer;
mod confine;
mod delete;
mod info;
mod input;
mod log;
mod serve;
mod spec;
mod start;

pub(crate) use start::{ADDRESS, is_dead};

use anyhow::{Result, bail, ensure};
use containerd_shim::Flags;
use std::path::Path;

/// What the binary is installed as, without the folder, if that is not its own name.
const NAME: &str = "containerd-shim-ferry-v2";

/// Does what the command line asks for.
pub(crate) fn run() -> Result<()> {
    let args: Vec<_> = std::env::args_os().collect();
    let flags = containerd_shim::parse(args.get(1..).unwrap_or_default())?;
    if flags.version {
        println!("{NAME} {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return info::print();
    }
    match flags.action.as_str() {
        "start" => start::run(&flags),
        "delete" => delete::run(&named(flags)?),
        "" => serve::run(&named(flags)?),
        other => bail!("{other:?} is no action of a shim: there are start and delete"),
    }
}

fn named(flags: Flags) -> Result<Flags> {
    ensure!(!flags.namespace.is_empty(), "no -namespace is given: containerd runs this program");
    ensure!(!flags.id.is_empty(), "no -id is given: containerd runs this program");
    Ok(flags)
}

/// The runtime that this program answers for: it may be installed under the name of another one.
fn runtime() -> String {
    let called = std::env::args_os().next().unwrap_or_default();
    runtime_of(Path::new(&called))
}

fn runtime_of(program: &Path) -> String {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let parts = name.strip_prefix("containerd-shim-").and_then(|name| name.rsplit_once('-'));
    let (name, version) = parts.unwrap_or(("ferry", "v2"));
    format!("io.containerd.{name}.{version}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_is_named_after_the_program() {
        let of = |path: &str| runtime_of(Path::new(path));
        assert_eq!(of("/usr/local/bin/containerd-shim-ferry-v2"), "io.containerd.ferry.v2");
        assert_eq!(of("containerd-shim-runc-v2"), "io.containerd.runc.v2");
        assert_eq!(of("/tmp/shim"), "io.containerd.ferry.v2");
    }
}
