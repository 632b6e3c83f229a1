//! The driver's connection to the agent on the other host.
//!
//! ```text
//!  ssh://   ssh starts the agent there, its input and output are the stream    between machines
//!  unix://  a socket at which `ferry agent --listen` waits                     on one machine
//! ```
//! A transport gives a byte stream to an agent and knows nothing of migrations; [`link`] speaks the
//! protocol on it. When the stream ends, so does the agent at its other end.

pub(crate) mod link;
pub(crate) mod own;
pub(crate) mod ssh;
pub(crate) mod unix;

use std::str::FromStr;

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncWrite};

/// What the agent says.
pub(crate) type Output = Box<dyn AsyncRead + Send + Unpin>;
/// What the agent hears.
pub(crate) type Input = Box<dyn AsyncWrite + Send + Unpin>;

/// Where the agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    /// On a host with sshd.
    Ssh(ssh::Remote),
    /// Behind a socket of this machine.
    Unix(unix::Address),
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once("://") {
            Some(("ssh", _)) => text.parse().map(Self::Ssh),
            Some(("unix", _)) => text.parse().map(Self::Unix),
            other => {
                let scheme = other.map_or(text, |(scheme, _)| scheme);
                Err(format!("{scheme}: only ssh://[user@]host[:port] and unix:///path are known"))
            }
        }
    }
}

impl Destination {
    /// The host as a person would name it.
    pub(crate) fn host(&self) -> &str {
        match self {
            Self::Ssh(remote) => remote.host(),
            Self::Unix(address) => address.url(),
        }
    }
}

/// An agent that serves this driver.
pub(crate) enum Session {
    /// Started by ssh.
    Ssh(ssh::Session),
    /// Started by the agent that listens.
    Unix(unix::Address),
}

impl Session {
    /// Has an agent serve this driver; `agent` is the command that starts it where nobody listens.
    ///
    /// # Errors
    /// When ssh cannot be started, or nobody listens at the socket. What else prevents it is
    /// noticed when the stream ends; [`Self::diagnose`] tells it then.
    pub(crate) async fn open(to: &Destination, agent: &str) -> Result<(Self, Output, Input)> {
        match to {
            Destination::Ssh(remote) => {
                let (session, output, input) = ssh::Session::open(remote, agent)?;
                Ok((Self::Ssh(session), Box::new(output), Box::new(input)))
            }
            Destination::Unix(address) => {
                let (output, input) = unix::connect(address).await?.into_split();
                Ok((Self::Unix(address.clone()), Box::new(output), Box::new(input)))
            }
        }
    }

    /// The process here that the stream runs through, until it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            Self::Ssh(session) => session.pid(),
            Self::Unix(_) => None,
        }
    }

    /// Why the stream ended.
    pub(crate) async fn diagnose(&mut self) -> String {
        match self {
            Self::Ssh(session) => session.diagnose().await,
            Self::Unix(address) => format!(
                "the connection to the agent was lost (ferry agent --listen {} prints why)",
                address.url()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_says_which_transport() {
        let to: Destination = "ssh://root@b".parse().unwrap();
        assert!(matches!(&to, Destination::Ssh(_)));
        assert_eq!(to.host(), "b");
        let to: Destination = "unix:///run/b.sock".parse().unwrap();
        assert!(matches!(&to, Destination::Unix(_)));
        assert_eq!(to.host(), "unix:///run/b.sock");
    }

    #[test]
    fn other_schemes_are_refused_with_those_that_are_known() {
        for text in ["tls://b", "b", "", "/run/b.sock"] {
            let error = text.parse::<Destination>().unwrap_err();
            assert!(error.contains("only ssh://") && error.contains("unix:///path"), "{error}");
        }
    }
}
