//! The Ferry service of a container's shim on this host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use ferry_oci::api::ferry::{
    CheckpointResponse, CommitRequest, CompleteRequest, DescribeRequest, Description, DumpResponse,
    FreezeRequest, FreezeResponse, MigrationRequest, PreDumpRequest, PreDumpResponse,
    PrepareDumpRequest, PrepareDumpResponse, ReleaseResponse, RestoreRequest, RestoreResponse,
};
use ferry_oci::api::ferry_ttrpc::FerryClient;
use ferry_oci::fast::Fast;
use ferry_oci::paths;
use serde::Deserialize;
use ttrpc::r#async::Client;
use ttrpc::context::Context;

/// For calls that only look or write a record.
const QUICK: Duration = Duration::from_secs(10);
/// For calls that start or end processes.
const SLOW: Duration = Duration::from_secs(60);
/// For calls that write memory to a disk.
const MEMORY: Duration = Duration::from_secs(620);

/// What a bundle says of its Ferry service.
#[derive(Deserialize)]
struct Announcement {
    version: u32,
    socket: String,
}

/// A connection to the shim. It is a **lease**: what was frozen or held through it is rolled back
/// by the shim when it drops before the commit.
pub(crate) struct Shim {
    client: FerryClient,
    id: String,
}

/// The bundle of a task, as containerd lays it out beside its socket.
pub(crate) fn bundle(containerd_socket: &str, namespace: &str, id: &str) -> PathBuf {
    Path::new(containerd_socket)
        .parent()
        .unwrap_or(Path::new("/run/containerd"))
        .join("io.containerd.runtime.v2.task")
        .join(namespace)
        .join(id)
}

