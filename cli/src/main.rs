//! ferry: moves running containers between containerd hosts.
fn main() {}
