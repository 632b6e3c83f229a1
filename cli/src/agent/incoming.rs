//! The driver's requests and streams, as they arrive.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::BufReader;
use tokio::sync::mpsc;

use crate::transport::Output;
use crate::wire::codec::{self, Frame};
use crate::wire::messages::Request;

/// How long the driver may be silent. Longer than any dump, during which it has nothing to say; a
/// connection that died without a word must not hold the migration for ever.
const SILENCE: Duration = Duration::from_secs(900);

/// The agent's input.
pub(super) struct Incoming {
    from: BufReader<Output>,
    /// A stream was announced and has not ended.
    streaming: bool,
}

impl Incoming {
    pub(super) fn new(from: BufReader<Output>) -> Self {
        Self { from, streaming: false }
    }

    /// The next request; `None` when the driver is gone.
    pub(super) async fn request(&mut self) -> Result<Option<Request>> {
        let frame = tokio::time::timeout(SILENCE, codec::read(&mut self.from))
            .await
            .with_context(|| format!("the driver was silent for {} s", SILENCE.as_secs()))?;
        match frame.context("read from the driver")? {
            None => Ok(None),
            Some(Frame::Message(bytes)) => {
                let request: Request =
                    serde_json::from_slice(&bytes).context("decode a request")?;
                self.streaming = announces_stream(&request);
                Ok(Some(request))
            }
            Some(_) => bail!("the driver sent data where a request was due"),
        }
    }

    /// The next chunk of the announced stream; `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Vec<u8>>> {
        if !self.streaming {
            return Ok(None);
        }
        match codec::read(&mut self.from).await.context("read from the driver")? {
            Some(Frame::Data(bytes)) => Ok(Some(bytes)),
            Some(Frame::End) => {
                self.streaming = false;
                Ok(None)
            }
            Some(Frame::Message(_)) => bail!("the driver broke off a stream with a request"),
            None => bail!("the driver was lost inside a stream"),
        }
    }

    /// Reads to the end of the announced stream, passing the chunks on.
    pub(super) async fn forward(&mut self, to: mpsc::Sender<Vec<u8>>) -> Result<()> {
        while let Some(chunk) = self.chunk().await? {
            // A receiver that failed tells why itself; the rest of the stream is skipped.
            if to.send(chunk).await.is_err() {
                break;
            }
        }
        self.skip_stream().await
    }

    /// Reads what is left of an announced stream.
    pub(super) async fn skip_stream(&mut self) -> Result<()> {
        while self.chunk().await?.is_some() {}
        Ok(())
    }
}

fn announces_stream(request: &Request) -> bool {
    matches!(
        request,
        Request::PutBlob(_)
            | Request::BlobRest
            | Request::PutLayer
            | Request::Pages
            | Request::PutKnown
            | Request::PutImages(_)
            | Request::PrepareRestore { .. }
            | Request::Restore(_)
    )
}
