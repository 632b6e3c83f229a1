//! containerd's records of containers, for what ctr cannot say in one.

use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::{GetContainerRequest, UpdateContainerRequest};
use containerd_client::tonic::Request;
use prost_types::FieldMask;
use serde_json::Value;

use crate::Host;

/// Changes the OCI spec of container `id`; for one that has no task yet.
///
/// # Errors
/// When there is no such container, or containerd refuses.
pub fn edit_spec(host: &Host, id: &str, edit: impl FnOnce(&mut Value)) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start a runtime")?.block_on(async {
        let socket = host.root().join("run/containerd/containerd.sock");
        let channel = containerd_client::connect(socket).await.context("connect to containerd")?;
        let mut containers = ContainersClient::new(channel);
        let got = containers.get(request(GetContainerRequest { id: id.to_owned() })?).await?;
        let mut container = got.into_inner().container.context("no container")?;
        let spec = container.spec.as_mut().context("no spec")?;
        let mut json = serde_json::from_slice(&spec.value).context("decode the spec")?;
        edit(&mut json);
        spec.value = json.to_string().into_bytes();
        let update = UpdateContainerRequest {
            container: Some(container),
            update_mask: Some(FieldMask { paths: vec!["spec".into()] }),
        };
        containers.update(request(update)?).await?;
        Ok(())
    })
}

fn request<T>(message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", "default".parse()?);
    request.set_timeout(Duration::from_secs(30));
    Ok(request)
}
