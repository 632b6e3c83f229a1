//! Folders to archive and to extract to, and how both tars are called.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use tempfile::TempDir;

pub(super) struct Scene {
    pub(super) dir: TempDir,
    pub(super) from: PathBuf,
    pub(super) to: PathBuf,
    pub(super) image: PathBuf,
}

impl Scene {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        let (from, to, image) = (place("from"), place("to"), place("image"));
        for folder in [&from, &to, &place("bin")] {
            fs::create_dir(folder).unwrap();
        }
        symlink(program(), place("bin/tar")).unwrap();
        Self { dir, from, to, image }
    }

    pub(super) fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }

    /// The fast tar, found as CRIU would find it, or the real one.
    pub(super) fn command(&self, how: &str) -> Command {
        let path = std::env::var("PATH").unwrap();
        let fast = self.bin().join("tar");
        let mut command =
            Command::new(if how == "fast" { fast.as_os_str() } else { "tar".as_ref() });
        command.env("PATH", format!("{}:{path}", self.bin().display()));
        if how == "real" {
            command.env("PATH", path);
        }
        command.env("FERRY_TAR_COUNT", self.dir.path().join("counts"));
        command
    }

    pub(super) fn counts(&self) -> String {
        fs::read_to_string(self.dir.path().join("counts")).unwrap_or_default()
    }
}

/// The program, built as this one was: cargo does not build it for its own unit tests.
pub(super) fn program() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let own = std::env::current_exe().unwrap();
        let folder = own.ancestors().nth(2).unwrap();
        let profile = folder.file_name().unwrap().to_str().unwrap();
        let cargo = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--offline", "--bins", "--package", env!("CARGO_PKG_NAME")])
            .args(["--profile", if profile == "debug" { "dev" } else { profile }])
            .arg("--target-dir")
            .arg(folder.parent().unwrap())
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(cargo.unwrap().success(), "build the program");
        folder.join("ferry-tar")
    };
    BUILT.get_or_init(build).clone()
}

/// CRIU's call, with its input and output missing.
pub(super) fn tar(scene: &Scene, how: &str, what: &str) -> Command {
    let mut command = scene.command(how);
    if what == "create" {
        command.args("--create --gzip --no-unquote --no-wildcards --one-file-system".split(' '));
        command.args("--check-links --preserve-permissions --sparse --numeric-owner".split(' '));
        command.args(["--directory", "/proc/self/fd/0", "."]);
        command.stdin(File::open(&scene.from).unwrap());
    } else {
        command.args("--extract --gzip --no-unquote --no-wildcards --directory".split(' '));
        command.arg(&scene.to);
    }
    command
}

pub(super) fn create(scene: &Scene, how: &str) -> Output {
    let image = File::create(&scene.image).unwrap();
    tar(scene, how, "create").stdout(image).stderr(Stdio::piped()).output().unwrap()
}

pub(super) fn extract(scene: &Scene, how: &str) -> Output {
    let image = File::open(&scene.image).unwrap();
    tar(scene, how, "extract").stdin(image).output().unwrap()
}

pub(super) fn must(output: Output) {
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

pub(super) fn run_shell(at: &Path, script: &str) {
    must(Command::new("sh").arg("-ec").arg(script).current_dir(at).output().unwrap());
}

/// What the real tar says is in the image, sorted.
pub(super) fn members(scene: &Scene) -> String {
    let mut list = Command::new("tar");
    list.args(["--list", "--verbose", "--gzip", "--numeric-owner", "--full-time", "--file"]);
    let output = list.arg(&scene.image).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    must(output);
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// Everything that a tar has to bring back, of the whole tree.
pub(super) fn listing(at: &Path) -> String {
    let mut lines = Vec::new();
    list(at, Path::new("."), &mut lines);
    lines.sort_unstable();
    lines.join("\n")
}

fn list(root: &Path, path: &Path, lines: &mut Vec<String>) {
    let at = root.join(path);
    let meta = fs::symlink_metadata(&at).unwrap();
    let mut line = format!("{} {:o}", path.display(), meta.mode());
    let _ = write!(line, " {}:{} {} {}", meta.uid(), meta.gid(), meta.mtime(), meta.nlink());
    let kind = meta.file_type();
    if kind.is_symlink() {
        let _ = write!(line, " -> {}", fs::read_link(&at).unwrap().display());
    } else if kind.is_char_device() || kind.is_block_device() {
        let _ = write!(line, " device {}", meta.rdev());
    } else if kind.is_file() {
        let content = fs::read(&at).unwrap();
        let sum = content.iter().fold(0_u64, |sum, byte| sum * 31 % 1_000_003 + u64::from(*byte));
        let _ = write!(line, " {} bytes {sum}", content.len());
    }
    lines.push(line);
    if kind.is_dir() {
        for entry in fs::read_dir(&at).unwrap() {
            list(root, &path.join(entry.unwrap().file_name()), lines);
        }
    }
}
