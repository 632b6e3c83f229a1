//! The protocol on the driver's side: one request at a time, each with a deadline.

use std::io::{self, Read};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ferry_oci::sockets;
use tokio::io::{AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Destination, Input, Output, Session};
use crate::containerd::BlobReader;
use crate::wire::codec::{self, Frame, MAX_DATA};
use crate::wire::messages::{ContainerdAddress, Reply, Request};

/// How long the other host may take to answer the first request.
const HELLO: Duration = Duration::from_secs(20);
/// How long a stream may stand still.
const STALL: Duration = Duration::from_secs(60);

/// A connection to the agent on the destination.
pub(crate) struct Link {
    session: Session,
    output: BufReader<Output>,
    input: BufWriter<Input>,
    host: String,
    /// Bytes written to the agent, frames included.
    sent: u64,
    /// Shortest time in which a request was answered.
    round_trip: Duration,
}

impl Link {
    /// Connects and agrees on the protocol.
    ///
    /// # Errors
    /// When the host cannot be reached, has no ferry, or one of another protocol.
    pub(crate) async fn open(
        to: &Destination,
        agent: &str,
        containerd: ContainerdAddress,
    ) -> Result<Self> {
        let (session, output, input) = Session::open(to, agent).await?;
        let mut link = Self {
            session,
            output: BufReader::with_capacity(1 << 16, output),
            input: BufWriter::with_capacity(1 << 16, input),
            host: to.host().to_owned(),
            sent: 0,
            round_trip: Duration::MAX,
        };
        let hello = Request::Hello {
            protocol: ferry_oci::PROTOCOL,
            ferry: env!("CARGO_PKG_VERSION").to_owned(),
            containerd,
        };
        match link.ask(&hello, HELLO).await? {
            Reply::Hello { protocol: ferry_oci::PROTOCOL, .. } => Ok(link),
            Reply::Hello { protocol, ferry } => bail!(
                "ferry {ferry} there speaks protocol {protocol}, this one {}: \
                 install the same version on both hosts",
                ferry_oci::PROTOCOL
            ),
            other => Err(unexpected(&other)),
        }
    }

    /// Name of the host at the other end.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Whether this end of it is at `ip`, which then must not fall silent.
    ///
    /// # Errors
    /// When sockets cannot be read.
    pub(crate) fn comes_from(&self, ip: IpAddr) -> io::Result<bool> {
        let Some(pid) = self.session.pid() else { return Ok(false) };
        let sockets = sockets::of_processes(&[pid])?;
        Ok(sockets.iter().any(|s| s.connected && s.local.ip() == ip))
    }

    /// Bytes sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Shortest time in which a request was answered so far: no less than a packet needs there and back.
    pub(crate) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// When the agent refuses, the connection breaks, or `deadline` passes.
    pub(crate) async fn ask(&mut self, request: &Request, deadline: Duration) -> Result<Reply> {
        let asked = Instant::now();
        self.send(request).await?;
        let reply = self.reply(deadline).await?;
        self.round_trip = self.round_trip.min(asked.elapsed());
        Ok(reply)
    }

    /// [`Self::ask`] where nothing but `Done` is expected.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) async fn order(&mut self, request: &Request, deadline: Duration) -> Result<()> {
        match self.ask(request, deadline).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a request that announces a stream.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(crate) async fn send(&mut self, request: &Request) -> Result<()> {
        let bytes = serde_json::to_vec(request).context("encode a request")?;
        self.frame(Frame::Message(bytes)).await?;
        self.flush().await
    }

