//! Writing the content store of the destination.

use std::time::Duration;

use containerd_client::services::v1::{
    AbortRequest, ListStatusesRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use containerd_client::tonic::Streaming;
use containerd_client::tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tokio::sync::mpsc;

use super::LABEL;
use super::client::{Destination, QUICK, SLOW};
use super::content::{Blob, CHUNK_DEADLINE, GC_REF_CONTENT, check_digest, timeout};
use super::error::{Doing, Error, Found, Result};

/// Largest piece of data put into one message, bytes; containerd refuses messages of 16 MiB.
const PIECE: usize = 1 << 20;

/// A blob on its way into the content store. Dropped before [`BlobWriter::commit`] it keeps what was
/// written; the next writer of the same migration goes on from there, cleanup removes it.
#[derive(Debug)]
pub(crate) struct BlobWriter {
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    destination: Destination,
    blob: Blob,
    offset: u64,
}

impl Destination {
    /// Those of `blobs` that the content store lacks. The others are covered by the lease from now on,
    /// and their references to other blobs are made complete, so that they stay.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::Invalid`] for a digest that is none.
    pub(crate) async fn missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let mut missing = Vec::new();
        for blob in blobs {
            // First covered, then looked for: between the two it could be collected otherwise.
            check_digest(&blob.digest)?;
            self.cover("content", &blob.digest).await?;
            match self.plain.blob(&blob.digest).await? {
                Some(there) => self.complete(blob, &there).await?,
                None => missing.push(blob.clone()),
            }
        }
        Ok(missing)
    }

    /// Begins to write a blob, or goes on where an earlier attempt of this migration stopped: the first byte
    /// expected is at [`BlobWriter::offset`]. `None` when the store has the blob by now.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::Timeout`], [`Error::Invalid`].
    pub(crate) async fn write_blob(&self, blob: &Blob) -> Result<Option<BlobWriter>> {
        check_digest(&blob.digest)?;
        let doing = || format!("write blob {}", blob.digest);
        let total = i64::try_from(blob.size).map_err(|e| Error::invalid("size of a blob", e))?;
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: self.ingest(&blob.digest),
            total,
            expected: blob.digest.clone(),
            ..Default::default()
        };
        // The first message has to be there before the call: containerd answers nothing until it has it.
        let (requests, receiver) = mpsc::channel(1);
        requests.send(first).await.map_err(|e| Error::invalid(doing(), e))?;
        let stream = self.leased.stream_request(ReceiverStream::new(receiver));
        let mut client = self.leased.contents();
        let call = tokio::time::timeout(CHUNK_DEADLINE, client.write(stream)).await;
        let answers = match call.map_err(|_| timeout(doing()))?.doing(doing) {
            Ok(answers) => answers.into_inner(),
            Err(error) if error.is_already_exists() => return self.exists(blob).await,
            Err(error) => return Err(error),
        };
        let blob = blob.clone();
        let mut writer =
            BlobWriter { requests, answers, destination: self.clone(), blob, offset: 0 };
        match writer.answer(CHUNK_DEADLINE).await {
            Ok(state) if (0..=total).contains(&state.offset) => {
                writer.offset = state.offset.unsigned_abs();
                Ok(Some(writer))
            }
            Ok(_) => {
                // More than the blob has: not what was meant to be written. Begin anew.
                writer.offset = 0;
                Ok(Some(writer))
            }
            Err(error) if error.is_already_exists() => self.exists(&writer.blob).await,
            Err(error) => Err(error),
        }
    }

    async fn exists(&self, blob: &Blob) -> Result<Option<BlobWriter>> {
        self.cover("content", &blob.digest).await?;
        match self.plain.blob(&blob.digest).await? {
            Some(there) => self.complete(blob, &there).await?,
            None => {
                return Err(Error::invalid(format!("blob {}", blob.digest), "came and went"));
            }
        }
        Ok(None)
    }

    /// Adds the references that a blob has at the source to the blob that is here.
    async fn complete(&self, blob: &Blob, there: &Blob) -> Result<()> {
        let lacking = references(blob).filter(|(k, _)| !there.labels.contains_key(k));
        self.plain.label_blob(&blob.digest, lacking).await
    }

    fn ingest(&self, digest: &str) -> String {
        format!("{}-{digest}", self.lease)
    }

    /// Removes what blobs of this migration were written in part.
    pub(super) async fn abort_ingests(&self) -> Result<()> {
        let doing = || "list unfinished blobs".to_owned();
        let request = ListStatusesRequest { filters: Vec::new() };
        let mut client = self.plain.contents();
        let answer = client.list_statuses(self.plain.request(request, QUICK)).await;
        let prefix = self.ingest("");
        for status in answer.doing(doing)?.into_inner().statuses {
            if status.r#ref.starts_with(&prefix) {
                let request = AbortRequest { r#ref: status.r#ref.clone() };
                let answer = client.abort(self.plain.request(request, QUICK)).await;
                answer.doing(|| format!("remove unfinished blob {}", status.r#ref)).found()?;
            }
        }
        Ok(())
    }
}

impl BlobWriter {
    /// How many bytes the store has.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Forgets what was written; the first byte expected is that at 0 again.
    pub(crate) fn restart(&mut self) {
        // The store truncates when a write begins at 0.
        self.offset = 0;
    }

    /// Writes the bytes that follow.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more than the blob has, [`Error::Call`], [`Error::Timeout`].
    pub(crate) async fn write(&mut self, data: &[u8]) -> Result<()> {
        for piece in data.chunks(PIECE) {
            if self.offset + piece.len() as u64 > self.blob.size {
                let why = format!("more than the {} bytes announced", self.blob.size);
                return Err(Error::invalid(format!("blob {}", self.blob.digest), why));
            }
            let answer = self.send(WriteAction::Write, piece.to_vec(), CHUNK_DEADLINE).await?;
            self.offset += piece.len() as u64;
            if answer.offset != self.offset.cast_signed() {
                let why = format!("{} bytes stored of {}", answer.offset, self.offset);
                return Err(Error::invalid(format!("blob {}", self.blob.digest), why));
            }
        }
        Ok(())
    }

    /// Makes it a blob, which containerd does only when size and digest are right.
    ///
    /// # Errors
    /// [`Error::Invalid`] when bytes are missing, [`Error::Call`], [`Error::Timeout`].
    pub(crate) async fn commit(mut self) -> Result<()> {
        if self.offset != self.blob.size {
            let why = format!("{} bytes of {}", self.offset, self.blob.size);
            return Err(Error::invalid(format!("blob {}", self.blob.digest), why));
        }
        match self.send(WriteAction::Commit, Vec::new(), SLOW).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_already_exists() => {
                self.destination.exists(&self.blob).await.map(drop)
            }
            Err(error) => Err(error),
        }
    }

    async fn send(
        &mut self,
        action: WriteAction,
        data: Vec<u8>,
        deadline: Duration,
    ) -> Result<WriteContentResponse> {
        let mut labels = std::collections::HashMap::new();
        if action == WriteAction::Commit {
            labels.extend(references(&self.blob));
            labels.insert(LABEL.to_owned(), self.destination.migration.clone());
        }
        let request = WriteContentRequest {
            action: action.into(),
            r#ref: self.destination.ingest(&self.blob.digest),
            total: self.blob.size.cast_signed(),
            offset: self.offset.cast_signed(),
            data,
            labels,
            // Named at the beginning and with the commit: each time, the store looks whether it has the blob.
            expected: match action {
                WriteAction::Commit => self.blob.digest.clone(),
                _ => String::new(),
            },
        };
        // A closed channel means that the store has ended the call; the answer says why.
        let _ = self.requests.send(request).await;
        self.answer(deadline).await
    }

    async fn answer(&mut self, deadline: Duration) -> Result<WriteContentResponse> {
        let doing = || format!("write blob {}", self.blob.digest);
        let answer = tokio::time::timeout(deadline, self.answers.message()).await;
        let answer = answer
            .map_err(|_| Error::Timeout { doing: doing(), seconds: deadline.as_secs() })?
            .doing(doing)?;
        answer.ok_or_else(|| Error::invalid(doing(), "containerd ended the write"))
    }
}

/// The labels that keep other blobs alive. Nothing else that the other host's containerd says of a blob
/// is taken over.
fn references(blob: &Blob) -> impl Iterator<Item = (String, String)> {
    let is_reference = |(k, v): &(&String, &String)| {
        k.starts_with(GC_REF_CONTENT) && check_digest(v).is_ok() && k.len() + v.len() < 4096
    };
    blob.labels.iter().filter(is_reference).map(|(k, v)| (k.clone(), v.clone()))
}
