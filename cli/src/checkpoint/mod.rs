//! Checkpoints as images and as files: `ferry checkpoint`, `restore`, `discard` and `push`.
//!
//! ```text
//!   create.rs   freeze ─ dump ─ files ─ thaw ─┬▶ archive.rs, files.rs ─▶ content store ─▶ image REF
//!                                             └▶ export/ ─▶ FILE, as podman makes and takes it
//!                                        (with --exit: the container ends here, when all is safe)
//!   restore.rs  origin.rs: image REF, or FILE by import/
//!                 └▶ spec.rs: may it have that? ─ snapshot ─ container ─ task ─ start
//! ```
//! An image is an OCI index as containerd's own clients make it (`format.rs`), and they take ours.
//! Between freeze and thaw there is the dump and what has changed of the files since the last look;
//! compression, digests, the content store and files come after.

mod addresses;
mod archive;
mod blobs;
mod create;
mod discard;
mod export;
mod files;
mod fits;
mod format;
mod import;
mod origin;
mod place;
mod push;
mod restore;
mod spec;
mod streams;
mod trust;

pub(crate) use create::{Options as CreateOptions, run as create};
pub(crate) use discard::run as discard;
pub(crate) use export::{Compression, Wish as ExportWish};
pub(crate) use format::{IMAGES, SPEC, SUMMARY};
pub(crate) use push::run as push;
pub(crate) use restore::{Options as RestoreOptions, run as restore};
pub(crate) use spec::Allowed;
