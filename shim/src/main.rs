//! containerd-shim-ferry-v2.
fn main() {}
