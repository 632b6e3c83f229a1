//! Parts of a checkpoint on their way into the content store.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::archive;
use crate::containerd::{Blob, Descriptor, Destination};
use crate::wire::stream;

/// Stores what `write` writes, which is called twice and has to write the same both times.
///
/// # Errors
/// When it cannot be written, or containerd does not take it.
pub(super) async fn stream<F>(store: &Destination, media_type: &str, write: F) -> Result<Descriptor>
where
    F: Fn(&mut dyn Write) -> io::Result<()> + Send + Sync + 'static,
{
    let write = Arc::new(write);
    let first = write.clone();
    let digest = tokio::task::spawn_blocking(move || archive::digest(&*first)).await?;
    let (digest, size) = digest.context("read what is to be stored")?;
    let blob = Blob { digest: digest.clone(), size, ..Default::default() };
    if let Some(mut writer) = store.write_blob(&blob).await? {
        writer.restart();
        let (mut out, mut chunks) = stream::writer();
        let written = tokio::task::spawn_blocking(move || {
            write(&mut out)?;
            out.flush()
        });
        while let Some(chunk) = chunks.recv().await {
            writer.write(&chunk).await?;
        }
        written.await?.context("read what is to be stored")?;
        writer.commit().await?;
    }
    Ok(Descriptor { media_type: media_type.to_owned(), digest, size })
}

/// Stores a small blob.
///
/// # Errors
/// When containerd does not take it.
pub(super) async fn put(
    store: &Destination,
    media_type: &str,
    bytes: &[u8],
    labels: BTreeMap<String, String>,
) -> Result<Descriptor> {
    let (digest, size) = (archive::digest_of(bytes), bytes.len() as u64);
    let blob = Blob { digest: digest.clone(), size, labels, ..Default::default() };
    if let Some(mut writer) = store.write_blob(&blob).await? {
        writer.restart();
        writer.write(bytes).await?;
        writer.commit().await?;
    }
    Ok(Descriptor { media_type: media_type.to_owned(), digest, size })
}
