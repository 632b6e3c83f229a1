//! Images by name.

use std::collections::BTreeMap;

use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    CreateImageRequest, DeleteImageRequest, GetImageRequest, Image as ImageMessage,
    ListImagesRequest, UpdateImageRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::types;
use prost_types::FieldMask;
use serde::{Deserialize, Serialize};

use super::LABEL;
use super::client::{Containerd, Destination, MAX_MESSAGE, QUICK, SLOW};
use super::content::Descriptor;
use super::error::{Doing, Error, Found, Result};

/// An image's name and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// Its name, as `docker.io/library/redis:7`.
    pub(crate) name: String,
    /// Its index, or its manifest where it has no index.
    pub(crate) target: Descriptor,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
}

/// The name under which an image is now known at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageName {
    /// The name to write into the container's record.
    pub(crate) name: String,
    /// Whether this migration has made it.
    pub(crate) created: bool,
}

impl Containerd {
    /// The image called `name`, if there is one.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn image(&self, name: &str) -> Result<Option<Image>> {
        let request = GetImageRequest { name: name.to_owned() };
        let answer = self.images().get(self.request(request, QUICK)).await;
        let answer = answer.doing(|| format!("read image {name}")).found()?;
        answer.and_then(|a| a.into_inner().image).map(Image::try_from).transpose()
    }

    /// Deletes the name `name` of an image; its content goes with the next garbage collection when
    /// nothing else refers to it, with `sync` before this returns. A name that is not there is fine.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn delete_image(&self, name: &str, sync: bool) -> Result<()> {
        let request = DeleteImageRequest { name: name.to_owned(), sync, target: None };
        let answer = self.images().delete(self.request(request, SLOW)).await;
        answer.doing(|| format!("delete image {name}")).found().map(drop)
    }

    /// All images.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn list_images(&self) -> Result<Vec<Image>> {
        let request = ListImagesRequest { filters: Vec::new() };
        let answer = self.images().list(self.request(request, QUICK)).await;
        let images = answer.doing(|| "list images".into())?.into_inner().images;
        images.into_iter().map(Image::try_from).collect()
    }

    /// Sets one label of an image; an empty value removes it.
    pub(super) async fn label_image(&self, image: &Image, key: &str, value: &str) -> Result<()> {
        let message = ImageMessage {
            labels: [(key.to_owned(), value.to_owned())].into(),
            ..image.clone().into()
        };
        let mask = FieldMask { paths: vec![format!("labels.{key}")] };
        let request = UpdateImageRequest {
            image: Some(message),
            update_mask: Some(mask),
            source_date_epoch: None,
        };
        let answer = self.images().update(self.request(request, QUICK)).await;
        answer.doing(|| format!("label image {}", image.name)).map(drop)
    }

    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

impl Destination {
    /// Creates the image of a checkpoint, marked as this one's until it is kept.
    ///
    /// # Errors
    /// [`Error::Call`]; ALREADY_EXISTS when the name is taken.
    pub(crate) async fn create_checkpoint(
        &self,
        name: &str,
        target: &Descriptor,
        labels: &BTreeMap<String, String>,
    ) -> Result<()> {
        let mut labels = labels.clone();
        labels.insert(LABEL.to_owned(), self.migration.clone());
        let image = Image { name: name.to_owned(), target: target.clone(), labels };
        let request = CreateImageRequest { image: Some(image.into()), source_date_epoch: None };
        let answer = self.leased.images().create(self.leased.request(request, QUICK)).await;
        answer.doing(|| format!("create image {name}")).map(drop)
    }

    /// Gives `target`, whose blobs must all be here, the name `name`; when another image has it,
    /// `name@digest` instead.
    ///
    /// An image that another migration to this host has made and not yet kept becomes this one's too, so
    /// that the other's abort does not take it away (see [`Destination::cleanup`]).
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn create_image(
        &self,
        name: &str,
        target: &Descriptor,
        labels: &BTreeMap<String, String>,
    ) -> Result<ImageName> {
        let with_digest = match name.contains('@') {
            true => format!("ferry/{name}"),
            false => format!("{name}@{}", target.digest),
        };
        for name in [name, with_digest.as_str()] {
            let mut labels = labels.clone();
            labels.insert(LABEL.to_owned(), self.migration.clone());
            let image = Image { name: name.to_owned(), target: target.clone(), labels };
            let request = CreateImageRequest { image: Some(image.into()), source_date_epoch: None };
            let answer = self.leased.images().create(self.leased.request(request, QUICK)).await;
            match answer.doing(|| format!("create image {name}")) {
                Ok(_) => {
                    return Ok(ImageName { name: name.to_owned(), created: true });
                }
                Err(error) if error.is_already_exists() => {}
                Err(error) => return Err(error),
            }
            let Some(there) = self.plain.image(name).await? else {
                continue;
            };
            if there.target.digest == target.digest {
                if let Some(owners) = there.labels.get(LABEL).filter(|o| !owns(o, &self.migration))
                {
                    let owners = format!("{owners},{}", self.migration);
                    self.plain.label_image(&there, LABEL, &owners).await?;
                }
                return Ok(ImageName { name: name.to_owned(), created: false });
            }
        }
        Err(Error::invalid(format!("image name {with_digest}"), "another image has it"))
    }
}

/// Whether `migration` is among the comma-separated `owners`.
pub(super) fn owns(owners: &str, migration: &str) -> bool {
    owners.split(',').any(|o| o == migration)
}

impl TryFrom<ImageMessage> for Image {
    type Error = Error;

    fn try_from(image: ImageMessage) -> Result<Self> {
        let target = image.target.unwrap_or_default();
        let size = u64::try_from(target.size)
            .map_err(|e| Error::invalid(format!("size of image {}", image.name), e))?;
        let target = Descriptor { media_type: target.media_type, digest: target.digest, size };
        Ok(Self { name: image.name, target, labels: image.labels.into_iter().collect() })
    }
}

impl From<Image> for ImageMessage {
    fn from(image: Image) -> Self {
        Self {
            name: image.name,
            labels: image.labels.into_iter().collect(),
            target: Some(image.target.into()),
            created_at: None,
            updated_at: None,
        }
    }
}

impl From<Descriptor> for types::Descriptor {
    fn from(d: Descriptor) -> Self {
        Self {
            media_type: d.media_type,
            digest: d.digest,
            size: i64::try_from(d.size).unwrap_or(i64::MAX),
            annotations: Default::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_whole_names() {
        assert!(owns("a,b", "b") && !owns("ab", "a") && !owns("", "a"));
    }
}
