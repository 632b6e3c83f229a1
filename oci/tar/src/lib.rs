//! Archives of small trees, as CRIU makes them of each tmpfs of a container: see the program.

mod create;
mod extract;
mod gzip;
mod ustar;

pub use create::{pack, run as create};
pub use extract::{run as extract, unpack};

/// Why it was not done.
#[derive(Debug)]
pub enum Stop {
    /// Nothing has been changed: the real tar is to do it.
    Real,
    /// Too late for that.
    Failed(&'static str, std::io::Error),
}
