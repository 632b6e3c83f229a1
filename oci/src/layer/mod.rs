//! The writable layer of a container: what its overlay's upper directory has, carried to another host.
//!
//! ```text
//!   source, upper directory                            destination, merged root file system
//!   scan ─ delta ─ encode (live) ──────stream───────▶ apply       while the container runs
//!   rescan ─ delta ─ encode (frozen) ──stream───────▶ apply       inside the freeze: what changed since
//! ```
//!
//! The source is read below its overlay, where exactly what differs from the image lies. The destination is
//! written through its overlay, so a whiteout is a removal and an opaque directory one that is emptied
//! first, and how the other kernel marks such things is its own business.
//!
//! **Nothing that changes between the passes may be missed.** A file counts as changed when its inode,
//! size, mtime or ctime differ. Three things could change a file and leave these as they were; each is
//! closed:
//! - A second write in the same tick of the kernel's coarse clock, or a long write that had stamped the
//!   file before the scan and stored its data after the read: a file that was changed within
//!   [`RACY`] before a scan counts as changed at the next.
//! - A write through a shared mapping: the kernel stamps the file only when a clean page is first written to.
//!   So the live pass has a file's dirty pages written back *after* it was looked at and *before* it is
//!   read; the next write to any page stamps it again. A file system without write-back (tmpfs) gives no
//!   such stamp: there, every file counts as changed.
//! - A file that goes away while it is read: [`Encoded::unsettled`] names it, and
//!   [`Manifest::forget`] makes it count as changed.
//!
//! The upper directory is written by the container, the stream comes from another host: neither is trusted.
//! Both trees are only ever walked by descriptor, without following links, and every length is bounded
//! before memory is taken for it.

mod apply;
mod codec;
mod delta;
mod encode;
mod manifest;
mod root;
mod scan;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

pub use apply::{Applied, apply};
pub use delta::{Change, delta};
pub use encode::{Encoded, Pass, encode};
pub use manifest::{Entry, Kind, Manifest, Meta, RACY, Time};
pub use scan::{rescan, scan};

/// Version of the stream's format, apart from the product's and the protocol's.
pub const FORMAT: u16 = 1;

/// Why a writable layer could not be read, carried or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the layer could not be read or written.
    #[error("cannot {doing} {} of the writable layer", shown(path))]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file, relative to the layer's root.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel keeps a part of the layer where its upper directory does not show it.
    #[error(
        "{} of the writable layer was renamed or changed by reference (overlay option {option}); mount the \
         overlay with {option}=off, or copy it within the container and remove the original",
        shown(path)
    )]
    ByReference {
        /// The file or directory.
        path: PathBuf,
        /// Overlay option that allows it.
        option: &'static str,
    },
    /// Something changed inside the freeze.
    #[error(
        "{} of the writable layer changed while the container was frozen; does something outside of it write there?",
        shown(path)
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The stream could not be sent or received.
    #[error("the stream of the writable layer broke off")]
    Stream(#[source] io::Error),
    /// The stream has a version that this program does not speak.
    #[error(
        "the stream of the writable layer has format {0}, this program speaks {FORMAT}; install the same version of ferry on both hosts"
    )]
    Version(u16),
    /// The stream makes no sense.
    #[error("the stream of the writable layer is malformed: {0}")]
    Malformed(&'static str),
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { doing, path: path.to_owned(), source: source.into() }
    }
}

/// Result of working on a writable layer.
pub type Result<T> = std::result::Result<T, Error>;

fn shown(path: &Path) -> String {
    format!("/{}", path.display())
}
