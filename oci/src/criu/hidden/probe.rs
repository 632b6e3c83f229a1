//! Whether the library works in this host's CRIU: it is started once, to say its version.

use super::{HideError, Hiding};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why CRIU would dump all memory here. Each is slower, none is wrong.
#[derive(Debug, thiserror::Error)]
pub enum CannotHide {
    /// The library is not installed.
    #[error("the library that hides memory from criu is not installed")]
    NoLibrary,
    /// CRIU is not installed.
    #[error("criu is not installed")]
    NoCriu,
    /// CRIU loads no libraries.
    #[error("{0} is linked statically (install one that is not)")]
    Static(PathBuf),
    /// The loader ignores preloading for programs with privileges of their own.
    #[error("{0} is set-user-id or has file capabilities (remove them: runc starts it as root)")]
    Privileged(PathBuf),
    /// CRIU started, but the library did not run in it.
    #[error("{0} did not load the library that hides memory (is it a wrapper, or another libc?)")]
    NotLoaded(PathBuf),
    /// The probe itself.
    #[error("find out whether memory can be hidden from criu")]
    Io(#[from] io::Error),
    /// The probe itself.
    #[error("find out whether memory can be hidden from criu")]
    Hide(#[from] HideError),
}

/// A probe: run [`Probe::command`] to its end, then ask for the verdict.
#[derive(Debug)]
pub struct Probe {
    criu: PathBuf,
    hiding: Hiding,
}

impl Probe {
    /// Looks at the CRIU in `PATH`. `scratch` is a folder of the probe's own, made if missing;
    /// the caller removes it.
    ///
    /// # Errors
    /// When it is clear without a run that it cannot work.
    pub fn new(scratch: &Path) -> Result<Self, CannotHide> {
        let library = super::find_library().ok_or(CannotHide::NoLibrary)?;
        let criu = in_path("criu").ok_or(CannotHide::NoCriu)?;
        Self::of(&criu, &library, scratch)
    }

    /// As [`Probe::new`], of this `criu` and this `library`.
    ///
    /// # Errors
    /// As there.
    pub fn of(criu: &Path, library: &Path, scratch: &Path) -> Result<Self, CannotHide> {
        if !library.is_file() {
            return Err(CannotHide::NoLibrary);
        }
        if !is_dynamic(criu)? {
            return Err(CannotHide::Static(criu.to_owned()));
        }
        if is_privileged(criu)? {
            return Err(CannotHide::Privileged(criu.to_owned()));
        }
        Ok(Self { criu: criu.to_owned(), hiding: Hiding::prepare(scratch, library)? })
    }

    /// CRIU with the library, asked for its version; 6 ms.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.criu);
        command.arg("--version").envs(self.hiding.env());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Whether the library ran in it.
    ///
    /// # Errors
    /// Why it did not.
    pub fn verdict(&self) -> Result<(), CannotHide> {
        match self.hiding.report()? {
            Some(report) if report.loaded > 0 => Ok(()),
            _ => Err(CannotHide::NotLoaded(self.criu.clone())),
        }
    }
}

/// The program `name` that a shell would run.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let runs = |file: &PathBuf| {
        file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(runs)
}

/// Whether `program` has a loader, or is no ELF file at all: then its interpreter decides.
fn is_dynamic(program: &Path) -> io::Result<bool> {
    const INTERPRETER: u32 = 3;
    let file = File::open(program)?;
    let mut header = Vec::new();
    (&file).take(64).read_to_end(&mut header)?;
    if header.len() < 64 || header[..5] != *b"\x7fELF\x02" {
        return Ok(true);
    }
    let number = |at: usize, size: usize| {
        header[at..at + size].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (first, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    for at in 0..count {
        let mut kind = [0; 4];
        file.read_exact_at(&mut kind, first.saturating_add(at * size))?;
        if u32::from_le_bytes(kind) == INTERPRETER {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether `program` gets privileges of its own when it is run.
#[allow(unsafe_code)] // Extended attributes have no safe call in the libraries used here.
fn is_privileged(program: &Path) -> io::Result<bool> {
    let mode = program.metadata()?.permissions().mode();
    let path = CString::new(program.as_os_str().as_bytes())?;
    // SAFETY: two strings that end; without a buffer only the length is asked for.
    let length = unsafe {
        libc::getxattr(path.as_ptr(), c"security.capability".as_ptr(), std::ptr::null_mut(), 0)
    };
    Ok(mode & 0o6000 != 0 || length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_program_that_cannot_preload_has_a_named_reason() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libferry_hide.so");
        let (scratch, criu) = (dir.path().join("scratch"), dir.path().join("criu"));
        std::fs::copy("/bin/true", &criu).unwrap();
        let of = || Probe::of(&criu, &library, &scratch);
        assert!(matches!(of(), Err(CannotHide::NoLibrary)));
        std::fs::write(&library, "not a library").unwrap();
        assert!(matches!(of().unwrap().verdict(), Err(CannotHide::NotLoaded(_))));
        std::fs::set_permissions(&criu, PermissionsExt::from_mode(0o4755)).unwrap();
        assert!(matches!(of(), Err(CannotHide::Privileged(_))));
        // The same program without its request for a loader.
        let mut program = std::fs::read("/bin/true").unwrap();
        let interpreter = (64..2048).step_by(56).find(|at| program[*at..*at + 4] == [3, 0, 0, 0]);
        program[interpreter.unwrap()] = 0;
        std::fs::remove_file(&criu).unwrap();
        std::fs::write(&criu, program).unwrap();
        assert!(matches!(of(), Err(CannotHide::Static(_))));
    }
}
