//! Handing an address from one host to the other.

pub(crate) mod address;
pub(crate) mod queue;
