//! Where the streams of a restored task lead.
//!
//! Those that somebody may still be at stay. For the others, whose other end stayed behind, a pipe
//! leads into a log file, and a terminal to FIFOs that a client can attach to.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result};
use ferry_oci::{limited, paths};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;

use crate::containerd::Stdio;
use crate::migrate::pause::log_file;

/// runc's list of them is not longer, bytes: it has three names.
const MOST_BYTES: u64 = 1 << 20;

/// The streams of container `id`, whose spec is `spec`; `before` are those of its last task, if it was
/// here. Makes what it names, which goes with the new task.
///
/// # Errors
/// When the images do not say what the streams were, or FIFOs cannot be made.
pub(super) fn streams(
    namespace: &str,
    id: &str,
    images: &Path,
    spec: &Value,
    before: Option<&Stdio>,
) -> Result<Stdio> {
    let before = before.map(reachable).unwrap_or_default();
    if spec["process"]["terminal"] == true {
        return match before.stdout.is_empty() {
            true => terminal(&paths::terminal(namespace, id)).context("make a terminal's FIFOs"),
            false => Ok(Stdio { terminal: true, ..before }),
        };
    }
    let were = limited::read(&images.join("descriptors.json"), MOST_BYTES);
    let were = were.context("read what its streams were (descriptors.json)")?;
    let were: Vec<String> = serde_json::from_slice(&were).context("decode descriptors.json")?;
    // The host's /dev/null, which it would get otherwise, could not be dumped again.
    let output = |there: String, number: usize, name| match were.get(number) {
        Some(was) if there.is_empty() && was.starts_with("pipe:") => log_file(namespace, id, name),
        _ => there,
    };
    Ok(Stdio {
        stdin: before.stdin,
        stdout: output(before.stdout, 1, "stdout"),
        stderr: output(before.stderr, 2, "stderr"),
        terminal: false,
    })
}

/// Streams of a task that has ended, as far as somebody may still be there.
fn reachable(stdio: &Stdio) -> Stdio {
    let there = |path: &String| match path.starts_with('/') && !Path::new(path).exists() {
        true => String::new(),
        false => path.clone(),
    };
    Stdio {
        stdin: there(&stdio.stdin),
        stdout: there(&stdio.stdout),
        stderr: there(&stdio.stderr),
        terminal: stdio.terminal,
    }
}

/// FIFOs in `folder`; those of an earlier restore go.
fn terminal(folder: &Path) -> Result<Stdio> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let fifo = |name: &str| -> Result<String> {
        let path = folder.join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(path.display().to_string())
    };
    let (stdin, stdout) = (fifo("stdin")?, fifo("stdout")?);
    Ok(Stdio { stdin, stdout, stderr: String::new(), terminal: true })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use serde_json::json;

    use super::*;

    fn given(before: &Stdio, terminal: bool) -> Stdio {
        let images = tempfile::tempdir().unwrap();
        let were = r#"["/dev/null","pipe:[7]","pipe:[8]"]"#;
        fs::write(images.path().join("descriptors.json"), were).unwrap();
        let spec = json!({ "process": { "terminal": terminal } });
        streams("n", "c", images.path(), &spec, Some(before)).unwrap()
    }

    #[test]
    fn pipes_whose_reader_has_gone_lead_into_log_files() {
        let here = tempfile::NamedTempFile::new().unwrap();
        let here = here.path().display().to_string();
        let before = Stdio { stdout: here.clone(), stderr: "/gone".into(), ..Stdio::default() };
        let got = given(&before, false);
        assert_eq!(got.stdout, here);
        assert_eq!(got.stderr, "file:///var/log/ferry/n/c/stderr.log");
        let got = given(&Stdio::default(), false);
        assert_eq!(got.stdin, "");
        assert_eq!(got.stdout, "file:///var/log/ferry/n/c/stdout.log");
        let before = Stdio { stdout: "binary:///x".into(), ..Stdio::default() };
        assert_eq!(given(&before, false).stdout, "binary:///x");
    }

    #[test]
    fn a_list_of_streams_without_end_is_refused() {
        let images = tempfile::tempdir().unwrap();
        let of = |length: usize| {
            let text = format!(r#"["pipe:[7]"{}]"#, " ".repeat(length));
            fs::write(images.path().join("descriptors.json"), text).unwrap();
            streams("n", "c", images.path(), &json!({}), None)
        };
        assert!(of(1 << 19).is_ok());
        let error = format!("{:#}", of(1 << 20).unwrap_err());
        assert!(error.contains("descriptors.json") && error.contains("1048576 bytes"), "{error}");
    }

    #[test]
    fn a_terminal_that_somebody_is_at_stays() {
        let here = tempfile::NamedTempFile::new().unwrap();
        let here = here.path().display().to_string();
        let before = Stdio { stdout: here.clone(), terminal: true, ..Stdio::default() };
        assert_eq!(given(&before, true), before);
    }

    #[test]
    fn a_terminal_without_a_client_is_one_to_attach_to() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("t");
        for _ in 0..2 {
            let got = terminal(&folder).unwrap();
            assert!(got.terminal && got.stderr.is_empty(), "{got:?}");
            for path in [got.stdin, got.stdout] {
                assert!(fs::metadata(&path).unwrap().file_type().is_fifo(), "{path}");
            }
        }
    }
}