impl Shim {
    /// Connects to the shim of container `id`; `None` when its bundle announces no Ferry service, or
    /// that shim has ended.
    ///
    /// # Errors
    /// When the announcement cannot be read or nobody answers the socket.
    pub(crate) async fn connect(bundle: &Path, id: &str) -> Result<Option<Self>> {
        let path = bundle.join(paths::BUNDLE_FILE);
        let bytes = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.with_context(|| format!("read {}", path.display()))?,
        };
        let announced: Announcement =
            serde_json::from_slice(&bytes).with_context(|| format!("decode {}", path.display()))?;
        if announced.version != ferry_oci::PROTOCOL {
            return Err(anyhow!(
                "the shim of {id} speaks protocol {}, this ferry {}: start the container anew \
                 with the shim of this version",
                announced.version,
                ferry_oci::PROTOCOL
            ));
        }
        // Nobody there is not the same as nobody answering.
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        match std::os::unix::net::UnixStream::connect(&announced.socket) {
            Err(e) if [NotFound, ConnectionRefused].contains(&e.kind()) => return Ok(None),
            other => other.with_context(|| format!("the shim of {id} cannot be reached"))?,
        };
        let client =
            Client::connect(&format!("unix://{}", announced.socket)).await.map_err(|e| {
                anyhow!("the shim of {id} does not answer on {}: {e}", announced.socket)
            })?;
        Ok(Some(Self { client: FerryClient::new(client), id: id.to_owned() }))
    }

    /// What the container is and does.
    ///
    /// # Errors
    /// When the shim does not know it.
    pub(crate) async fn describe(&self) -> Result<Description> {
        let request = DescribeRequest { id: self.id.clone(), ..Default::default() };
        text(self.client.describe(within(QUICK), &request).await)
    }

    /// [`Self::describe`]; `None` when the shim has no such container.
    ///
    /// # Errors
    /// When the shim does not answer.
    pub(crate) async fn find(&self) -> Result<Option<Description>> {
        let request = DescribeRequest { id: self.id.clone(), ..Default::default() };
        match self.client.describe(within(QUICK), &request).await {
            Err(ttrpc::Error::RpcStatus(s)) if s.code() == ttrpc::Code::NOT_FOUND => Ok(None),
            other => text(other).map(Some),
        }
    }

    /// Starts a dump that waits for the freeze; it ends by itself after its limit.
    ///
    /// # Errors
    /// When runc or CRIU cannot start; nothing has changed then.
    pub(crate) async fn prepare_dump(
        &self,
        request: PrepareDumpRequest,
    ) -> Result<PrepareDumpResponse> {
        let request = PrepareDumpRequest { id: self.id.clone(), ..request };
        text(self.client.prepare_dump(within(SLOW), &request).await)
    }

    /// Freezes the container for at most `limit_s` without a commit, and locks the connections on
    /// `lock_addresses`.
    ///
    /// # Errors
    /// When it cannot be frozen; it runs then, unlocked.
    pub(crate) async fn freeze(&self, request: FreezeRequest) -> Result<FreezeResponse> {
        let request = FreezeRequest { id: self.id.clone(), ..request };
        text(self.client.freeze(within(QUICK), &request).await)
    }

    /// Dumps the frozen container.
    ///
    /// # Errors
    /// With CRIU's first error; the container is still frozen then.
    pub(crate) async fn dump(&self, migration: &str, limit: Duration) -> Result<DumpResponse> {
        text(self.client.dump(within(limit), &self.request(migration)).await)
    }

    /// Dumps the frozen container as a checkpoint to keep.
    ///
    /// # Errors
    /// With CRIU's first error; the container is still frozen then.
    pub(crate) async fn checkpoint(
        &self,
        migration: &str,
        limit: Duration,
    ) -> Result<CheckpointResponse> {
        text(self.client.checkpoint(within(limit), &self.request(migration)).await)
    }

    /// Completes the images of a checkpoint on top of a pre-dump.
    ///
    /// # Errors
    /// When they cannot be completed; they are of no use then.
    pub(crate) async fn complete(&self, images: &Path) -> Result<()> {
        let request = CompleteRequest {
            id: self.id.clone(),
            images_path: images.display().to_string(),
            ..Default::default()
        };
        text(self.client.complete(within(MEMORY), &request).await).map(drop)
    }

    /// Writes memory into `folder`: what has changed since `parent`, or all.
    ///
    /// # Errors
    /// When it cannot be tracked or written; the next one has to be a first one.
    pub(crate) async fn pre_dump(
        &self,
        folder: &Path,
        parent: Option<&Path>,
    ) -> Result<PreDumpResponse> {
        let request = PreDumpRequest {
            id: self.id.clone(),
            folder: folder.display().to_string(),
            parent: parent.map(|parent| parent.display().to_string()).unwrap_or_default(),
            ..Default::default()
        };
        text(self.client.pre_dump(within(MEMORY), &request).await)
    }

    /// Forgets the pre-dumps.
    ///
    /// # Errors
    /// When the shim does not answer.
    pub(crate) async fn end_pre_dumps(&self) -> Result<()> {
        let request = DescribeRequest { id: self.id.clone(), ..Default::default() };
        text(self.client.end_pre_dumps(within(SLOW), &request).await).map(drop)
    }

    /// Ends a container that was checkpointed with `exit`.
    ///
    /// # Errors
    /// Before the checkpoint, or when its tasks do not end.
    pub(crate) async fn end(&self, migration: &str) -> Result<()> {
        text(self.client.end(within(SLOW), &self.request(migration)).await).map(drop)
    }

    /// Gives the container back.
    ///
    /// # Errors
    /// After the commit, or when it cannot be thawed.
    pub(crate) async fn thaw(&self, migration: &str) -> Result<()> {
        text(self.client.thaw(within(SLOW), &self.request(migration)).await).map(drop)
    }

    /// Records that the destination shall run the container.
    ///
    /// # Errors
    /// When the shim has rolled back already.
    pub(crate) async fn commit(&self, request: CommitRequest) -> Result<()> {
        let request = CommitRequest { id: self.id.clone(), ..request };
        text(self.client.commit(within(QUICK), &request).await).map(drop)
    }

    /// Undoes the commit, on the destination's word that it does not run the container.
    ///
    /// # Errors
    /// When nothing was committed.
    pub(crate) async fn revert(&self, migration: &str) -> Result<()> {
        text(self.client.revert(within(SLOW), &self.request(migration)).await).map(drop)
    }

    /// Ends the frozen tasks silently.
    ///
    /// # Errors
    /// Before the commit, or when they do not end.
    pub(crate) async fn retire(&self, migration: &str) -> Result<()> {
        text(self.client.retire(within(SLOW), &self.request(migration)).await).map(drop)
    }

    /// Starts a restore that waits for its images.
    ///
    /// # Errors
    /// When runc or CRIU cannot start.
    pub(crate) async fn prepare_restore(
        &self,
        migration: &str,
        images: &Path,
        fast: &[Fast],
        lazy_pages: bool,
    ) -> Result<()> {
        let request = RestoreRequest {
            id: self.id.clone(),
            migration: migration.to_owned(),
            images_path: images.display().to_string(),
            fast: names(fast),
            lazy_pages,
            ..Default::default()
        };
        text(self.client.prepare_restore(within(SLOW), &request).await).map(drop)
    }

    /// Restores from `images` and holds.
    ///
    /// # Errors
    /// With CRIU's first error.
    pub(crate) async fn restore(
        &self,
        migration: &str,
        images: &Path,
        fast: &[Fast],
        lazy_pages: bool,
        limit: Duration,
    ) -> Result<RestoreResponse> {
        let request = RestoreRequest {
            id: self.id.clone(),
            migration: migration.to_owned(),
            images_path: images.display().to_string(),
            fast: names(fast),
            lazy_pages,
            ..Default::default()
        };
        text(self.client.restore(within(limit), &request).await)
    }

    /// Lets the held container run.
    ///
    /// # Errors
    /// When it was not held, or did not come to run.
    pub(crate) async fn release(&self, migration: &str) -> Result<ReleaseResponse> {
        text(self.client.release(within(SLOW), &self.request(migration)).await)
    }

    /// Ends the held restore.
    ///
    /// # Errors
    /// After the release.
    pub(crate) async fn abort(&self, migration: &str) -> Result<()> {
        text(self.client.abort(within(SLOW), &self.request(migration)).await).map(drop)
    }

    fn request(&self, migration: &str) -> MigrationRequest {
        MigrationRequest {
            id: self.id.clone(),
            migration: migration.to_owned(),
            ..Default::default()
        }
    }
}

fn names(fast: &[Fast]) -> Vec<String> {
    fast.iter().map(|fast| fast.name().to_owned()).collect()
}

fn within(limit: Duration) -> Context {
    ttrpc::context::with_duration(limit)
}

/// The shim's own words, without ttrpc's wrapping.
fn text<T>(result: ttrpc::Result<T>) -> Result<T> {
    result.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) => anyhow!("{}", status.message()),
        other => anyhow!("the shim does not answer: {other}"),
    })
}
