//! Requests of the driver and replies of the agent.

use std::collections::BTreeMap;

use ferry_oci::fast::Fast;
use serde::{Deserialize, Serialize};

use crate::containerd::{Blob, ContainerRecord, Descriptor, SnapshotKind, Stdio};
use crate::describe::host::HostFacts;
use crate::describe::room::{RoomFacts, RoomRequest};
use crate::network::address::Cidr;

/// What the driver asks of the agent, in the order of a migration.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// First of all: do both speak the same protocol?
    Hello {
        /// [`ferry_oci::PROTOCOL`] of the driver.
        protocol: u32,
        /// Version of the driver's ferry.
        ferry: String,
        /// Which containerd the agent is to use.
        containerd: ContainerdAddress,
    },
    /// What the host is. Changes nothing.
    DescribeHost,
    /// What the place is that a container is to go to. Changes nothing.
    DescribeRoom(RoomRequest),
    /// Starts a migration; everything after it is undone when the connection ends before `Commit`.
    Begin {
        /// Id of the migration.
        migration: String,
        /// Container id.
        container: String,
    },
    /// Starts to take an image, with nothing to be run. What has come is kept when the connection ends.
    BeginPush {
        /// The same for each attempt at the same image.
        push: String,
    },
    /// Starts to write a blob, where an earlier attempt has left off.
    OpenBlob(Blob),
    /// What is missing of that blob follows as a stream.
    BlobRest,
    /// Gives an image its name, when all of its blobs are there.
    NameImage(NewImage),
    /// Which of these blobs are not in the content store.
    MissingBlobs(Vec<Blob>),
    /// One blob; its bytes follow as a stream.
    PutBlob(Blob),
    /// The image's record and its unpacked layers.
    PutImage(ImageSpec),
    /// The container's record, snapshot and task, created and not started.
    PutContainer(Box<NewContainer>),
    /// Changes of the writable layer; they follow as a stream.
    PutLayer,
    /// The address, silent until the release.
    PutAddress {
        /// Which.
        cidr: Cidr,
        /// Packets for it wait; if not, they are dropped.
        queue: bool,
        /// The host may choose it for connections of its own once it is open.
        preferred: bool,
    },
    /// Leads the clients to this host, while the address is still silent here.
    Announce,
    /// Opens the store for the container's memory.
    OpenPages,
    /// The hashes of the pages in it; they follow the other way, as a stream before the reply.
    PageHashes,
    /// One round of memory; it follows as a stream.
    Pages,
    /// Pages that patches of images are made of; they follow as a stream.
    PutKnown,
    /// Images that are complete before the others; they follow as one stream, file after file.
    PutImages(Vec<ImageFile>),
    /// Starts a restore that waits for its images. What is read before the first of them follows as
    /// one stream, file after file.
    PrepareRestore {
        /// Those files.
        files: Vec<ImageFile>,
        /// Fast paths to take.
        fast: Vec<Fast>,
        /// Memory is served from the page store.
        lazy: bool,
        /// Files of the container that will be read in the pause.
        code: Vec<String>,
    },
    /// Restores and holds. The images that are left follow as one stream, file after file.
    Restore(Vec<ImageFile>),
    /// The commit: the container runs here from now on.
    Commit,
    /// Makes what was created permanent and forgets the migration. Can be repeated, by another
    /// agent too.
    Finish {
        /// Id of the migration.
        migration: String,
    },
    /// Undoes everything.
    Abort,
    /// What became of a migration whose driver or agent was lost. What was not committed is undone.
    Settle {
        /// Id of the migration.
        migration: String,
        /// Container id.
        container: String,
        /// The address that was to move.
        ip: Option<Cidr>,
        /// What `Begin` was answered with; empty when nothing was committed.
        epoch: String,
    },
}

/// Which containerd, and which namespace of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerdAddress {
    /// Path of the socket.
    pub(crate) socket: String,
    /// Namespace.
    pub(crate) namespace: String,
}

