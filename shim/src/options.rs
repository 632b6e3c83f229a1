//! Options that containerd passes as protobuf `Any`, and the copy kept in the bundle.

mod generic;

use crate::error::{Context as _, Error, Result};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{Message, UnknownValueRef};
use containerd_shim::protos::shim::oci;
use ferry_oci::runc::Runc;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// File in the bundle, of the same name and form as the Go shim's.
const FILE: &str = "options.json";
/// One more, with nothing but the binary's name: where that shim's `delete` looks for it.
const RUNTIME_FILE: &str = "runtime";

/// Names of the messages. Asking the messages themselves builds descriptions of all of them, which
/// would stay in memory.
const RUNC: &str = "containerd.runc.v1.Options";
const CHECKPOINT: &str = "containerd.runc.v1.CheckpointOptions";

/// runc's options: those of `containerd.runc.v1.Options`, in its JSON form.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct TaskOptions {
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) no_pivot_root: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) no_new_keyring: bool,
    /// Cgroup of the shim itself.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) shim_cgroup: String,
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
    /// containerd reads it, and names it as the checkpoint to Create.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) criu_image_path: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) criu_work_path: String,
    /// For containerd, as the next.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) task_api_address: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) task_api_version: u32,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl TaskOptions {
    /// Decodes the options of a Create request: runc's own, or the generic ones that containerd's
    /// CRI and `ctr` send to any runtime that is not called `io.containerd.runc.v2`.
    pub(crate) fn decode(any: Option<&Any>) -> Result<Self> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty() || !any.value.is_empty()) else {
            return Ok(Self::default());
        };
        if is(any, generic::TYPE) {
            return generic::read(&any.value);
        }
        let options: oci::Options = decode(any, RUNC)?;
        Ok(Self {
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            shim_cgroup: options.shim_cgroup,
            io_uid: options.io_uid,
            io_gid: options.io_gid,
            binary_name: options.binary_name,
            root: options.root,
            systemd_cgroup: options.systemd_cgroup,
            criu_image_path: options.criu_image_path,
            criu_work_path: options.criu_work_path,
            task_api_address: options.task_api_address,
            task_api_version: options.task_api_version,
        })
    }

    /// The runc of these options.
    pub(crate) fn runc(&self, namespace: &str) -> Runc {
        Runc::new(&self.binary_name, &self.root, namespace, self.systemd_cgroup)
    }

    /// Writes them for the `delete` action, which may have to clean up after a dead shim.
    pub(crate) fn write(&self, bundle: &Path) -> Result<()> {
        let text = serde_json::to_string(self).context("encode the options")?;
        for (file, text) in [(FILE, &text), (RUNTIME_FILE, &self.binary_name)] {
            let mut options = OpenOptions::new();
            let options = options.write(true).create(true).truncate(true).mode(0o600);
            let opened = options.open(bundle.join(file));
            opened
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .context("write the options")?;
        }
        Ok(())
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
    match any.filter(|any| !any.type_url.is_empty() || !any.value.is_empty()) {
        Some(any) => decode(any, CHECKPOINT),
        None => Ok(oci::CheckpointOptions::default()),
    }
}

/// Field of `CheckpointOptions` that containerd has from 2.4 on, and the crate not yet.
const PARENT_PATH: u32 = 10;

/// The folder of the dump that another one is to build on.
pub(crate) fn parent_path(options: &oci::CheckpointOptions) -> Result<Option<&str>> {
    match options.special_fields.unknown_fields().get(PARENT_PATH) {
        None => Ok(None),
        Some(UnknownValueRef::LengthDelimited(path)) => {
            let path = std::str::from_utf8(path);
            let path = path.map_err(|_| Error::invalid_argument("parent_path is not UTF-8"))?;
            Ok(Some(path).filter(|path| !path.is_empty()))
        }
        Some(_) => Err(Error::invalid_argument("parent_path is no text")),
    }
}

/// Whether `any` holds a message called `name`. Its type may have a host in front.
fn is(any: &Any, name: &str) -> bool {
    any.type_url.rsplit('/').next() == Some(name)
}

fn decode<M: Message>(any: &Any, name: &str) -> Result<M> {
    if !is(any, name) {
        return Err(Error::invalid_argument(format!(
            "options of type {:?} are not supported, {name:?} is expected",
            any.type_url,
        )));
    }
    M::parse_from_bytes(&any.value)
        .map_err(|err| Error::invalid_argument(format!("decode {:?}: {err}", any.type_url)))
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let any = any(RUNC, sent.write_to_bytes().unwrap());
        let options = TaskOptions::decode(Some(&any)).unwrap();
        let runc = options.runc("ns");
        assert_eq!(runc, Runc::new("crun", "/r", "ns", true));
        let dir = tempfile::tempdir().unwrap();
        options.write(dir.path()).unwrap();
        assert_eq!(TaskOptions::read(dir.path()).unwrap(), options);
    }

    #[test]
    fn options_are_kept_in_the_form_of_the_go_shim() {
        let sent = oci::Options {
            no_pivot_root: true,
            shim_cgroup: "/shims".into(),
            io_uid: 1000,
            binary_name: "/x/crun".into(),
            criu_image_path: "/i".into(),
            task_api_version: 3,
            ..Default::default()
        };
        let options = any(RUNC, sent.write_to_bytes().unwrap());
        let dir = tempfile::tempdir().unwrap();
        TaskOptions::decode(Some(&options)).unwrap().write(dir.path()).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let expected = r#"{"no_pivot_root":true,"shim_cgroup":"/shims","io_uid":1000,"binary_name":"/x/crun","criu_image_path":"/i","task_api_version":3}"#;
        assert_eq!(read("options.json"), expected);
        assert_eq!(read("runtime"), "/x/crun");
    }

    #[test]
    fn a_type_may_have_a_host_in_front() {
        let any = any("type.googleapis.com/containerd.runc.v1.Options", vec![]);
        assert_eq!(TaskOptions::decode(Some(&any)).unwrap(), TaskOptions::default());
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
