//! A container's memory on its way: found, read, sent, stored and served, page by page.
//!
//! ```text
//!   source                                              destination
//!   areas ─▶ tracker ─▶ reader ─▶ stream::Sender ═════▶ stream::Receiver ─▶ store
//!            (inject, scan)          rounds: when to stop                     │
//!                                                                    daemon ◀─┘
//!                                                       CRIU, lazy ─▶ (keeper, worker)
//! ```
//! CRIU's dump leaves these pages out ([`crate::criu::Hiding`]), so its time does not grow with
//! memory. Everything here is one container on one host; the stream's bytes are carried by others.

pub mod areas;
pub mod copier;
pub mod daemon;
pub mod inject;
pub mod patch;
pub mod predump;
pub mod reader;
pub mod rounds;
pub mod scan;
pub mod serve;
pub mod store;
pub mod stream;
pub mod tracker;

/// Size of a page, bytes. Hosts with another page size are refused by the preflight.
pub const PAGE: u64 = 4096;
