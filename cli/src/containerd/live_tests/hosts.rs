//! The two containerds, and all that a migration could leave in one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::ListSnapshotsRequest;
use containerd_client::services::v1::{ListContentRequest, ListRequest, ListStatusesRequest};
use tokio::sync::{Mutex, MutexGuard};

use crate::containerd::Containerd;
use crate::containerd::client::QUICK;

pub(super) const ID: &str = "live";
/// The tests use the same two hosts.
static HOSTS: Mutex<()> = Mutex::const_new(());

pub(super) struct Hosts {
    pub(super) a: Containerd,
    pub(super) b: Containerd,
    _alone: MutexGuard<'static, ()>,
}

pub(super) async fn hosts() -> Option<Hosts> {
    let Ok(sockets) = std::env::var("FERRY_TEST_CONTAINERD") else {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("a test");
        // Not eprintln: the test runner would keep that to itself.
        let _ = writeln!(std::io::stderr(), "\nskipped: {name}: FERRY_TEST_CONTAINERD is not set");
        return None;
    };
    let alone = HOSTS.lock().await;
    let (a, b) = sockets.split_once(',').expect("two sockets");
    let a = Containerd::connect(a, "default").await.unwrap();
    let b = Containerd::connect(b, "default").await.unwrap();
    Some(Hosts { a, b, _alone: alone })
}

/// Everything that a migration could leave behind, and the labels of what was there before.
pub(super) async fn state(c: &Containerd) -> BTreeSet<String> {
    let mut state = BTreeSet::new();
    for container in c.list_containers(None).await.unwrap() {
        state.insert(format!("container {} {:?}", container.id, container.labels));
    }
    for image in c.list_images().await.unwrap() {
        state.insert(format!("image {} {} {:?}", image.name, image.target.digest, image.labels));
    }
    let all = ListContentRequest { filters: Vec::new() };
    let mut blobs = c.contents().list(c.request(all, QUICK)).await.unwrap().into_inner();
    while let Some(message) = blobs.message().await.unwrap() {
        for info in message.info {
            state.insert(format!("blob {} {:?}", info.digest, sorted(info.labels)));
        }
    }
    let all = ListSnapshotsRequest { snapshotter: "overlayfs".into(), filters: Vec::new() };
    let mut list = c.snapshots().list(c.request(all, QUICK)).await.unwrap().into_inner();
    while let Some(message) = list.message().await.unwrap() {
        for info in message.info {
            let labels = sorted(info.labels);
            state.insert(format!("snapshot {} on {} {labels:?}", info.name, info.parent));
        }
    }
    let all = ListStatusesRequest { filters: Vec::new() };
    let ingests = c.contents().list_statuses(c.request(all, QUICK)).await.unwrap().into_inner();
    state.extend(ingests.statuses.into_iter().map(|s| format!("ingest {}", s.r#ref)));
    let all = ListRequest { filters: Vec::new() };
    let mut leases = LeasesClient::new(c.channel());
    let leases = leases.list(c.request(all, QUICK)).await.unwrap().into_inner();
    state.extend(leases.leases.into_iter().map(|l| format!("lease {}", l.id)));
    state
}

fn sorted(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}

/// Lets the garbage collector run to its end.
pub(super) async fn collect(c: &Containerd) {
    let lease = c.destination("collector").unwrap();
    lease.create_lease().await.unwrap();
    lease.delete_lease(true).await.unwrap();
}
