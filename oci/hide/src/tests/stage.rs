//! A stand-in for CRIU: this test program under that name, with the library preloaded.

use ferry_oci::criu::{HiddenRange, HiddenTask, HideReport, Hiding, Orders, StoredSmaps};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use tempfile::TempDir;

/// What the stand-in is to do; its test does nothing when this is missing.
pub(super) const ROLE: &str = "FERRY_TEST_ROLE";
/// Where it writes what it found.
pub(super) const OUTPUT: &str = "FERRY_TEST_OUTPUT";

pub(super) const PAGE: usize = 4096;

/// The library, built as this program was: cargo does not build it for its own tests.
pub(super) fn library() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = built("");
        let profile = folder.file_name().unwrap().to_str().unwrap();
        let cargo = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--offline", "--lib", "--package", env!("CARGO_PKG_NAME")])
            .args(["--profile", if profile == "debug" { "dev" } else { profile }])
            .arg("--target-dir")
            .arg(folder.parent().unwrap())
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(cargo.unwrap().success(), "build the library");
    });
    built(crate::format::LIBRARY)
}

/// Where cargo puts what it builds.
pub(super) fn built(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let folder = program.ancestors().nth(2).unwrap();
    if name.is_empty() { folder.to_owned() } else { folder.join(name) }
}

/// A folder for orders and a program called `criu`.
pub(super) struct Stage {
    pub(super) dir: TempDir,
    pub(super) hiding: Hiding,
}

impl Stage {
    pub(super) fn new() -> Self {
        // Beside the program, so that a second name for it is enough.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let hiding = Hiding::prepare(&dir.path().join("orders"), &library()).unwrap();
        Self { dir, hiding }
    }

    /// This test program under another name.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        let own = std::env::current_exe().unwrap();
        if !path.exists() && fs::hard_link(&own, &path).is_err() {
            fs::copy(&own, &path).unwrap();
        }
        path
    }

    /// Runs `role` in a program called `name`, with the library, and returns what it wrote.
    pub(super) fn run(&self, name: &str, role: &str) -> String {
        self.run_with(name, role, true)
    }

    pub(super) fn run_with(&self, name: &str, role: &str, preloaded: bool) -> String {
        let output = self.dir.path().join("output");
        let mut command = self.command(name, role, &output);
        if preloaded {
            command.envs(self.hiding.env());
        }
        let status = command.status().unwrap();
        assert!(status.success(), "{role}: {status}");
        fs::read_to_string(output).unwrap()
    }

    pub(super) fn command(&self, name: &str, role: &str, output: &Path) -> Command {
        let mut command = Command::new(self.program(name));
        command.args(["--exact", "tests::play"]).env(ROLE, role).env(OUTPUT, output);
        command.stdout(Stdio::null());
        command
    }

    pub(super) fn hide(&self, ranges: &[(usize, usize, bool)], smaps: Option<StoredSmaps>) {
        let range = |&(start, end, guards): &(usize, usize, bool)| HiddenRange {
            start: start as u64,
            end: end as u64,
            guards,
        };
        let ranges = ranges.iter().map(range).collect();
        self.hiding
            .write(&Orders { tasks: vec![HiddenTask { pid: pid(), ranges, smaps }] })
            .unwrap();
    }

    pub(super) fn report(&self) -> HideReport {
        self.hiding.report().unwrap().unwrap_or_default()
    }
}

/// The task that the stand-in looks at: this process.
pub(super) fn pid() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

/// A scan's request as the stand-in gets it.
pub(super) fn scan(kind: &str, start: usize, end: usize, vec_len: usize) -> String {
    let mut role = String::new();
    let _ = write!(role, "scan {kind} {} {start} {end} {vec_len}", pid());
    role
}

/// Says that this test cannot be made here and why.
pub(super) fn skip(reason: &str) {
    use std::io::Write;
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "\nskipped: {name}: {reason}");
}
