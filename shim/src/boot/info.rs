//! `-info`: what this runtime is, for containerd from 2.0 on. Asked before any container is there.

use super::input;
use crate::options::TaskOptions;
use anyhow::{Context as _, Result};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{Message, MessageField};
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use ferry_oci::runc::Runc;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// What the OCI's features are called in an `Any`.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Reads the runtime options, if any, and writes the answer.
pub(super) fn print() -> Result<()> {
    let sent = input::read()?;
    let sent = match sent.is_empty() {
        true => None,
        false => Some(Any::parse_from_bytes(&sent).context("decode the runtime options")?),
    };
    let answer = info(sent)?.write_to_bytes().context("encode the answer")?;
    std::io::stdout().write_all(&answer).context("answer")
}

fn info(sent: Option<Any>) -> Result<RuntimeInfo> {
    let options = TaskOptions::decode(sent.as_ref())?;
    let binary = Runc::new(&options.binary_name, &options.root, "", false).find()?;
    let version =
        RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_string(), ..Default::default() };
    Ok(RuntimeInfo {
        name: super::runtime(),
        version: MessageField::some(version),
        options: sent.into(),
        features: features(&binary).into(),
        ..Default::default()
    })
}

/// What `runc features` says; none of a runtime that does not know the command.
fn features(binary: &Path) -> Option<Any> {
    let output = Command::new(binary).arg("features").stdin(Stdio::null()).output().ok()?;
    let known: Option<serde_json::Value> = serde_json::from_slice(&output.stdout).ok();
    let known = known.filter(|known| output.status.success() && known.is_object())?;
    let value = known.to_string().into_bytes();
    Some(Any { type_url: FEATURES.to_string(), value, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::shim::oci::Options;

    #[test]
    fn a_missing_runtime_is_named() {
        let options = Options { binary_name: "no-such-runtime".into(), ..Default::default() };
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let err = info(Some(any)).unwrap_err().to_string();
        assert!(err.contains("no-such-runtime"), "{err}");
    }

    #[test]
    fn options_come_back_and_a_runtime_without_features_has_none() {
        let options = Options { binary_name: "/bin/true".into(), ..Default::default() };
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let info = info(Some(any.clone())).unwrap();
        assert_eq!(info.options.as_ref(), Some(&any));
        assert!(info.features.is_none());
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    }
}
