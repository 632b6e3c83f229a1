//! The connection, and what every request carries.

use std::time::Duration;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::tonic::Request;
use containerd_client::tonic::metadata::AsciiMetadataValue;
use containerd_client::tonic::transport::Channel;

use super::error::{Doing, Error, Result};

/// Deadline of a request that only touches metadata.
pub(super) const QUICK: Duration = Duration::from_secs(30);
/// Deadline of a request that works on files: unpack a layer, collect garbage, create a task.
pub(super) const SLOW: Duration = Duration::from_secs(15 * 60);
/// containerd's own limit for a message, bytes.
pub(super) const MAX_MESSAGE: usize = 16 << 20;

/// One namespace of one containerd. Cheap to clone; clones share the connection.
#[derive(Clone, Debug)]
pub(crate) struct Containerd {
    channel: Channel,
    namespace: AsciiMetadataValue,
    lease: Option<AsciiMetadataValue>,
}

impl Containerd {
    /// Connects to the socket `address` (a path, with or without `unix://`).
    ///
    /// # Errors
    /// [`Error::Connect`] if nobody answers, [`Error::Invalid`] for a namespace that no header can carry.
    pub(crate) async fn connect(address: &str, namespace: &str) -> Result<Self> {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        let namespace = header("namespace", namespace)?;
        let channel = containerd_client::connect(path)
            .await
            .map_err(|source| Error::Connect { address: path.to_owned(), source })?;
        Ok(Self { channel, namespace, lease: None })
    }

    /// This containerd as the destination of `migration`.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `migration` is 1 to 64 letters, digits, `-`, `_` or `.`.
    pub(crate) fn destination(&self, migration: &str) -> Result<Destination> {
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
        if migration.is_empty() || migration.len() > 64 || !migration.bytes().all(plain) {
            return Err(Error::invalid("migration id", format!("{migration:?}")));
        }
        let lease = format!("ferry-{migration}");
        let leased = Self { lease: Some(header("lease", &lease)?), ..self.clone() };
        Ok(Destination { plain: self.clone(), leased, migration: migration.to_owned(), lease })
    }

    /// containerd's version, as `2.1.9`.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn version(&self) -> Result<String> {
        let answer = VersionClient::new(self.channel()).version(self.request((), QUICK)).await;
        Ok(answer.doing(|| "ask containerd's version".into())?.into_inner().version)
    }

    /// The snapshotters that work on this host.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) async fn snapshotters(&self) -> Result<Vec<String>> {
        let request = PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".into()] };
        let answer =
            IntrospectionClient::new(self.channel()).plugins(self.request(request, QUICK)).await;
        let plugins =
            answer.doing(|| "list containerd's snapshotters".into())?.into_inner().plugins;
        Ok(plugins.into_iter().filter(|p| p.init_err.is_none()).map(|p| p.id).collect())
    }

    pub(super) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Puts namespace, lease and deadline around a message.
    pub(super) fn request<T>(&self, message: T, deadline: Duration) -> Request<T> {
        let mut request = self.stream_request(message);
        request.set_timeout(deadline);
        request
    }

    /// As [`Self::request`] for a stream, whose deadline is per message and kept by its reader.
    pub(super) fn stream_request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        headers.insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            headers.insert("containerd-lease", lease.clone());
        }
        request
    }
}

/// A containerd as one migration's destination. See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    /// Without the lease: for what deletes, and for what outlives the lease.
    pub(super) plain: Containerd,
    /// With the lease: for what creates.
    pub(super) leased: Containerd,
    pub(super) migration: String,
    pub(super) lease: String,
}

impl Destination {
    /// The same containerd without the lease.
    pub(crate) fn containerd(&self) -> &Containerd {
        &self.plain
    }

    /// Id of the migration.
    pub(crate) fn migration(&self) -> &str {
        &self.migration
    }
}

fn header(what: &str, value: &str) -> Result<AsciiMetadataValue> {
    value.parse().map_err(|_| Error::invalid(what, format!("{value:?}")))
}
