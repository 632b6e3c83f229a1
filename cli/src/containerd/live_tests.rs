//! From one running containerd to another. `FERRY_TEST_CONTAINERD` holds the two sockets, separated by a
//! comma; the first has a container `live` with a task, the second has not its image.

mod hosts;

use std::time::Duration;

use super::*;
use hosts::{Hosts, ID, collect, hosts, state};

async fn copy_blobs(hosts: &Hosts, to: &Destination, blobs: &[Blob]) {
    for blob in to.missing(blobs).await.unwrap() {
        let Some(mut writer) = to.write_blob(&blob).await.unwrap() else {
            continue;
        };
        let mut reader = hosts.a.read_blob(&blob.digest, writer.offset()).await.unwrap();
        while let Some(chunk) = reader.chunk().await.unwrap() {
            writer.write(&chunk).await.unwrap();
        }
        writer.commit().await.unwrap();
    }
    assert_eq!(to.missing(blobs).await.unwrap(), vec![]);
}

/// What a migration does up to the restore, without the layer.
async fn receive(hosts: &Hosts, migration: &str) -> Destination {
    let mut record =
        hosts.a.container(ID).await.unwrap().expect("container live on the first host");
    let image = hosts.a.image(&record.image).await.unwrap().unwrap();
    let content = hosts.a.image_content(&image.target, None).await.unwrap();
    let layer = hosts.a.writable_layer(&record, content.chain_id()).await.unwrap();
    assert!(layer.upperdir.unwrap().is_absolute());
    let stdio = hosts.a.task(ID).await.unwrap().unwrap();
    assert!(stdio.pid > 0 && stdio.status == TaskStatus::Running);

    let to = hosts.b.destination(migration).unwrap();
    to.create_lease().await.unwrap();
    to.create_lease().await.unwrap();
    copy_blobs(hosts, &to, &content.blobs).await;
    let name = to.create_image(&image.name, &image.target, &image.labels).await.unwrap();
    record.image = name.name;
    let (snapshotter, chain) = (&record.snapshotter, Some(content.chain_id()));
    let parent = to.unpack(&image.target, snapshotter, chain).await.unwrap();
    assert_eq!(parent, content.chain_id());
    assert_eq!(to.unpack(&image.target, snapshotter, chain).await.unwrap(), parent);
    collect(&hosts.b).await;
    let kind = layer.snapshot.kind;
    let mounts =
        to.prepare_snapshot(snapshotter, &record.snapshot_key, &parent, kind).await.unwrap();
    to.create_container(&record).await.unwrap();
    assert!(to.create_container(&record).await.unwrap_err().is_already_exists());
    let options = record.runtime_options.as_ref();
    let pid =
        to.create_task(ID, &mounts, &Stdio::default(), options, "/run/nowhere").await.unwrap();
    assert_eq!(pid, 0, "a task that waits for its restore has no process");
    let task = hosts.b.task(ID).await.unwrap().unwrap();
    assert_eq!(task.status, TaskStatus::Created);
    to
}

#[tokio::test]
async fn an_aborted_migration_leaves_nothing_on_either_host() {
    let Some(hosts) = hosts().await else { return };
    let (a, b) = (state(&hosts.a).await, state(&hosts.b).await);
    let to = receive(&hosts, "abort-1").await;
    // A blob that was written in part, by a migration that was killed.
    let big = Blob { digest: format!("sha256:{}", "0".repeat(64)), size: 9, ..Blob::default() };
    let mut writer = to.write_blob(&big).await.unwrap().unwrap();
    writer.write(b"part").await.unwrap();
    drop(writer);
    // Another process cleans up.
    let again = hosts.b.destination("abort-1").unwrap();
    let errors = again.cleanup().await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(state(&hosts.b).await, b);
    let errors = again.cleanup().await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(state(&hosts.a).await, a);
}

