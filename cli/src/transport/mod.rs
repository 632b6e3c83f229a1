//! The driver's connection to the agent on the other host.
//!
//! A transport gives a byte stream to an agent; [`link`] speaks the protocol on it. Only ssh so
//! far; a transport knows nothing of migrations.

pub(crate) mod link;
pub(crate) mod ssh;