/// The image a container was made from.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ImageSpec {
    /// Name on the source.
    pub(crate) name: String,
    /// What the name stands for.
    pub(crate) target: Descriptor,
    /// Labels of the image record.
    pub(crate) labels: BTreeMap<String, String>,
    /// Where to unpack it.
    pub(crate) snapshotter: String,
    /// Chain id of the unpacked layers.
    pub(crate) chain: String,
}

/// An image to name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NewImage {
    /// Its name.
    pub(crate) name: String,
    /// What the name stands for.
    pub(crate) target: Descriptor,
    /// Labels of the image record.
    pub(crate) labels: BTreeMap<String, String>,
}

/// A container to create.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NewContainer {
    /// Its record on the source.
    pub(crate) record: ContainerRecord,
    /// Chain id of the image it is based on.
    pub(crate) chain: String,
    /// Whether the snapshot is writable.
    pub(crate) snapshot: SnapshotKind,
    /// Stdio of the task: each empty or a `file://` URI.
    pub(crate) stdio: Stdio,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageFile {
    /// Plain name.
    pub(crate) name: String,
    /// How much of it is sent, bytes.
    pub(crate) size: u64,
    /// What is sent is a patch of pages that are known: [`ferry_oci::pages::patch`].
    pub(crate) patch: bool,
}

impl ImageFile {
    /// A file that is sent as it is.
    pub(crate) fn whole(name: impl Into<String>, size: u64) -> Self {
        Self { name: name.into(), size, patch: false }
    }
}

/// What the agent answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// To `Hello`.
    Hello {
        /// [`ferry_oci::PROTOCOL`] of the agent.
        protocol: u32,
        /// Version of the agent's ferry.
        ferry: String,
    },
    /// To `DescribeHost`.
    Host(Box<HostFacts>),
    /// To `DescribeRoom`.
    Room(RoomFacts),
    /// To `MissingBlobs`.
    Missing(Vec<Blob>),
    /// To `OpenBlob`; `Done` if the blob is there.
    BlobAt {
        /// How many of its bytes are there.
        offset: u64,
    },
    /// To `Begin`.
    Begun {
        /// Differs after every start of this host.
        epoch: String,
    },
    /// To `PutAddress`.
    Address {
        /// Packets for it wait; if not, they are dropped.
        queued: bool,
    },
    /// To `OpenPages`.
    PageStore {
        /// Pages that an earlier attempt has left in it.
        pages: u64,
    },
    /// Done, nothing more to say.
    Done,
    /// To `Restore`: held.
    Held {
        /// Microseconds from the request until held.
        restore_us: u64,
    },
    /// To `Commit`: runs.
    Running {
        /// Microseconds from the request until the tasks run.
        release_us: u64,
        /// Microseconds for letting packets through and announcing the address.
        network_us: u64,
        /// Packets that had waited.
        packets: u64,
    },
    /// To `Settle`.
    Settled(Outcome),
    /// The request failed; unless it was `Commit`, nothing has been decided by it.
    Refused {
        /// The chain of causes, outermost first.
        error: String,
    },
}

/// Who has the container, as its destination knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// It runs, or ran, on the destination.
    Released,
    /// The destination does not run it, never did and never will; it is clean.
    NotHere,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_request_is_an_error_not_a_guess() {
        assert!(serde_json::from_str::<Request>(r#"{"Teleport":{}}"#).is_err());
        assert!(serde_json::from_str::<Request>("").is_err());
        assert!(serde_json::from_str::<Request>(r#"{"Hello":{"protocol":1}}"#).is_err());
    }

    #[test]
    fn an_address_in_a_request_is_checked_when_it_is_read() {
        let put = |cidr: &str| {
            let order = r#"{"PutAddress":{"cidr":"CIDR","queue":true,"preferred":false}}"#;
            serde_json::from_str::<Request>(&order.replace("CIDR", cidr))
        };
        assert!(put("10.0.0.1/24").is_ok() && put("fd00::5/64").is_ok());
        for bad in ["10.0.0.1/99", "fd00::5/129", "fe80::5/64"] {
            assert!(put(bad).is_err(), "{bad}");
        }
    }
}
