//! Test hosts made of namespaces.
