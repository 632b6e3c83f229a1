//! Programs that only their Go modules bring: built from the module proxy, in the cache.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::exec::{output, run};

/// Programs of one module.
#[derive(Debug)]
pub struct Module {
    /// The module.
    pub path: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The programs' packages below it.
    pub packages: &'static [&'static str],
    /// Build tags.
    pub tags: &'static str,
    /// Whether there is C in it, and what library it needs then, by the name pkg-config has for it.
    pub library: Option<&'static str>,
    /// A module that the proxy does not have and that no program needs: its path, the package that
    /// is imported from it, and what that must declare.
    pub stub: Option<(&'static str, &'static str, &'static str)>,
}

impl Module {
    /// A module whose programs need no more than Go.
    pub const PLAIN: Self =
        Self { path: "", version: "", packages: &[""], tags: "", library: None, stub: None };

    /// Why this machine cannot build it.
    pub fn missing(&self) -> Option<String> {
        if !output(Command::new("go").arg("version")).is_ok_and(|done| done.status.success()) {
            return Some(format!("{} needs Go to be built, which is not installed", self.path));
        }
        let library = self.library?;
        let found = output(Command::new("pkg-config").args(["--exists", library]));
        if found.is_ok_and(|done| done.status.success()) {
            return None;
        }
        Some(format!("{} needs pkg-config and {library}-dev to be built", self.path))
    }

    /// Builds its programs into folder `to`. The requirements of the module itself decide on every
    /// version, so that a build of today is that of tomorrow; Go's checksum database vouches for them.
    pub(crate) fn build(&self, to: &Path) -> Result<()> {
        if let Some(missing) = self.missing() {
            bail!("{missing}");
        }
        // Downloads and objects are shared by all modules: half of their packages are the same.
        let go = cache::dir().join("go");
        let work = go.join("work").join(self.path.replace('/', "_"));
        if work.exists() {
            fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
        }
        fs::create_dir_all(&work).with_context(|| format!("make {}", work.display()))?;
        let mut text = format!(
            "module ferry.test/tools\n\ngo 1.24\n\nrequire {} {}\n",
            self.path, self.version
        );
        if let Some((module, package, declares)) = self.stub {
            let stub = work.join("stub");
            fs::create_dir_all(stub.join(package)).context("make the stub of a module")?;
            fs::write(stub.join("go.mod"), format!("module {module}\n\ngo 1.24\n"))
                .and_then(|()| {
                    let text = format!("package {package}\n\n{declares}\n");
                    fs::write(stub.join(package).join("stub.go"), text)
                })
                .context("write the stub of a module")?;
            text.push_str(&format!("\nreplace {module} => ./stub\n"));
        }
        fs::write(work.join("go.mod"), text).context("write go.mod")?;
        let programs = self.packages.iter().map(|package| match *package {
            "" => self.path.to_owned(),
            package => format!("{}/{package}", self.path),
        });
        run(Command::new("go")
            .args(["build", "-mod=mod", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"])
            .args(["-tags", self.tags, "-o"])
            .arg(format!("{}/", to.display()))
            .args(programs)
            .current_dir(&work)
            .env("GOMODCACHE", go.join("modules"))
            .env("GOCACHE", go.join("objects"))
            .env("CGO_ENABLED", if self.library.is_some() { "1" } else { "0" })
            .env("GOWORK", "off")
            .env_remove("GOFLAGS"))?;
        fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))
    }
}
