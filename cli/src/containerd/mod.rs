//! What a migration needs of one containerd, at either end of it.
//!
//! ```text
//!   source host                                    destination host
//!   driver ── Containerd (reads)                   agent ── Destination (creates under a lease)
//!     container, task, image, blobs, snapshot        blobs ─ image ─ unpack ─ snapshot ─ container ─ task
//! ```
//!
//! [`Containerd`] only reads, so a plan or an aborted move leaves nothing in the source's containerd;
//! the one thing it changes is [`Containerd::delete_source`], after the move.
//!
//! [`Destination`] is a containerd seen by one migration. Whatever it creates is covered by the lease
//! `ferry-<migration>`, so that containerd's garbage collector neither takes it away during the
//! migration nor leaves it behind after an abort, and what the collector does not own (image, container,
//! task, the container's snapshot) carries the label [`LABEL`]. [`Destination::cleanup`] finds all of it
//! from these two alone, which is why an agent that starts after another one was killed can undo that
//! one's work.

// Parts of this are used by commands that do not exist yet.
#![allow(dead_code, unused_imports)]

mod base64;
mod cleanup;
mod client;
mod containers;
mod content;
mod diff;
mod error;
mod images;
mod leases;
#[cfg(test)]
mod live_tests;
mod manifests;
mod snapshots;
mod tasks;
mod unpack;
mod upload;

pub(crate) use client::{Containerd, Destination};
pub(crate) use containers::{ContainerRecord, TypedBytes};
pub(crate) use content::{Blob, BlobReader, Descriptor};
pub(crate) use error::{Error, Result};
pub(crate) use images::{Image, ImageName};
pub(crate) use leases::rfc3339;
pub(crate) use manifests::{ImageContent, architecture};
pub(crate) use snapshots::{Mount, SnapshotInfo, SnapshotKind, WritableLayer};
pub(crate) use tasks::{CheckpointOptions, Stdio, Task, TaskStatus};
pub(crate) use upload::BlobWriter;

/// Marks what a migration has created; its value is the migration's id.
pub(crate) const LABEL: &str = "io.ferry.migration";