#[tokio::test]
async fn a_kept_container_survives_the_collector_and_can_be_retired() {
    let Some(hosts) = hosts().await else { return };
    let before = state(&hosts.b).await;
    let to = receive(&hosts, "keep-1").await;
    let marked = state(&hosts.b).await;
    for _ in 0..2 {
        let errors = to.keep().await;
        assert!(errors.is_empty(), "{errors:?}");
    }
    collect(&hosts.b).await;
    let kept = state(&hosts.b).await;
    assert!(kept.iter().all(|s| !s.contains(LABEL) && !s.contains("keep-1")), "{kept:#?}");
    // Nothing but the lease has gone.
    assert_eq!(kept.len(), marked.len() - 1, "{kept:#?}\n{marked:#?}");
    // An abort that comes too late by mistake finds nothing to destroy.
    assert!(to.cleanup().await.is_empty());
    collect(&hosts.b).await;
    assert_eq!(state(&hosts.b).await, kept);

    hosts.b.end_task(ID, Duration::from_secs(10)).await.unwrap();
    let image = hosts.b.container(ID).await.unwrap().unwrap().image;
    hosts.b.delete_source(ID).await.unwrap();
    hosts.b.delete_source(ID).await.unwrap();
    hosts.b.delete_image(&image, false).await.unwrap();
    collect(&hosts.b).await;
    assert_eq!(state(&hosts.b).await, before);
}

#[tokio::test]
async fn a_task_that_runs_is_killed_by_the_cleanup() {
    let Some(hosts) = hosts().await else { return };
    let before = state(&hosts.b).await;
    let to = receive(&hosts, "kill-1").await;
    hosts.b.delete_task(ID).await.unwrap();
    let record = hosts.b.container(ID).await.unwrap().unwrap();
    let mounts = hosts.b.snapshot_mounts(&record.snapshotter, &record.snapshot_key).await.unwrap();
    // Without a checkpoint it starts like any other.
    let pid = to.create_task(ID, &mounts, &Stdio::default(), None, "").await.unwrap();
    assert_eq!(to.start_task(ID).await.unwrap(), pid);
    let refused = hosts.b.delete_task(ID).await.unwrap_err();
    assert!(matches!(refused, Error::Call { .. }), "{refused:?}");
    assert!(hosts.b.delete_source(ID).await.is_err(), "what runs is not deleted");
    let errors = to.cleanup().await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(state(&hosts.b).await, before);
}

#[tokio::test]
async fn two_migrations_of_one_image_do_not_take_it_from_each_other() {
    let Some(hosts) = hosts().await else { return };
    let before = state(&hosts.b).await;
    let first = receive(&hosts, "first").await;
    let second = hosts.b.destination("second").unwrap();
    second.create_lease().await.unwrap();
    let record = hosts.a.container(ID).await.unwrap().unwrap();
    let image = hosts.a.image(&record.image).await.unwrap().unwrap();
    let content = hosts.a.image_content(&image.target, None).await.unwrap();
    assert_eq!(second.missing(&content.blobs).await.unwrap(), vec![]);
    let name = second.create_image(&image.name, &image.target, &image.labels).await.unwrap();
    assert_eq!(name, ImageName { name: image.name.clone(), created: false });
    second.unpack(&image.target, &record.snapshotter, None).await.unwrap();
    assert!(first.cleanup().await.is_empty());
    let there = hosts.b.image_content(&image.target, None).await.unwrap();
    assert_eq!(there.blobs.len(), content.blobs.len());
    assert!(hosts.b.image(&image.name).await.unwrap().is_some());
    assert!(hosts.b.snapshot("overlayfs", there.chain_id()).await.unwrap().is_some());
    assert!(second.cleanup().await.is_empty());
    assert_eq!(state(&hosts.b).await, before);
}