    /// [`Self::send`], not flushed: the stream follows at once.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(crate) async fn send_on(&mut self, request: &Request) -> Result<()> {
        let bytes = serde_json::to_vec(request).context("encode a request")?;
        self.frame(Frame::Message(bytes)).await
    }

    /// Sends bytes as part of a stream that is still open.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(crate) async fn piece(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(MAX_DATA as usize) {
            self.frame(Frame::Data(piece.to_vec())).await?;
        }
        Ok(())
    }

    /// Sends the chunks of a stream and its end.
    ///
    /// # Errors
    /// When the connection breaks or stands still.
    pub(crate) async fn stream(&mut self, mut chunks: mpsc::Receiver<Vec<u8>>) -> Result<u64> {
        let mut total = 0;
        while let Some(chunk) = chunks.recv().await {
            for piece in chunk.chunks(MAX_DATA as usize) {
                total += piece.len() as u64;
                self.frame(Frame::Data(piece.to_vec())).await?;
            }
        }
        self.end_stream().await?;
        Ok(total)
    }

    /// Sends what is left of a blob as a stream. Bytes sent.
    ///
    /// # Errors
    /// When it cannot be read, or the connection breaks.
    pub(crate) async fn blob(&mut self, mut reader: BlobReader) -> Result<u64> {
        let (to, chunks) = mpsc::channel(8);
        let read = async move {
            while let Some(chunk) = reader.chunk().await? {
                if to.send(chunk).await.is_err() {
                    break;
                }
            }
            anyhow::Ok(())
        };
        let (read, sent) = tokio::join!(read, self.stream(chunks));
        read?;
        sent
    }

    /// Sends one file of the images as part of a stream that is still open.
    ///
    /// # Errors
    /// When the file is not `size` bytes long or the connection breaks.
    pub(crate) async fn file(&mut self, path: &Path, size: u64) -> Result<()> {
        // It lies in memory: quicker here than on another thread.
        let mut file =
            std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut left = size;
        while left > 0 {
            let mut piece = vec![0; left.min(u64::from(MAX_DATA)) as usize];
            file.read_exact(&mut piece).with_context(|| format!("read {}", path.display()))?;
            left -= piece.len() as u64;
            self.frame(Frame::Data(piece)).await?;
        }
        Ok(())
    }

    /// Ends an open stream.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(crate) async fn end_stream(&mut self) -> Result<()> {
        self.frame(Frame::End).await?;
        self.flush().await
    }

    /// Receives a stream that comes before the reply to a request, piece by piece.
    ///
    /// # Errors
    /// When the agent refuses, the connection breaks, or a piece is not taken.
    pub(crate) async fn receive(
        &mut self,
        deadline: Duration,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        loop {
            let frame = match timeout(deadline, codec::read(&mut self.output)).await {
                Err(_) => bail!("no answer within {} s", deadline.as_secs()),
                Ok(frame) => frame.context("read from the agent")?,
            };
            match frame {
                Some(Frame::Data(bytes)) => take(&bytes)?,
                Some(Frame::End) => return Ok(()),
                Some(Frame::Message(bytes)) => {
                    match serde_json::from_slice(&bytes).context("decode the agent's reply")? {
                        Reply::Refused { error } => bail!(error),
                        other => return Err(unexpected(&other)),
                    }
                }
                None => bail!(self.session.diagnose().await),
            }
        }
    }

    /// Waits for the reply to a request that was sent with a stream.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) async fn reply(&mut self, deadline: Duration) -> Result<Reply> {
        let frame = match timeout(deadline, codec::read(&mut self.output)).await {
            Err(_) => bail!("no answer within {} s", deadline.as_secs()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Ok(other) => other.context("read from the agent")?,
        };
        match frame {
            None => Err(anyhow!(self.session.diagnose().await)),
            Some(Frame::Message(bytes)) => {
                match serde_json::from_slice(&bytes).context("decode the agent's reply")? {
                    Reply::Refused { error } => Err(anyhow!(error)),
                    reply => Ok(reply),
                }
            }
            Some(_) => bail!("the agent sent data where a reply was due"),
        }
    }

    /// Waits for `Done`.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) async fn done(&mut self, deadline: Duration) -> Result<()> {
        match self.reply(deadline).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn frame(&mut self, frame: Frame) -> Result<()> {
        self.sent += match &frame {
            Frame::Message(bytes) | Frame::Data(bytes) => 5 + bytes.len() as u64,
            Frame::End => 5,
        };
        let written = timeout(STALL, codec::write(&mut self.input, &frame)).await;
        self.check(written).await
    }

    async fn flush(&mut self) -> Result<()> {
        let flushed = timeout(STALL, self.input.flush()).await;
        self.check(flushed).await
    }

    async fn check(
        &mut self,
        result: Result<io::Result<()>, tokio::time::error::Elapsed>,
    ) -> Result<()> {
        match result {
            Err(_) => bail!("the connection stood still for {} s", STALL.as_secs()),
            // A refusal may be waiting: it tells more than a broken pipe does.
            Ok(Err(_)) => match self.reply(Duration::from_secs(2)).await {
                Err(error) => Err(error),
                Ok(other) => Err(unexpected(&other)),
            },
            Ok(Ok(())) => Ok(()),
        }
    }
}

/// An error for a reply that does not belong to its request.
pub(crate) fn unexpected(reply: &Reply) -> anyhow::Error {
    anyhow!("the agent gave an answer that does not belong to the request: {reply:?}")
}
