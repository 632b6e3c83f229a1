//! Handing an address from one host to the other.

pub(crate) mod address;
mod cidr;
pub(crate) mod queue;
