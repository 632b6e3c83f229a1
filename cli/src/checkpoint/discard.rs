//! `ferry discard`: a checkpoint that will not be restored. Its connections are let go.

use anyhow::{Context, Result, bail};
use ferry_oci::criu::{DumpRecord, Locked, RECORD_FILE};
use ferry_oci::netns::{self, Netns};
use ferry_oci::quarantine::connections;

use super::archive;
use super::format::{self, Checkpoint};
use super::spec;
use crate::containerd::Containerd;
use crate::wire::messages::ContainerdAddress;
use crate::wire::stream;

/// Removes the checkpoint `name`, and the lock on its connections; or the lock `name` alone, as
/// `ferry doctor` lists it.
///
/// # Errors
/// When there is neither.
pub(crate) async fn run(address: &ContainerdAddress, name: &str) -> Result<()> {
    let containerd = Containerd::connect(&address.socket, &address.namespace).await?;
    if Locked::is_id(name) && containerd.image(name).await?.is_none() {
        // It may be where the container was, in a network namespace of its own.
        let mut was_there = false;
        for (_, released) in netns::everywhere(|| release(name)) {
            was_there |= released?;
        }
        if !was_there {
            bail!(
                "there is no lock {name} here or in a named network namespace, nor a checkpoint of that name"
            );
        }
        return Ok(());
    }
    let checkpoint = Checkpoint::open(&containerd, name).await?;
    if let Some(locked) = locked(&containerd, &checkpoint).await? {
        // The id becomes part of a table's name.
        if !Locked::is_id(&locked.id) {
            bail!("the record of the dump has a bad lock");
        }
        connections::unlock(&locked.id)?;
        if let Some(path) = network(&containerd, &checkpoint).await? {
            let netns = Netns::open(path.as_ref()).with_context(|| format!("open {path}"))?;
            netns.run(|| connections::unlock(&locked.id))??;
        }
    }
    Ok(containerd.delete_image(name, true).await?)
}

/// Removes the lock `id` of the calling thread's network namespace; whether there is one.
fn release(id: &str) -> Result<bool> {
    let is_there = connections::locked()?.iter().any(|there| there == id);
    if is_there {
        connections::unlock(id)?;
    }
    Ok(is_there)
}

/// What the checkpoint has locked.
async fn locked(containerd: &Containerd, checkpoint: &Checkpoint) -> Result<Option<Locked>> {
    if let Some(summary) = checkpoint.summary(containerd).await? {
        return Ok(summary.options.locked);
    }
    // Made by a client of containerd: the record lies among the images.
    let Some(images) = checkpoint.index.part(format::IMAGES) else { return Ok(None) };
    let mut reader = containerd.read_blob(&images.digest, 0).await?;
    let (to, from) = stream::reader();
    let find = tokio::task::spawn_blocking(move || archive::find(from, RECORD_FILE));
    while let Some(chunk) = reader.chunk().await? {
        if to.send(chunk).await.is_err() {
            break;
        }
    }
    drop(to);
    let Some(bytes) = find.await?? else { return Ok(None) };
    let record = DumpRecord::parse(&bytes).context("read the record of the dump")?;
    Ok(record.options.locked)
}

/// The network namespace that the container was given by path, if it is here.
async fn network(containerd: &Containerd, checkpoint: &Checkpoint) -> Result<Option<String>> {
    let Some(any) = checkpoint.any(containerd, format::SPEC).await? else { return Ok(None) };
    let spec: serde_json::Value =
        serde_json::from_slice(&any.value).context("decode the checkpoint's spec")?;
    let path = spec::given_network(&spec);
    // A namespace looks like a file. Nothing else is opened that an image names.
    Ok(path.filter(|path| std::path::Path::new(path).is_file()).map(str::to_owned))
}
