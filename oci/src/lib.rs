//! One container on one host: runc, CRIU, the freezer, the connection lock and the writable layer.
//!
//! No network peers and no containerd here: the shim and the CLI build on this crate, never the
//! other way round.

pub mod announce;
pub mod api;
pub mod awake;
pub mod breakpoints;
pub mod called;
pub mod cgroups;
pub mod cpu_quota;
pub mod criu;
pub mod fast;
pub mod freezer;
pub mod hierarchies;
pub mod layer;
pub mod limited;
pub mod netns;
pub mod overlay;
pub mod pages;
pub mod paths;
pub mod quarantine;
pub mod record;
pub mod runc;
pub mod sockets;
pub mod tmpfs;
pub mod turns;
pub mod warm;

/// Version of the Ferry service and of the wire protocol between driver and agent. Versioned apart
/// from the product: it changes only when the two ends would misunderstand each other.
pub const PROTOCOL: u32 = 3;
