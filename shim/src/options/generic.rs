//! `runtimeoptions.v1.Options`: the options of a runtime that containerd knows nothing of, as TOML.
//!
//! containerd's CRI sends what stands below `[...runtimes.NAME.options]` in its configuration, with
//! the keys that it has for runc: a runtime class of ferry takes the same ones as one of runc.

use super::TaskOptions;
use crate::error::{Context as _, Error, Result};
use containerd_shim::protos::protobuf::CodedInputStream;
use toml::{Table, Value};

/// The name of the message.
pub(super) const TYPE: &str = "runtimeoptions.v1.Options";

/// The message's fields that say something here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    /// Absolute path of a file with the options.
    path: String,
    /// The options, if there is no such file.
    body: Vec<u8>,
}

/// Reads the message in `bytes`, and the file that it may name.
pub(super) fn read(bytes: &[u8]) -> Result<TaskOptions> {
    let message =
        decode(bytes).map_err(|err| Error::invalid_argument(format!("decode {TYPE:?}: {err}")))?;
    let text = match message.path.as_str() {
        "" => String::from_utf8(message.body)
            .map_err(|err| Error::invalid_argument(format!("the runtime options: {err}")))?,
        path => std::fs::read_to_string(path).context(format!("read the options in {path}"))?,
    };
    parse(&text)
}

fn decode(bytes: &[u8]) -> containerd_shim::protos::protobuf::Result<Message> {
    /// Field number and wire type of what is read; the type of the content (1) says nothing.
    const PATH: u32 = (2 << 3) | 2;
    const BODY: u32 = (3 << 3) | 2;
    let mut message = Message::default();
    let mut stream = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = stream.read_raw_tag_or_eof()? {
        match tag {
            PATH => message.path = stream.read_string()?,
            BODY => message.body = stream.read_bytes()?,
            other => containerd_shim::protos::protobuf::rt::skip_field_for_tag(other, &mut stream)?,
        }
    }
    Ok(message)
}

fn parse(text: &str) -> Result<TaskOptions> {
    let table: Table = text.parse().map_err(|err| {
        Error::invalid_argument(format!("the runtime options are no TOML: {err}"))
    })?;
    let mut options = TaskOptions::default();
    for (key, value) in table {
        // As containerd reads it.
        let name = key.to_lowercase().replace('_', "");
        let known = match name.as_str() {
            "nopivotroot" => flag(&value, &mut options.no_pivot_root),
            "nonewkeyring" => flag(&value, &mut options.no_new_keyring),
            "shimcgroup" => string(&value, &mut options.shim_cgroup),
            "iouid" => id(&value, &mut options.io_uid),
            "iogid" => id(&value, &mut options.io_gid),
            "binaryname" => string(&value, &mut options.binary_name),
            "root" => string(&value, &mut options.root),
            "systemdcgroup" => flag(&value, &mut options.systemd_cgroup),
            "criuimagepath" => string(&value, &mut options.criu_image_path),
            "criuworkpath" => string(&value, &mut options.criu_work_path),
            "taskapiaddress" => string(&value, &mut options.task_api_address),
            "taskapiversion" => id(&value, &mut options.task_api_version),
            _ => {
                log::warn!("the runtime option {key:?} is not known");
                Some(())
            }
        };
        if known.is_none() {
            let text = format!("the runtime option {key:?} cannot be of type {}", value.type_str());
            return Err(Error::invalid_argument(text));
        }
    }
    Ok(options)
}

fn flag(value: &Value, to: &mut bool) -> Option<()> {
    *to = value.as_bool()?;
    Some(())
}

fn string(value: &Value, to: &mut String) -> Option<()> {
    *to = value.as_str()?.to_string();
    Some(())
}

fn id(value: &Value, to: &mut u32) -> Option<()> {
    *to = value.as_integer()?.try_into().ok()?;
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::ttrpc::Code;

    /// A message with these fields, all of them texts.
    fn message(fields: &[(u8, &str)]) -> Vec<u8> {
        let field = |(number, text): &(u8, &str)| {
            [&[(number << 3) | 2, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
        };
        fields.iter().flat_map(field).collect()
    }

    #[test]
    fn options_of_the_cri_configuration() {
        let body = "BinaryName = '/x/crun'\nSystemdCgroup = true\nIoUid = 1000\nOther = 1\n";
        let options = read(&message(&[(1, "type"), (3, body)])).unwrap();
        assert_eq!(options.binary_name, "/x/crun");
        assert!(options.systemd_cgroup);
        assert_eq!(options.io_uid, 1000);
        assert_eq!(read(&[]).unwrap(), TaskOptions::default());
    }

    #[test]
    fn options_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("options.toml");
        std::fs::write(&path, "no_pivot_root = true\nroot = \"/r\"\n").unwrap();
        let options = read(&message(&[(2, path.to_str().unwrap())])).unwrap();
        assert!(options.no_pivot_root);
        assert_eq!(options.root, "/r");
        let err = read(&message(&[(2, "/no/such/file")])).unwrap_err();
        assert!(err.to_string().contains("/no/such/file"), "{err}");
    }

    #[test]
    fn a_wrong_value_is_refused_by_its_key() {
        for wrong in ["BinaryName = 1", "SystemdCgroup = 'yes'", "IoUid = -1", "BinaryName"] {
            let err = read(&message(&[(3, wrong)])).unwrap_err();
            assert_eq!(err.code(), Code::INVALID_ARGUMENT, "{wrong}");
        }
        assert_eq!(read(&[0xff]).unwrap_err().code(), Code::INVALID_ARGUMENT);
    }
}
