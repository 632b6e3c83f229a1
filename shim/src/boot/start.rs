//! `start`: a shim for the container of this bundle.

use super::input::{self, Environment, Request};
use super::{confine, spec};
use crate::ferry;
use anyhow::{Context as _, Result};
use containerd_shim::{Flags, StartOpts};
use nix::errno::Errno;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// File in the bundle that names the socket, for a containerd before 2.0 and for `delete`.
pub(crate) const ADDRESS: &str = "address";
/// How often a socket that is there and refuses is tried, and how long to wait between: it may be
/// about to be served.
const TRIES: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(20);

/// Answers on standard output; the shim goes on.
pub(super) fn run(flags: &Flags) -> Result<()> {
    let request = input::parse(&input::read()?, flags, Environment::read())?;
    let bundle = std::env::current_dir().context("find the bundle")?;
    let address = address(&request, &spec::group(&bundle, &request.id)?);
    if let Some(listener) = listen(&socket(&address))? {
        spawn(&request, &bundle, listener)
            .inspect_err(|_| drop(std::fs::remove_file(socket(&address))))?;
    }
    std::fs::write(bundle.join(ADDRESS), &address).context("write the address")?;
    let answer = request.form.encode(&address)?;
    let mut stdout = io::stdout();
    stdout.write_all(&answer).and_then(|()| stdout.flush()).context("answer")
}

/// The address that containerd expects for a group.
fn address(request: &Request, group: &str) -> String {
    let known = StartOpts {
        address: request.grpc_address.clone(),
        namespace: request.namespace.clone(),
        socket_dir: request.socket_dir.clone(),
        ..Default::default()
    };
    known.socket_address(group)
}

fn socket(address: &str) -> PathBuf {
    Path::new(address.strip_prefix("unix://").unwrap_or(address)).to_owned()
}

/// A socket to serve; none if a shim of the group serves it.
fn listen(path: &Path) -> Result<Option<UnixListener>> {
    let what = || format!("listen at {}", path.display());
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(what)?;
    }
    for left in (0..TRIES).rev() {
        match UnixListener::bind(path) {
            Err(err) if err.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound.map(Some).with_context(what),
        }
        match UnixStream::connect(path) {
            Ok(_) => return Ok(None),
            Err(_) if left > 0 => std::thread::sleep(BETWEEN),
            Err(_) => {}
        }
    }
    // Its shim was killed.
    remove(path).with_context(what)?;
    UnixListener::bind(path).map(Some).with_context(what)
}

/// Removes a socket; that there is none is no error.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Starts the shim. It has its socket as standard input: containerd's connection waits there until it
/// is served, so nobody waits for it here.
fn spawn(request: &Request, bundle: &Path, listener: UnixListener) -> Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command
        .args(["-namespace", &request.namespace, "-id", &request.id])
        .args(["-address", &request.grpc_address])
        .env("TTRPC_ADDRESS", &request.ttrpc_address)
        .current_dir(bundle)
        .process_group(0)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if request.debug {
        command.arg("-debug");
    }
    // As `ps` is to show it, whatever it is installed as.
    if let Some(name) = std::env::args_os().next() {
        command.arg0(name);
    }
    if std::env::var_os("SCHED_CORE").is_some_and(|set| !set.is_empty()) {
        confine::own_core().context("enable core scheduling")?;
    }
    let mut child = command.spawn().context("start the shim")?;
    confine::confine(child.id(), &request.options.shim_cgroup).inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
        // It may have come so far.
        let _ = std::fs::remove_file(ferry::socket_of(child.id()));
    })
}

/// Whether nobody serves the socket at `path`.
pub(crate) fn is_dead(path: &Path) -> bool {
    let refused = UnixStream::connect(path).err().and_then(|err| err.raw_os_error());
    refused == Some(Errno::ECONNREFUSED as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_served_socket_is_shared_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/s");
        let listener = listen(&path).unwrap().expect("nobody serves it yet");
        assert!(listen(&path).unwrap().is_none());
        assert!(!is_dead(&path));
        drop(listener);
        assert!(is_dead(&path));
        assert!(listen(&path).unwrap().is_some());
        assert!(!is_dead(&dir.path().join("none")));
    }
}
