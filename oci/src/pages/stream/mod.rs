//! The page stream: how memory gets from a container that runs to the store on its destination.
//!
//! ```text
//!   changes of a round ─▶ slices of 256 KB ─▶ read ─ zero? ─ hash ─ known? ─ repeated? ─ zstd? ─▶ out, in order
//!                          (several workers)               └─ one table, under a lock ─┘
//!   out ─▶ the link ─▶ Receiver: decode, verify ─▶ store          hashes of the store ─▶ Sender::learn
//! ```
//! Rounds go on while the container runs: in pre-copy rounds no byte is sent that the destination
//! has, and the workers keep to what others leave of the CPUs. The frozen round is about time alone:
//! its pages go as they are, from the first one on.
//!
//! Pages are compared by xxh3-128 with seed 0. It is no cryptographic hash: a program that makes two
//! pages collide on purpose can lose one of them, in its own container.

mod apply;
mod body;
mod codec;
mod compress;
mod decode;
mod error;
mod hashes;
mod join;
mod known;
mod out;
mod pace;
mod plan;
mod sender;
mod stats;
mod worker;

#[cfg(test)]
mod measure;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use apply::{PageSink, Received, Receiver};
pub use codec::{FORMAT, Run, SameRun};
pub use compress::Compression;
pub use decode::{Decoder, MAX_CHUNK, Record};
pub use error::{DecodeError, ReceiveError, SendError};
pub use hashes::{HashReader, send_hashes};
pub use join::Processes;
pub use pace::Restraint;
pub use plan::Change;
pub use sender::{Options, Sender};
pub use stats::RoundStats;
pub use worker::PageSource;
