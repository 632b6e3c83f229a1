//! The answer to `start`: where the shim is, in the form that the asking containerd reads.
//!
//! | containerd | it | form |
//! |---|---|---|
//! | 1.6 | says nothing of versions | the address |
//! | 1.7 to 2.2 | sets `MAX_SHIM_VERSION` | JSON, of at most that version of the Task API |
//! | from 2.3 | sends `BootstrapParams` | `BootstrapResult`, version 3 |
//!
//! All versions up to 2.4 set `MAX_SHIM_VERSION` to 2. 1.7 refuses a higher one; later ones speak both.

use anyhow::{Context as _, Result};
use containerd_shim::bootstrap::{BootstrapResult, Extension};
use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;

/// The newest version of the Task API that is served.
const NEWEST: u32 = 3;
/// The version that a bare address stands for, and the oldest one served.
const OLDEST: u32 = 2;
const PROTOCOL: &str = "ttrpc";
/// Field `extensions` of `BootstrapResult`, from containerd 2.4 on; the crate does not have it yet.
const EXTENSIONS: u32 = 6;
/// The extension that says which mounts the shim makes in containerd's place.
const MOUNT_CAPABILITIES: &str = "type.googleapis.com/containerd.types.MountCapabilities";

/// A form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The address alone.
    Address,
    /// JSON with a version of the Task API.
    Json(u32),
    /// `BootstrapResult`.
    Protobuf,
}

impl Form {
    /// Of a containerd that has sent no `BootstrapParams`. `most` is its `MAX_SHIM_VERSION`.
    pub(super) fn before_bootstrap(most: Option<&str>) -> Self {
        match most.map(str::parse::<u32>) {
            Some(Ok(most)) if most >= OLDEST => Self::Json(most.min(NEWEST)),
            _ => Self::Address,
        }
    }

    /// The answer's bytes.
    pub(super) fn encode(self, address: &str) -> Result<Vec<u8>> {
        match self {
            Self::Address => Ok(address.as_bytes().to_vec()),
            Self::Json(version) => {
                let answer = serde_json::json!({
                    "version": version,
                    "address": address,
                    "protocol": PROTOCOL,
                });
                Ok(answer.to_string().into_bytes())
            }
            Self::Protobuf => {
                let mut answer = BootstrapResult {
                    version: NEWEST as i32,
                    address: address.to_string(),
                    protocol: PROTOCOL.to_string(),
                    ..Default::default()
                };
                let unknown = answer.special_fields.mut_unknown_fields();
                unknown.add_length_delimited(EXTENSIONS, ordinary_mounts()?);
                answer.write_to_bytes().context("encode the answer")
            }
        }
    }
}

/// "No other mounts than those of the system": without it containerd runs `-info` to find out.
fn ordinary_mounts() -> Result<Vec<u8>> {
    let none = Any { type_url: MOUNT_CAPABILITIES.to_string(), ..Default::default() };
    let extension = Extension { value: Some(none).into(), ..Default::default() };
    extension.write_to_bytes().context("encode the mount capabilities")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_at_most_the_one_that_containerd_knows() {
        assert_eq!(Form::before_bootstrap(None), Form::Address);
        assert_eq!(Form::before_bootstrap(Some("2")), Form::Json(2));
        assert_eq!(Form::before_bootstrap(Some("3")), Form::Json(3));
        assert_eq!(Form::before_bootstrap(Some("4")), Form::Json(3));
        assert_eq!(Form::before_bootstrap(Some("1")), Form::Address);
        assert_eq!(Form::before_bootstrap(Some("x")), Form::Address);
    }

    #[test]
    fn each_form_carries_the_address() {
        assert_eq!(Form::Address.encode("unix:///s").unwrap(), b"unix:///s");
        let json = Form::Json(2).encode("unix:///s").unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["version"], 2);
        assert_eq!(json["address"], "unix:///s");
        assert_eq!(json["protocol"], "ttrpc");
        let bytes = Form::Protobuf.encode("unix:///s").unwrap();
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s"));
        assert_eq!(result.protocol, "ttrpc");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("containerd.types.MountCapabilities"), "{text}");
    }
}
