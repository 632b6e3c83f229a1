//! The Ferry service, generated from `proto/ferry.proto`, which documents every call.

#![allow(missing_docs, unreachable_pub, clippy::all, unused, non_snake_case)]

include!(concat!(env!("OUT_DIR"), "/mod.rs"));
