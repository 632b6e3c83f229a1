//! Which containers share a shim.

use anyhow::{Context as _, Result};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::Path;

/// Annotations that name a group, the more specific one first; those of containerd's own shim.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

/// The group of the container `id` in `bundle`: itself, or what its annotations say.
pub(super) fn group(bundle: &Path, id: &str) -> Result<String> {
    let path = bundle.join("config.json");
    let what = || format!("read {}", path.display());
    let config = std::fs::read(&path).with_context(what)?;
    let spec: Spec = serde_json::from_slice(&config).with_context(what)?;
    let annotations = spec.annotations.unwrap_or_default();
    let named = GROUPS.iter().find_map(|name| annotations.get(*name));
    Ok(named.cloned().unwrap_or_else(|| id.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_and_a_named_group_share_a_shim() {
        let dir = tempfile::tempdir().unwrap();
        let of = |config: &str| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            group(dir.path(), "c").unwrap()
        };
        assert_eq!(of("{}"), "c");
        assert_eq!(of(r#"{"annotations":null}"#), "c");
        assert_eq!(of(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#), "pod");
        let both = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod",
                       "io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(of(both), "g");
        std::fs::remove_file(dir.path().join("config.json")).unwrap();
        assert!(group(dir.path(), "c").is_err());
    }
}