#[tokio::test]
async fn a_blob_is_resumed_refused_when_wrong_and_found_when_there() {
    let Some(hosts) = hosts().await else { return };
    let before = state(&hosts.b).await;
    let to = hosts.b.destination("blobs").unwrap();
    to.create_lease().await.unwrap();
    let text = b"a small blob";
    let digest = {
        use sha2::Digest as _;
        let digest = sha2::Sha256::digest(text);
        digest.iter().fold("sha256:".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
    };
    let blob = Blob { digest: digest.clone(), size: text.len() as u64, ..Blob::default() };

    let mut writer = to.write_blob(&blob).await.unwrap().unwrap();
    assert_eq!(writer.offset(), 0);
    writer.write(&text[..5]).await.unwrap();
    drop(writer);
    // The store lets go of the write when it notices that the other end has gone.
    let mut writer = loop {
        match to.write_blob(&blob).await {
            Ok(writer) => break writer.unwrap(),
            Err(error) => assert!(error.to_string().contains("locked"), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(writer.offset(), 5);
    assert!(writer.write(b"much more than that").await.is_err());
    writer.write(b"wrong!!").await.unwrap();
    assert!(matches!(writer.commit().await, Err(Error::Call { .. })));

    let mut writer = to.write_blob(&blob).await.unwrap().unwrap();
    writer.restart();
    writer.write(text).await.unwrap();
    writer.commit().await.unwrap();
    assert!(to.write_blob(&blob).await.unwrap().is_none());
    assert_eq!(hosts.b.read_small_blob(&digest, 100).await.unwrap(), text);
    assert!(hosts.b.read_small_blob(&digest, 5).await.is_err());
    assert!(to.cleanup().await.is_empty());
    assert_eq!(state(&hosts.b).await, before);
}

#[tokio::test]
async fn a_name_that_another_image_has_is_left_to_it() {
    let Some(hosts) = hosts().await else { return };
    let before = state(&hosts.b).await;
    let image = |c: &str| Descriptor {
        digest: format!("sha256:{}", c.repeat(64)),
        size: 1,
        media_type: "x".into(),
    };
    let (theirs, ours) =
        (hosts.b.destination("theirs").unwrap(), hosts.b.destination("ours").unwrap());
    for to in [&theirs, &ours] {
        to.create_lease().await.unwrap();
    }
    let name = "docker.io/library/taken:1";
    let none = Default::default();
    theirs.create_image(name, &image("1"), &none).await.unwrap();
    for created in [true, false] {
        let got = ours.create_image(name, &image("2"), &none).await.unwrap();
        let with_digest = format!("{name}@{}", image("2").digest);
        assert_eq!(got, ImageName { name: with_digest, created });
    }
    assert!(ours.cleanup().await.is_empty());
    assert_eq!(hosts.b.image(name).await.unwrap().unwrap().target.digest, image("1").digest);
    assert!(theirs.cleanup().await.is_empty());
    assert_eq!(state(&hosts.b).await, before);
}

#[tokio::test]
async fn what_is_wrong_with_an_image_is_named() {
    let Some(hosts) = hosts().await else { return };
    let record = hosts.a.container(ID).await.unwrap().unwrap();
    let other = format!("sha256:{}", "1".repeat(64));
    let result = hosts.a.writable_layer(&record, &other).await;
    assert!(matches!(result, Err(Error::NotBasedOnImage { .. })), "{result:?}");
    let plain = ContainerRecord { snapshot_key: String::new(), ..record.clone() };
    assert!(matches!(hosts.a.writable_layer(&plain, &other).await, Err(Error::RootFs(_))));
    let image = hosts.a.image(&record.image).await.unwrap().unwrap();
    let gone = Descriptor { digest: other, ..image.target };
    let result = hosts.a.image_content(&gone, None).await;
    assert!(matches!(result, Err(Error::MissingBlob { .. })), "{result:?}");
    assert!(hosts.a.image("no/such:image").await.unwrap().is_none());
    assert!(hosts.a.container("no-such").await.unwrap().is_none());
    assert!(hosts.a.task("no-such").await.unwrap().is_none());
    assert!(hosts.a.snapshotters().await.unwrap().contains(&"overlayfs".to_owned()));
    assert!(hosts.a.version().await.unwrap().starts_with(|c: char| c.is_ascii_digit()));
    let nobody = Containerd::connect("/run/no/such.sock", "default").await;
    assert!(matches!(nobody, Err(Error::Connect { .. })));
}
