//! What an image consists of: every blob, and the snapshot that its layers make.

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::client::Containerd;
use super::content::{Blob, Descriptor};
use super::error::{Error, Result};

/// Manifests and configs are a few KiB; registries refuse more than 4 MiB.
const MAX_JSON: usize = 8 << 20;
/// An index may name indexes; nobody nests them deeper than once.
const MAX_DEPTH: usize = 4;

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// The layer's blob, compressed or not.
    pub(super) blob: Descriptor,
    /// Digest of the layer uncompressed.
    pub(super) diff_id: String,
    /// Name of the snapshot that this layer and all below it make.
    pub(super) chain_id: String,
}

/// Everything of an image that is for this host's platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageContent {
    /// Every blob, all present: layers and config first, what refers to them after them.
    pub(crate) blobs: Vec<Blob>,
    /// The config.
    pub(crate) config: Descriptor,
    pub(super) layers: Vec<Layer>,
}

impl ImageContent {
    /// Name of the snapshot that all layers make: the parent of a container's snapshot. Empty for an image
    /// without layers.
    pub(crate) fn chain_id(&self) -> &str {
        self.layers.last().map_or("", |l| &l.chain_id)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Reference>,
}

#[derive(Deserialize)]
struct Reference {
    #[serde(flatten)]
    descriptor: Descriptor,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Config {
    architecture: String,
    os: String,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

impl Containerd {
    /// Every blob of the image `target` that this host's platform needs. Where several manifests would
    /// do, that whose layers make the snapshot `chain_id` is taken, else the first whose blobs are here.
    ///
    /// # Errors
    /// [`Error::MissingBlob`] with the blob that is not in the store, [`Error::NoPlatform`],
    /// [`Error::Invalid`] for a manifest that cannot be read, [`Error::Call`].
    pub(crate) async fn image_content(
        &self,
        target: &Descriptor,
        chain_id: Option<&str>,
    ) -> Result<ImageContent> {
        let mut paths = Vec::new();
        self.find_manifests(target, MAX_DEPTH, &mut paths).await?;
        let mut best: Option<Result<ImageContent>> = None;
        for path in paths {
            let content = self.manifest_content(&path).await;
            match &content {
                Ok(c) if chain_id.is_none_or(|id| id == c.chain_id()) => return content,
                Ok(_) if !matches!(best, Some(Ok(_))) => best = Some(content),
                Err(_) if best.is_none() => best = Some(content),
                _ => {}
            }
        }
        best.unwrap_or_else(|| {
            let platform = format!("linux/{}", architecture());
            Err(Error::NoPlatform { digest: target.digest.clone(), platform })
        })
    }

    /// Walks from `target` down to the manifests that may be for this platform; each is given with the
    /// indexes above it, outermost first. An index that is not in the store is not an error unless it is the
    /// outermost: indexes name what was never pulled.
    async fn find_manifests(
        &self,
        target: &Descriptor,
        depth: usize,
        found: &mut Vec<Vec<Descriptor>>,
    ) -> Result<()> {
        let mut open = vec![vec![target.clone()]];
        while let Some(path) = open.pop() {
            let last = path.last().unwrap_or(target);
            if !is_index(&last.media_type) {
                found.push(path);
                continue;
            }
            if path.len() > depth {
                return Err(Error::invalid(format!("index {}", last.digest), "nested too deeply"));
            }
            let index: Manifest = match self.read_json("index", last).await {
                Err(Error::MissingBlob { .. }) if path.len() > 1 => continue,
                other => other?,
            };
            // The stack turns the order around; the index's own order is kept by turning it first.
            for reference in index.manifests.into_iter().rev() {
                let fits = reference
                    .platform
                    .is_none_or(|p| p.os == "linux" && p.architecture == architecture());
                if fits {
                    open.push(path.iter().cloned().chain([reference.descriptor]).collect());
                }
            }
        }
        Ok(())
    }

    async fn manifest_content(&self, path: &[Descriptor]) -> Result<ImageContent> {
        let Some((target, indexes)) = path.split_last() else {
            return Err(Error::invalid("image", "no manifest"));
        };
        let manifest: Manifest = self.read_json("manifest", target).await?;
        let invalid = |why: &str| Error::invalid(format!("manifest {}", target.digest), why);
        let config_at = manifest.config.ok_or_else(|| invalid("no config"))?;
        let config: Config = self.read_json("config", &config_at).await?;
        if (config.os.as_str(), config.architecture.as_str()) != ("linux", architecture()) {
            let platform = format!("linux/{}", architecture());
            return Err(Error::NoPlatform { digest: target.digest.clone(), platform });
        }

        let mut blobs = Vec::new();
        let mut of_rootfs = Vec::new();
        for layer in manifest.layers {
            let is_layer = is_layer(&layer.media_type);
            match self.present("layer", &layer).await {
                Ok(blob) => blobs.push(blob),
                // What is not a layer (a signature, an attestation) need not have been pulled.
                Err(Error::MissingBlob { .. }) if !is_layer => {}
                Err(error) => return Err(error),
            }
            if is_layer {
                of_rootfs.push(layer);
            }
        }
        if of_rootfs.len() != config.rootfs.diff_ids.len() {
            return Err(invalid("its layers and its config's do not match"));
        }
        blobs.push(self.present("config", &config_at).await?);
        blobs.push(self.present("manifest", target).await?);
        for index in indexes.iter().rev() {
            blobs.push(self.present("index", index).await?);
        }
        let chain = chain_ids(&config.rootfs.diff_ids);
        let layers = of_rootfs.into_iter().zip(config.rootfs.diff_ids).zip(chain);
        let layers =
            layers.map(|((blob, diff_id), chain_id)| Layer { blob, diff_id, chain_id }).collect();
        Ok(ImageContent { blobs, config: config_at, layers })
    }

    async fn present(&self, what: &'static str, at: &Descriptor) -> Result<Blob> {
        let blob = self.blob(&at.digest).await?;
        let missing = || Error::MissingBlob { what, digest: at.digest.clone() };
        Ok(Blob { media_type: at.media_type.clone(), ..blob.ok_or_else(missing)? })
    }

    async fn read_json<T: for<'a> Deserialize<'a>>(
        &self,
        what: &'static str,
        at: &Descriptor,
    ) -> Result<T> {
        self.present(what, at).await?;
        let bytes = self.read_small_blob(&at.digest, MAX_JSON).await?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::invalid(format!("{what} {}", at.digest), e))
    }
}

/// This host's architecture in the words of OCI images.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

fn is_index(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

fn is_layer(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.")
}

/// The names of the snapshots that layers make one on the other (OCI image spec, "Layer ChainID").
fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(below) => {
                let digest = Sha256::digest(format!("{below} {diff_id}"));
                digest.iter().fold("sha256:".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
            }
        };
        chain.push(next);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_those_of_the_image_spec() {
        let ids: Vec<String> = ["a", "b"].map(|c| format!("sha256:{}", c.repeat(64))).into();
        let chain = chain_ids(&ids);
        assert_eq!(chain[0], ids[0]);
        let digest = Sha256::digest(format!("{} {}", ids[0], ids[1]));
        let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(chain[1], format!("sha256:{hex}"));
    }
}
