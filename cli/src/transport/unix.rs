//! A Unix socket at which an agent listens: for a second containerd on the same machine.
//!
//! The path must be one that both see, as a folder that is mounted into both. Whoever may open the
//! socket may have containers created, so it is its owner's alone.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use tokio::net::{UnixListener, UnixStream};

/// The longest path that fits into a socket's address, bytes: `sun_path` without its last zero.
const LONGEST: usize = 107;

/// Where a socket is: `unix:///path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    url: String,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text
            .strip_prefix("unix://")
            .ok_or_else(|| format!("{text} names no socket: write unix:///path"))?;
        if !path.starts_with('/') || path.ends_with('/') {
            return Err(format!("{text} names no socket by its full path: write unix:///path"));
        }
        if path.len() > LONGEST {
            return Err(format!(
                "the path of a socket has at most {LONGEST} bytes, {path} has {}",
                path.len()
            ));
        }
        if path.contains('\0') {
            return Err("a path holds no zero byte".to_owned());
        }
        Ok(Self { url: text.to_owned() })
    }
}

impl Address {
    /// As written by a person.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        Path::new(self.url.strip_prefix("unix://").unwrap_or_default())
    }
}

/// Connects to the agent that listens at `address`.
///
/// # Errors
/// When nobody listens there, with the cure.
pub(crate) async fn connect(address: &Address) -> Result<UnixStream> {
    let cure = format!("start it on the destination: ferry agent --listen {}", address.url());
    UnixStream::connect(address.path()).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            anyhow!("there is no such socket here; {cure} (both must see the path)")
        }
        io::ErrorKind::ConnectionRefused => anyhow!("nobody listens there any more; {cure}"),
        _ => anyhow!(error).context("connect to the agent"),
    })
}

/// A socket that only its owner can open; its file goes with it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    address: Address,
}

impl Listener {
    /// Listens at `address`. A socket that a listener left which was killed is replaced.
    ///
    /// # Errors
    /// When another one listens there, or the file is something else than a socket.
    pub(crate) fn bind(address: &Address) -> Result<Self> {
        let path = address.path();
        let socket = match bind_private(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                bind_private(path)
            }
            other => other,
        };
        let socket = socket.with_context(|| format!("listen at {}", path.display()))?;
        Ok(Self { socket, address: address.clone() })
    }

    /// The next driver.
    ///
    /// # Errors
    /// When the kernel has no descriptor left, or the like.
    pub(crate) async fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let path = self.address.path();
        if let Err(error) = std::fs::remove_file(path) {
            log::debug!("remove {}: {error}", path.display());
        }
    }
}

fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Not chmod afterwards: somebody could connect before it. The file takes the socket's mode.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&socket, Backlog::MAXCONN)?;
    UnixListener::from_std(socket.into())
}

/// Removes the socket of a listener that has ended.
fn remove_stale(path: &Path) -> Result<()> {
    let found = std::fs::symlink_metadata(path)
        .with_context(|| format!("look at {}", path.display()))?
        .file_type();
    ensure!(
        found.is_socket(),
        "{} is there and is no socket: name another path or remove it",
        path.display()
    );
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("an agent listens at {} already", path.display()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(error).with_context(|| format!("try {}", path.display())),
    }
    std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn address(folder: &Path, name: &str) -> Address {
        format!("unix://{}", folder.join(name).display()).parse().unwrap()
    }

    #[test]
    fn sockets_are_taken_from_urls() {
        let address: Address = "unix:///run/ferry b.sock".parse().unwrap();
        assert_eq!(address.path(), Path::new("/run/ferry b.sock"));
        assert_eq!(address.url(), "unix:///run/ferry b.sock");
    }

    #[test]
    fn bad_urls_are_refused() {
        let long = format!("unix:///{}", "x".repeat(LONGEST));
        for (text, part) in [
            ("/run/b.sock", "names no socket"),
            ("unix://", "full path"),
            ("unix://b.sock", "full path"),
            ("unix:///run/", "full path"),
            ("unix:///a\0b", "zero byte"),
            (&long, "at most 107 bytes"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[tokio::test]
    async fn a_socket_is_its_owners_alone_and_goes_with_the_listener() {
        let folder = tempfile::tempdir().unwrap();
        let address = address(folder.path(), "s");
        let listener = Listener::bind(&address).unwrap();
        let mode = address.path().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let (driver, agent) = tokio::join!(connect(&address), listener.accept());
        driver.unwrap();
        agent.unwrap();
        drop(listener);
        assert!(!address.path().exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let address = address(folder.path(), "s");
        drop(std::os::unix::net::UnixListener::bind(address.path()).unwrap());
        let error = connect(&address).await.unwrap_err().to_string();
        assert!(error.contains("nobody listens") && error.contains("--listen unix:///"), "{error}");
        let listener = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
        drop(listener);
    }

    #[tokio::test]
    async fn a_file_is_not_replaced_and_a_missing_socket_names_the_cure() {
        let folder = tempfile::tempdir().unwrap();
        let file = address(folder.path(), "file");
        std::fs::write(file.path(), "x").unwrap();
        let error = Listener::bind(&file).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert!(file.path().exists());
        let error = connect(&address(folder.path(), "none")).await.unwrap_err().to_string();
        assert!(error.contains("ferry agent --listen unix:///"), "{error}");
    }
}
