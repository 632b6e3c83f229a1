//! An agent behind the system's ssh.

use std::os::fd::AsFd;
use std::process::Stdio;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// How much of what the other side prints is kept for error texts, bytes.
const KEPT: usize = 4096;

/// Where the agent is: `ssh://[user@]host[:port]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    user: Option<String>,
    host: String,
    port: Option<u16>,
}

impl FromStr for Remote {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text
            .strip_prefix("ssh://")
            .ok_or_else(|| format!("{text} names no host: write ssh://root@host-b"))?;
        let (user, place) = match rest.split_once('@') {
            Some((user, place)) => (Some(user.to_owned()), place),
            None => (None, rest),
        };
        let place = place.trim_end_matches('/');
        // An IPv6 address stands in brackets.
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                let port = port.parse().map_err(|_| format!("{port} is no port"))?;
                (host, Some(port))
            }
            _ => (place, None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        // A word that starts with a dash would be an option to ssh.
        let plain = |word: &str| !word.is_empty() && !word.starts_with('-') && !word.contains('/');
        if !plain(host) || user.as_deref().is_some_and(|u| !plain(u)) {
            return Err(format!("{text} names no host: write ssh://root@host-b"));
        }
        Ok(Self { user, host: host.to_owned(), port })
    }
}

impl Remote {
    /// The host as a person would name it.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = [
            "-T",
            "-oBatchMode=yes",
            "-oConnectTimeout=10",
            // A dead peer is noticed within 15 s.
            "-oServerAliveInterval=5",
            "-oServerAliveCountMax=3",
            // Preferred, not required: processors do AES, and memory crosses inside the pause.
            "-oCiphers=^aes128-gcm@openssh.com",
        ]
        .map(str::to_owned)
        .to_vec();
        if let Some(port) = self.port {
            arguments.push(format!("-p{port}"));
        }
        if let Some(user) = &self.user {
            arguments.push(format!("-l{user}"));
        }
        arguments.push("--".to_owned());
        arguments.push(self.host.clone());
        arguments
    }
}

/// A running ssh with an agent at its other end.
pub(crate) struct Session {
    child: Child,
    printed: Arc<Mutex<String>>,
}

impl Session {
    /// Starts `agent` on the host and gives its standard input and output.
    ///
    /// # Errors
    /// When ssh itself cannot be started. A host that cannot be reached is noticed when the stream
    /// ends; [`Session::diagnose`] tells why then.
    pub(crate) fn open(to: &Remote, agent: &str) -> Result<(Self, ChildStdout, ChildStdin)> {
        let mut child = Command::new("ssh")
            .args(to.arguments())
            .arg(agent)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            // Ctrl-C is for the driver, which then needs its connection.
            .process_group(0)
            .spawn()
            .context("start ssh: is openssh-client installed?")?;
        let input = child.stdin.take().context("ssh has no input")?;
        super::own::widen(input.as_fd());
        let output = child.stdout.take().context("ssh has no output")?;
        let mut errors = child.stderr.take().context("ssh has no error output")?;
        let printed = Arc::new(Mutex::new(String::new()));
        let kept = printed.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = errors.read(&mut buffer).await {
                let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                log::debug!("agent: {}", text.trim_end());
                if let Ok(mut kept) = kept.lock() {
                    kept.push_str(&text);
                    if kept.len() > KEPT {
                        let cut = kept.len() - KEPT;
                        let cut = (cut..kept.len()).find(|&i| kept.is_char_boundary(i));
                        kept.drain(..cut.unwrap_or(0));
                    }
                }
            }
        });
        Ok((Self { child, printed }, output, input))
    }

    /// The process, until it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Why the stream ended.
    pub(crate) async fn diagnose(&mut self) -> String {
        let wait = tokio::time::timeout(std::time::Duration::from_secs(2), self.child.wait());
        let code = match wait.await {
            Ok(Ok(status)) => status.code(),
            _ => None,
        };
        let printed = self.printed.lock().map(|p| p.trim().to_owned()).unwrap_or_default();
        let last = printed.lines().last().unwrap_or_default();
        match code {
            Some(127) => format!("ferry is not installed there ({last}): install it in the path"),
            Some(255) => format!("ssh cannot reach it ({last})"),
            Some(code) => format!("the agent ended with code {code} ({last})"),
            None => format!("the connection to the agent was lost ({last})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_taken_from_urls() {
        let to: Remote = "ssh://root@10.77.0.2:2222".parse().unwrap();
        assert_eq!(
            to,
            Remote { user: Some("root".into()), host: "10.77.0.2".into(), port: Some(2222) }
        );
        assert_eq!("ssh://[fd00::2]".parse::<Remote>().unwrap().host, "fd00::2");
        assert_eq!("ssh://b".parse::<Remote>().unwrap().host(), "b");
    }

    #[test]
    fn bad_urls_are_refused() {
        for (text, part) in [
            ("unix:///b", "names no host"),
            ("b", "names no host"),
            ("ssh://", "names no host"),
            ("ssh://-oProxyCommand=x", "names no host"),
            ("ssh://-x@b", "names no host"),
            ("ssh://b:port", "no port"),
        ] {
            let error = text.parse::<Remote>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
