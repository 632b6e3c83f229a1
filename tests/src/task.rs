//! The Task API spoken to a shim directly, as containerd speaks it: for what its clients hide.

use std::fmt;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::protobuf::{Message, MessageDyn};
use containerd_shim_protos::ttrpc::proto::Request;
use containerd_shim_protos::ttrpc::{Client, Code, Error};

pub use containerd_shim_protos::api;
pub use containerd_shim_protos::protobuf;

use crate::Host;

/// The service as containerd from 2.0 on names it.
pub const V3: &str = "containerd.task.v3.Task";
/// The service as containerd 1.x names it.
pub const V2: &str = "containerd.task.v2.Task";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to a shim. Clones share it, and may ask at the same time.
#[derive(Clone)]
pub struct Task {
    client: Client,
    service: &'static str,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The shim says no.
    Status(Code, String),
    /// Nothing came in the time that was given.
    Nothing,
    /// The connection is of no use any more.
    Lost(String),
}

impl Refusal {
    /// Its ttrpc code as text.
    pub fn code(&self) -> String {
        match self {
            Self::Status(code, _) => format!("{code:?}"),
            Self::Nothing => "no answer".into(),
            Self::Lost(_) => "connection lost".into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(_, text) | Self::Lost(text) => write!(f, "{}: {text}", self.code()),
            Self::Nothing => f.write_str(&self.code()),
        }
    }
}

impl std::error::Error for Refusal {}

impl Task {
    /// Connects to the socket at `path`, as this machine sees it.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path, service: &'static str) -> Result<Self> {
        let socket =
            UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        // The client closes it.
        let client = Client::new(socket.into_raw_fd()).context("make a ttrpc client")?;
        Ok(Self { client, service })
    }

    /// Asks `method` and waits for the answer.
    ///
    /// # Errors
    /// What the shim says.
    pub fn call<R: Message>(&self, method: &str, request: &dyn MessageDyn) -> Result<R, Refusal> {
        self.call_for(method, request, PATIENCE)
    }

    /// [`Self::call`] with at most `limit` for the answer.
    ///
    /// # Errors
    /// What the shim says.
    pub fn call_for<R: Message>(
        &self,
        method: &str,
        request: &dyn MessageDyn,
        limit: Duration,
    ) -> Result<R, Refusal> {
        let lost = |err: &dyn fmt::Display| Refusal::Lost(err.to_string());
        let payload = request.write_to_bytes_dyn().map_err(|err| lost(&err))?;
        let answer = self.raw(method, payload, limit)?;
        R::parse_from_bytes(&answer).map_err(|err| lost(&err))
    }

    /// Asks `method` with whatever bytes, for at most `limit`.
    ///
    /// # Errors
    /// What the shim says.
    pub fn raw(&self, method: &str, payload: Vec<u8>, limit: Duration) -> Result<Vec<u8>, Refusal> {
        let mut request = Request::new();
        request.service = self.service.into();
        request.method = method.into();
        request.payload = payload;
        request.timeout_nano = i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX);
        match self.client.request(request) {
            Ok(response) => Ok(response.payload),
            Err(Error::RpcStatus(status)) => match status.code() {
                // It has given up a moment before the client.
                Code::DEADLINE_EXCEEDED if limit < PATIENCE => Err(Refusal::Nothing),
                code => Err(Refusal::Status(code, status.message)),
            },
            Err(Error::Others(text)) if text.contains("timeout") => Err(Refusal::Nothing),
            Err(err) => Err(Refusal::Lost(err.to_string())),
        }
    }
}

/// Where on this machine the socket is that a shim on `host` has answered with, as a line, as JSON,
/// or as protobuf.
///
/// # Errors
/// When the answer names none.
pub fn socket(host: &Host, answer: &[u8]) -> Result<PathBuf> {
    let text: String = answer.iter().map(|byte| char::from(*byte)).collect();
    let Some((_, rest)) = text.split_once("unix://") else {
        bail!("{text:?} names no socket");
    };
    let part_of_path = |c: &char| c.is_ascii_alphanumeric() || "/_.-".contains(*c);
    let path: String = rest.chars().take_while(part_of_path).collect();
    Ok(host.root().join(path.trim_start_matches('/')))
}
