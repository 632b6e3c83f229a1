//! Whether CRIU's images ask for more than the container's spec: CRIU makes the mounts and namespaces of
//! its images, and moves tasks into their control groups (see [`Asks`] for what is relied on).
//!
//! What stays as the processes had it, and is not compared: their users, limits, priorities and seccomp
//! filters, and their profile of AppArmor or label of SELinux, which CRIU restores only where the same
//! of both is in force. Device files in file systems in memory come back as they were: whether they can
//! be opened is decided by the device rules of the container's group.

mod mounts;
#[cfg(test)]
mod tests;

use anyhow::Result;
use ferry_oci::criu::DumpOptions;
use ferry_oci::criu::images::Asks;
use serde_json::Value;

use super::spec::{Allowed, Want, given_network, list, refuse, text, want};

/// Modes of CRIU's handling of control groups that leave those alone that are there.
const GROUP_MODES: [&str; 2] = ["soft", "ignore"];

/// Refuses images that ask for more than `spec` has.
///
/// # Errors
/// With all of it, and what allows it.
pub(super) fn check(
    spec: &Value,
    asks: &Asks,
    options: Option<&DumpOptions>,
    allowed: &[Allowed],
) -> Result<()> {
    let mut found = Vec::new();
    namespaces(spec, asks, options.is_some_and(|options| options.in_netns), &mut found);
    if asks.namespaces.is_private("mount") {
        mounts::check(spec, &asks.mounts, &mut found);
    }
    if let Some(group) = &asks.groups {
        want(&mut found, Allowed::Namespaces, group.clone());
    }
    let mode = options.and_then(|options| options.manage_cgroups.as_deref());
    if let Some(mode) = mode.filter(|mode| !GROUP_MODES.contains(mode)) {
        want(&mut found, Allowed::Namespaces, format!("control groups in the mode {mode}"));
    }
    refuse(found, allowed)
}

fn namespaces(spec: &Value, asks: &Asks, in_netns: bool, found: &mut Vec<Want>) {
    let there = &asks.namespaces;
    for namespace in list(&spec["linux"]["namespaces"]) {
        let kind = text(&namespace["type"]);
        // runc and CRIU are in the given one then: see `Container::netns_for_criu`.
        let given = kind == "network" && in_netns && given_network(spec).is_some();
        if !given && !there.is_private(kind) {
            let what = format!("the host's {kind} namespace for its processes");
            want(found, Allowed::Namespaces, what);
        }
    }
    let users = list(&spec["linux"]["namespaces"]).any(|namespace| namespace["type"] == "user");
    if users || there.is_private("user") {
        // Who is who in it is told by the images too.
        want(found, Allowed::Namespaces, "a user namespace".to_owned());
    }
    for other in &there.others {
        want(found, Allowed::Namespaces, other.clone());
    }
}
