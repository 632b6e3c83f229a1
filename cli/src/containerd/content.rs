//! Reading the content store.

use std::collections::BTreeMap;
use std::time::Duration;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{
    Info, InfoRequest, ReadContentRequest, ReadContentResponse, UpdateRequest,
};
use containerd_client::tonic::Streaming;
use containerd_client::tonic::transport::Channel;
use prost_types::FieldMask;
use serde::{Deserialize, Serialize};

use super::client::{Containerd, MAX_MESSAGE, QUICK};
use super::error::{Doing, Error, Found, Result};

/// How long one chunk of a blob may take to come or to be written.
pub(super) const CHUNK_DEADLINE: Duration = Duration::from_secs(60);
/// Labels by which one blob keeps others alive.
pub(super) const GC_REF_CONTENT: &str = "containerd.io/gc.ref.content";

/// Names a blob: what it is, which, how large.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    /// Media type.
    #[serde(default)]
    pub(crate) media_type: String,
    /// Digest, as `sha256:<hex>`.
    pub(crate) digest: String,
    /// Size in bytes.
    pub(crate) size: u64,
}

/// A blob that is present in a content store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Blob {
    /// Media type, as the blob that refers to it says; empty when nobody was asked.
    pub(crate) media_type: String,
    /// Digest, as `sha256:<hex>`.
    pub(crate) digest: String,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Those of its labels that name the blobs it refers to (`containerd.io/gc.ref.content.*`).
    pub(crate) labels: BTreeMap<String, String>,
}

/// The bytes of a blob, chunk by chunk.
#[derive(Debug)]
pub(crate) struct BlobReader {
    stream: Streaming<ReadContentResponse>,
    digest: String,
}

impl BlobReader {
    /// The next chunk, not empty and at most a few MiB; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::Timeout`] when none came for a minute.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let doing = || format!("read blob {}", self.digest);
            let next = tokio::time::timeout(CHUNK_DEADLINE, self.stream.message()).await;
            let next = next.map_err(|_| timeout(doing()))?.doing(doing)?;
            match next {
                Some(message) if message.data.is_empty() => {}
                other => return Ok(other.map(|message| message.data)),
            }
        }
    }
}

impl Containerd {
    /// What the store says of a blob, if it has it. The media type stays empty.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn blob(&self, digest: &str) -> Result<Option<Blob>> {
        let Some(info) = self.blob_info(digest).await? else {
            return Ok(None);
        };
        let size = size(info.size, digest)?;
        let labels = info.labels.into_iter().filter(|(k, _)| k.starts_with(GC_REF_CONTENT));
        Ok(Some(Blob {
            media_type: String::new(),
            digest: info.digest,
            size,
            labels: labels.collect(),
        }))
    }

    /// Starts to read a blob at `offset` bytes.
    ///
    /// # Errors
    /// [`Error::Call`]; NOT_FOUND when the store does not have it.
    pub(crate) async fn read_blob(&self, digest: &str, offset: u64) -> Result<BlobReader> {
        let offset = i64::try_from(offset).map_err(|e| Error::invalid("offset in a blob", e))?;
        let request = ReadContentRequest { digest: digest.to_owned(), offset, size: 0 };
        let answer = self.contents().read(self.stream_request(request)).await;
        let stream = answer.doing(|| format!("read blob {digest}"))?.into_inner();
        Ok(BlobReader { stream, digest: digest.to_owned() })
    }

    /// The whole of a small blob.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::Invalid`] when it is larger than `limit` bytes.
    pub(crate) async fn read_small_blob(&self, digest: &str, limit: usize) -> Result<Vec<u8>> {
        let mut reader = self.read_blob(digest, 0).await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = reader.chunk().await? {
            if bytes.len() + chunk.len() > limit {
                return Err(Error::invalid(
                    format!("blob {digest}"),
                    format!("more than {limit} bytes"),
                ));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    pub(super) async fn blob_info(&self, digest: &str) -> Result<Option<Info>> {
        check_digest(digest)?;
        let request = InfoRequest { digest: digest.to_owned() };
        let answer = self.contents().info(self.request(request, QUICK)).await;
        let answer = answer.doing(|| format!("look for blob {digest}")).found()?;
        Ok(answer.and_then(|a| a.into_inner().info))
    }

    /// Sets labels of a blob and keeps its others; an empty value removes a label.
    pub(super) async fn label_blob(
        &self,
        digest: &str,
        labels: impl IntoIterator<Item = (String, String)>,
    ) -> Result<()> {
        let info = Info {
            digest: digest.to_owned(),
            labels: labels.into_iter().collect(),
            ..Default::default()
        };
        if info.labels.is_empty() {
            return Ok(());
        }
        let paths = info.labels.keys().map(|k| format!("labels.{k}")).collect();
        let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let answer = self.contents().update(self.request(request, QUICK)).await;
        answer.doing(|| format!("label blob {digest}")).map(drop)
    }

    pub(super) fn contents(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// Refuses what is not the digest of a blob before it becomes part of a label, a reference or a key.
pub(super) fn check_digest(digest: &str) -> Result<()> {
    let hex =
        |h: &str, len| h.len() == len && h.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
    let good = match digest.split_once(':') {
        Some(("sha256", h)) => hex(h, 64),
        Some(("sha384", h)) => hex(h, 96),
        Some(("sha512", h)) => hex(h, 128),
        _ => false,
    };
    if good { Ok(()) } else { Err(Error::invalid("digest", format!("{digest:?}"))) }
}

pub(super) fn timeout(doing: String) -> Error {
    Error::Timeout { doing, seconds: CHUNK_DEADLINE.as_secs() }
}

fn size(size: i64, digest: &str) -> Result<u64> {
    u64::try_from(size).map_err(|e| Error::invalid(format!("size of blob {digest}"), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_pass_as_digests() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert!(check_digest(&good).is_ok());
        let short = &good[..70];
        let upper = good.to_uppercase();
        for bad in ["", "sha256:", "sha256", short, &upper, "md5:0a", "sha256:../../etc"] {
            assert!(check_digest(bad).is_err(), "{bad}");
        }
    }
}
