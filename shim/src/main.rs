//! containerd-shim-ferry-v2: runs containers through runc, and moves them.
//!
//! ```text
//!   containerd ── ttrpc ──> service ──> containers ──> container ──> runtime ──> runc
//!       ^                                                  │            │
//!       └────────────────── events <───────────────────────┘         reaper
//!   ferry ──────── ttrpc ──> ferry ──────────────────────────^
//! ```
//! One shim process serves one container, or all of a group (a pod), in the Task service that
//! containerd knows (`service`) and, on a socket of its own, in the Ferry service (`ferry`). `boot`
//! says how it comes to run.

mod boot;
mod cgroup;
mod cleanup;
mod container;
mod containers;
mod error;
mod events;
mod ferry;
#[cfg(test)]
mod fuzz;
mod io;
mod mounts;
mod options;
mod reaper;
mod rules;
mod runtime;
mod service;
mod state;
mod strays;

use ferry_oci::called;
use ferry_oci::criu::wrapper;
use ferry_oci::pages::{predump::serve as predump, serve as pages};
use std::process::ExitCode;

fn main() -> ExitCode {
    // runc has started it in CRIU's place.
    if called::is(wrapper::NAME) {
        eprintln!("{}", wrapper::run());
        return ExitCode::FAILURE;
    }
    // The shim has started it, to track a container's writes.
    let tracking = if called::is(predump::NAME) {
        Some(predump::serve())
    } else if called::is(pages::NAME) {
        Some(pages::serve())
    } else {
        None
    };
    if let Some(ended) = tracking {
        // Nobody listens: the shim hears of it by the end.
        return if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match boot::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("containerd-shim-ferry-v2: {err:#}");
            ExitCode::FAILURE
        }
    }
}
