//! What of `ferry` its tests are made from; the command itself is the binary.

pub mod phase;
