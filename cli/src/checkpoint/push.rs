//! `ferry push`: a checkpoint, or any image, to another host's containerd. Only blobs that it lacks go, and
//! one that has gone in part goes on where it broke off.

use std::time::Duration;

use anyhow::{Context, Result};

use super::format::{self, Checkpoint};
use crate::containerd::{Blob, Containerd, Descriptor, Image};
use crate::transport::Destination;
use crate::transport::link::{Link, unexpected};
use crate::wire::messages::{ContainerdAddress, NewImage, Reply, Request};

/// How long the other containerd may take for a step.
const PATIENCE: Duration = Duration::from_secs(900);

/// Copies image `name` to `to`, where `agent` starts ferry.
///
/// # Errors
/// When it is not there as a whole. What has come there is kept for a day, for another attempt.
pub(crate) async fn run(
    address: &ContainerdAddress,
    name: &str,
    to: &Destination,
    agent: &str,
    json: bool,
) -> Result<()> {
    let containerd = Containerd::connect(&address.socket, &address.namespace).await?;
    let image = containerd.image(name).await?;
    let image = image.with_context(|| format!("there is no image {name}"))?;
    let blobs = blobs(&containerd, &image).await?;
    let mut link = Link::open(to, agent, address.clone())
        .await
        .with_context(|| format!("host {}", to.host()))?;
    let total: u64 = blobs.iter().map(|blob| blob.size).sum();
    let sent = send(&containerd, &mut link, &image, blobs).await;
    let sent = sent.with_context(|| format!("push {name} to {}", to.host()))?;
    match json {
        true => println!("{}", serde_json::json!({ "name": name, "bytes": total, "sent": sent })),
        false => eprintln!("{sent} of {total} bytes sent to {}", to.host()),
    }
    Ok(())
}

/// Bytes sent.
async fn send(
    containerd: &Containerd,
    link: &mut Link,
    image: &Image,
    blobs: Vec<Blob>,
) -> Result<u64> {
    let push = id(&image.target);
    match link.ask(&Request::BeginPush { push: push.clone() }, PATIENCE).await? {
        Reply::Done => {}
        other => return Err(unexpected(&other)),
    }
    let missing = match link.ask(&Request::MissingBlobs(blobs), PATIENCE).await? {
        Reply::Missing(missing) => missing,
        other => return Err(unexpected(&other)),
    };
    let mut sent = 0;
    for blob in missing {
        let offset = match link.ask(&Request::OpenBlob(blob.clone()), PATIENCE).await? {
            Reply::BlobAt { offset } => offset,
            // It has come there meanwhile.
            Reply::Done => continue,
            other => return Err(unexpected(&other)),
        };
        let reader = containerd.read_blob(&blob.digest, offset).await?;
        link.send(&Request::BlobRest).await?;
        sent += link.blob(reader).await?;
        link.done(PATIENCE).await?;
    }
    let Image { name, target, labels } = image.clone();
    link.order(&Request::NameImage(NewImage { name, target, labels }), PATIENCE).await?;
    link.order(&Request::Finish { migration: push }, PATIENCE).await?;
    Ok(sent)
}

/// The same for each attempt.
fn id(target: &Descriptor) -> String {
    let hex = target.digest.rsplit(':').next().unwrap_or_default();
    format!("push-{}", hex.get(..32).unwrap_or(hex))
}

/// Everything that `image` consists of, what is referred to first.
async fn blobs(containerd: &Containerd, image: &Image) -> Result<Vec<Blob>> {
    let Some(checkpoint) = Checkpoint::find(containerd, image).await? else {
        return Ok(containerd.image_content(&image.target, None).await?.blobs);
    };
    let summary = checkpoint.summary(containerd).await?;
    let chain = summary.as_ref().map(|summary| summary.chain.as_str());
    let mut all: Vec<Blob> = Vec::new();
    for part in checkpoint.index.manifests.iter().map(|part| &part.blob) {
        if format::is_image(&part.media_type) {
            all.extend(containerd.image_content(part, chain).await?.blobs);
        } else {
            all.push(present(containerd, part).await?);
        }
    }
    all.push(present(containerd, &image.target).await?);
    Ok(all)
}

async fn present(containerd: &Containerd, at: &Descriptor) -> Result<Blob> {
    let blob = containerd.blob(&at.digest).await?;
    let blob = blob.with_context(|| format!("the part {} of the checkpoint is gone", at.digest))?;
    Ok(Blob { media_type: at.media_type.clone(), ..blob })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_at_one_image_have_one_id() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let target = Descriptor { digest, ..Default::default() };
        let id = id(&target);
        assert!(ferry_oci::paths::is_migration_id(&id), "{id}");
        assert_eq!(id.len(), 37);
    }
}
