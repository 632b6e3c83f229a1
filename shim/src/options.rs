//! Options that containerd passes as protobuf `Any`, and the copy kept in the bundle.

use crate::error::{Context as _, Error, Result};
use containerd_shim::bootstrap::any_is;
use containerd_shim::protos::protobuf::MessageFull;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim::oci;
use ferry_oci::runc::Runc;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// File in the bundle, of the same name and form as the Go shim's.
const FILE: &str = "options.json";

/// The runtime options that matter here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct TaskOptions {
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) no_pivot_root: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) no_new_keyring: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) io_uid: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) io_gid: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) binary_name: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) root: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) systemd_cgroup: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) criu_work_path: String,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl TaskOptions {
    /// Decodes the options of a Create request.
    pub(crate) fn decode(any: Option<&Any>) -> Result<Self> {
        let options: oci::Options = decode(any)?;
        Ok(Self {
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            io_uid: options.io_uid,
            io_gid: options.io_gid,
            binary_name: options.binary_name,
            root: options.root,
            systemd_cgroup: options.systemd_cgroup,
            criu_work_path: options.criu_work_path,
        })
    }

    /// The runc of these options.
    pub(crate) fn runc(&self, namespace: &str) -> Runc {
        Runc::new(&self.binary_name, &self.root, namespace, self.systemd_cgroup)
    }

    /// Writes them for the `delete` action, which may have to clean up after a dead shim.
    pub(crate) fn write(&self, bundle: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).context("encode the options")?;
        std::fs::write(bundle.join(FILE), text).context("write the options")
    }

    /// Reads them back; defaults if there are none.
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        match std::fs::read(bundle.join(FILE)) {
            Ok(text) => serde_json::from_slice(&text).context("read the options"),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(err) => Err(err).context("read the options"),
        }
    }
}

/// Decodes the options of a Checkpoint request.
pub(crate) fn checkpoint(any: Option<&Any>) -> Result<oci::CheckpointOptions> {
    decode(any)
}

/// Decodes options of type `M`; none are the defaults, and another type is refused by name.
pub(crate) fn decode<M: MessageFull + Default>(any: Option<&Any>) -> Result<M> {
    let Some(any) = any else {
        return Ok(M::default());
    };
    if any.type_url.is_empty() && any.value.is_empty() {
        return Ok(M::default());
    }
    if !any_is::<M>(any) {
        return Err(Error::invalid_argument(format!(
            "options of type {:?} are not supported, {:?} is expected",
            any.type_url,
            M::descriptor().full_name()
        )));
    }
    M::parse_from_bytes(&any.value)
        .map_err(|err| Error::invalid_argument(format!("decode {:?}: {err}", any.type_url)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::protobuf::Message;
    use containerd_shim::protos::ttrpc::Code;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any { type_url: type_url.into(), value, ..Default::default() }
    }

    #[test]
    fn runc_options_are_read_and_kept() {
        let sent = oci::Options {
            binary_name: "crun".into(),
            root: "/r".into(),
            systemd_cgroup: true,
            ..Default::default()
        };
        let any = any("containerd.runc.v1.Options", sent.write_to_bytes().unwrap());
        let options = TaskOptions::decode(Some(&any)).unwrap();
        let runc = options.runc("ns");
        assert_eq!(runc, Runc::new("crun", "/r", "ns", true));
        let dir = tempfile::tempdir().unwrap();
        options.write(dir.path()).unwrap();
        assert_eq!(TaskOptions::read(dir.path()).unwrap(), options);
    }

    #[test]
    fn another_type_is_refused_by_name() {
        let err = TaskOptions::decode(Some(&any("some.other.Options", vec![]))).unwrap_err();
        assert_eq!(err.code(), Code::INVALID_ARGUMENT);
        assert!(err.to_string().contains("some.other.Options"), "{err}");
        let err = checkpoint(Some(&any("containerd.runc.v1.Options", vec![]))).unwrap_err();
        assert_eq!(err.code(), Code::INVALID_ARGUMENT);
    }

    #[test]
    fn absent_and_empty_options_are_the_defaults() {
        assert_eq!(TaskOptions::decode(None).unwrap(), TaskOptions::default());
        assert_eq!(TaskOptions::decode(Some(&any("", vec![]))).unwrap(), TaskOptions::default());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(TaskOptions::read(dir.path()).unwrap(), TaskOptions::default());
    }

    #[test]
    fn options_written_by_the_go_shim_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"binary_name":"/x/runc","task_api_version":3}"#;
        std::fs::write(dir.path().join(FILE), text).unwrap();
        assert_eq!(TaskOptions::read(dir.path()).unwrap().binary_name, "/x/runc");
    }
}
