//! Container records.

use std::collections::BTreeMap;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest,
    ListContainersRequest, UpdateContainerRequest,
};
use containerd_client::tonic::transport::Channel;
use prost_types::{Any, FieldMask};
use serde::{Deserialize, Serialize};

use super::client::{Containerd, Destination, MAX_MESSAGE, QUICK};
use super::error::{Doing, Error, Found, Result};
use super::{LABEL, base64};

/// A message whose type is known by its URL: containerd's runtime options, specs and extensions. The
/// bytes are JSON or protobuf, as the type has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TypedBytes {
    /// Name of the type.
    pub(crate) type_url: String,
    /// The message.
    #[serde(with = "base64")]
    pub(crate) value: Vec<u8>,
}

/// What containerd keeps of a container, in a form that can be sent to another host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    /// The container's id.
    pub(crate) id: String,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// Name of its image; empty when it was made from a plain root file system.
    pub(crate) image: String,
    /// Name of its runtime, as `io.containerd.ferry.v2`.
    pub(crate) runtime: String,
    /// Options of its runtime.
    pub(crate) runtime_options: Option<TypedBytes>,
    /// Its OCI runtime spec, JSON.
    pub(crate) spec: TypedBytes,
    /// Name of its snapshotter; empty when it has no snapshot.
    pub(crate) snapshotter: String,
    /// Key of its snapshot; empty when it has none.
    pub(crate) snapshot_key: String,
    /// What clients keep with it.
    pub(crate) extensions: BTreeMap<String, TypedBytes>,
    /// Id of the sandbox (pod) it belongs to; empty when to none.
    pub(crate) sandbox: String,
}

impl ContainerRecord {
    /// The OCI runtime spec.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not JSON.
    pub(crate) fn spec_json(&self) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.spec.value)
            .map_err(|e| Error::invalid(format!("spec of container {}", self.id), e))
    }

    /// Replaces the OCI runtime spec and keeps its type.
    pub(crate) fn set_spec_json(&mut self, spec: &serde_json::Value) {
        self.spec.value = spec.to_string().into_bytes();
    }
}

impl Containerd {
    /// The record of container `id`, if there is one.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn container(&self, id: &str) -> Result<Option<ContainerRecord>> {
        let request = GetContainerRequest { id: id.to_owned() };
        let answer = self.containers().get(self.request(request, QUICK)).await;
        let answer = answer.doing(|| format!("read container {id}")).found()?;
        Ok(answer.and_then(|a| a.into_inner().container).map(ContainerRecord::from))
    }

    /// The records of all containers, or of those that carry `label` with `value`.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn list_containers(
        &self,
        labelled: Option<(&str, &str)>,
    ) -> Result<Vec<ContainerRecord>> {
        let filters = labelled.map(|(k, v)| format!("labels.{k:?}=={v:?}")).into_iter().collect();
        let request = ListContainersRequest { filters };
        let answer = self.containers().list(self.request(request, QUICK)).await;
        let answer = answer.doing(|| "list containers".into())?.into_inner();
        Ok(answer.containers.into_iter().map(ContainerRecord::from).collect())
    }

    /// Deletes the record of container `id`; its task must be gone. One that is not there is fine.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn delete_container(&self, id: &str) -> Result<()> {
        let request = DeleteContainerRequest { id: id.to_owned() };
        let answer = self.containers().delete(self.request(request, QUICK)).await;
        answer.doing(|| format!("delete container {id}")).found().map(drop)
    }

    /// Gives a container another snapshot.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn set_snapshot(&self, id: &str, key: &str) -> Result<()> {
        let container =
            Container { id: id.to_owned(), snapshot_key: key.to_owned(), ..Default::default() };
        let mask = FieldMask { paths: vec!["snapshotkey".to_owned()] };
        let request =
            UpdateContainerRequest { container: Some(container), update_mask: Some(mask) };
        let answer = self.containers().update(self.request(request, QUICK)).await;
        answer.doing(|| format!("give container {id} its snapshot")).map(drop)
    }

    /// Removes one label of a container.
    pub(super) async fn unlabel_container(&self, id: &str, label: &str) -> Result<()> {
        let container = Container { id: id.to_owned(), ..Default::default() };
        let mask = FieldMask { paths: vec![format!("labels.{label}")] };
        let request =
            UpdateContainerRequest { container: Some(container), update_mask: Some(mask) };
        let answer = self.containers().update(self.request(request, QUICK)).await;
        answer.doing(|| format!("remove label {label} of container {id}")).map(drop)
    }

    fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

impl Destination {
    /// Creates the container of `record`, marked as this migration's.
    ///
    /// # Errors
    /// [`Error::Call`]; ALREADY_EXISTS when the id is taken.
    pub(crate) async fn create_container(&self, record: &ContainerRecord) -> Result<()> {
        let mut container = Container::from(record.clone());
        container.labels.insert(LABEL.to_owned(), self.migration.clone());
        let request = CreateContainerRequest { container: Some(container) };
        let answer = self.leased.containers().create(self.leased.request(request, QUICK)).await;
        answer.doing(|| format!("create container {}", record.id)).map(drop)
    }
}

impl From<Container> for ContainerRecord {
    fn from(c: Container) -> Self {
        let (runtime, runtime_options) = match c.runtime {
            Some(r) => (r.name, r.options.map(TypedBytes::from)),
            None => Default::default(),
        };
        Self {
            id: c.id,
            labels: c.labels.into_iter().collect(),
            image: c.image,
            runtime,
            runtime_options,
            spec: c.spec.map(TypedBytes::from).unwrap_or_default(),
            snapshotter: c.snapshotter,
            snapshot_key: c.snapshot_key,
            extensions: c.extensions.into_iter().map(|(k, v)| (k, v.into())).collect(),
            sandbox: c.sandbox,
        }
    }
}

impl From<ContainerRecord> for Container {
    fn from(r: ContainerRecord) -> Self {
        let options = r.runtime_options.map(Any::from);
        Self {
            id: r.id,
            labels: r.labels.into_iter().collect(),
            image: r.image,
            runtime: Some(Runtime { name: r.runtime, options }),
            spec: Some(r.spec.into()),
            snapshotter: r.snapshotter,
            snapshot_key: r.snapshot_key,
            extensions: r.extensions.into_iter().map(|(k, v)| (k, v.into())).collect(),
            sandbox: r.sandbox,
            created_at: None,
            updated_at: None,
        }
    }
}

impl From<Any> for TypedBytes {
    fn from(any: Any) -> Self {
        Self { type_url: any.type_url, value: any.value }
    }
}

impl From<TypedBytes> for Any {
    fn from(bytes: TypedBytes) -> Self {
        Self { type_url: bytes.type_url, value: bytes.value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_crosses_as_json_unchanged() {
        let any = |url: &str| TypedBytes { type_url: url.into(), value: vec![0, 1, 254, 255] };
        let record = ContainerRecord {
            id: "redis".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            image: "docker.io/library/redis:7".into(),
            runtime: "io.containerd.ferry.v2".into(),
            runtime_options: Some(any("containerd.runc.v1.Options")),
            spec: any("types.containerd.io/opencontainers/runtime-spec/1/Spec"),
            snapshotter: "overlayfs".into(),
            snapshot_key: "redis".into(),
            extensions: [("x".to_owned(), any("y"))].into(),
            sandbox: String::new(),
        };
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<ContainerRecord>(&json).unwrap(), record);
        assert_eq!(ContainerRecord::from(Container::from(record.clone())), record);
    }
}
