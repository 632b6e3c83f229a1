//! What driver and agent say to each other, over any byte stream.
//!
//! ```text
//! driver                              agent
//!   ── Message(Request) ───────────────▶      one request at a time
//!   ── Data … Data, End ───────────────▶      only where the request announces a stream
//!   ◀─────────────── Message(Reply) ──        or Message(Refusal)
//! ```
//! Pages, blobs and files travel as raw data frames, never inside a message.

pub(crate) mod codec;
pub(crate) mod messages;
pub(crate) mod stream;
