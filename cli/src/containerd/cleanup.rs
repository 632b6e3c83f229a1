//! The three ways a migration ends for containerd: undone at the destination, kept there, and retired
//! at the source.

use std::collections::BTreeSet;
use std::time::Duration;

use containerd_client::services::v1::{Info, ListContentRequest};

use super::LABEL;
use super::client::{Containerd, Destination, QUICK};
use super::error::{Doing, Error, Found, Result};
use super::images::owns;
use super::unpack::GC_REF_SNAPSHOT;

/// How long the processes of a task may take to die of SIGKILL. Longer than a write to a slow disk.
const PATIENCE: Duration = Duration::from_secs(20);

impl Destination {
    /// Removes everything that this migration has created here, which need not be complete: containers
    /// with their tasks, snapshots, image names, unfinished blobs, the lease, and with it blobs and layers that
    /// nothing else uses. Called again it does no harm; called **after the commit it destroys the
    /// container**, for which [`Destination::keep`] is right.
    ///
    /// Stops at a task that does not end; goes on after other errors and gives all of them. None:
    /// nothing is left.
    #[must_use]
    pub(crate) async fn cleanup(&self) -> Vec<Error> {
        let mut errors = Errors::default();
        let mark = (LABEL, self.migration.as_str());
        let mut snapshotters: BTreeSet<String> =
            errors.take(self.covered_snapshotters().await).into_iter().collect();
        snapshotters.insert("overlayfs".into());

        for container in errors.take(self.plain.list_containers(Some(mark)).await) {
            snapshotters.extend(Some(container.snapshotter).filter(|s| !s.is_empty()));
            errors.take(self.plain.end_task(&container.id, PATIENCE).await);
            // It may still run: nothing is taken away from under it.
            if !errors.0.is_empty() {
                return errors.0;
            }
            errors.take(self.plain.delete_container(&container.id).await);
        }
        for snapshotter in &snapshotters {
            for snapshot in errors.take(self.marked_snapshots(snapshotter).await) {
                errors.take(self.plain.remove_snapshot(snapshotter, &snapshot).await);
            }
        }
        for image in errors.take(self.plain.list_images().await) {
            let Some(owners) = image.labels.get(LABEL).filter(|o| owns(o, &self.migration)) else {
                continue;
            };
            let others: Vec<&str> = owners.split(',').filter(|o| *o != self.migration).collect();
            errors.take(match others.is_empty() {
                true => self.plain.delete_image(&image.name, false).await,
                false => self.plain.label_image(&image, LABEL, &others.join(",")).await,
            });
        }
        errors.take(self.unmark_content(true).await);
        errors.take(self.abort_ingests().await);
        errors.take(self.delete_lease(true).await);
        errors.0
    }

    /// Makes everything that this migration has created permanent: the marks and the lease go. To be
    /// called after the commit; called again it does no harm.
    ///
    /// Goes on after an error; gives all of them.
    #[must_use]
    pub(crate) async fn keep(&self) -> Vec<Error> {
        let mut errors = Errors::default();
        let mark = (LABEL, self.migration.as_str());
        let mut snapshotters: BTreeSet<String> =
            errors.take(self.covered_snapshotters().await).into_iter().collect();
        for container in errors.take(self.plain.list_containers(Some(mark)).await) {
            snapshotters.extend(Some(container.snapshotter).filter(|s| !s.is_empty()));
            errors.take(self.plain.unlabel_container(&container.id, LABEL).await);
        }
        for snapshotter in &snapshotters {
            for snapshot in errors.take(self.marked_snapshots(snapshotter).await) {
                errors.take(self.plain.unlabel_snapshot(snapshotter, &snapshot, LABEL).await);
            }
        }
        for image in errors.take(self.plain.list_images().await) {
            // Also where others are named: from now on the image stays, whatever becomes of them.
            if image.labels.get(LABEL).is_some_and(|o| owns(o, &self.migration)) {
                errors.take(self.plain.label_image(&image, LABEL, "").await);
            }
        }
        errors.take(self.unmark_content(false).await);
        // Last: until here the lease, too, keeps what the marks are taken off.
        if errors.0.is_empty() {
            errors.take(self.delete_lease(false).await);
        }
        errors.0
    }

    async fn marked_snapshots(&self, snapshotter: &str) -> Result<Vec<String>> {
        let mark = (LABEL, self.migration.as_str());
        let found = self.plain.labelled_snapshots(snapshotter, mark).await;
        // A host without this snapshotter has no snapshots of it.
        let found = match found {
            Err(Error::Call { message, .. }) if message.contains("not loaded") => None,
            other => other.found()?,
        };
        Ok(found.unwrap_or_default().into_iter().map(|s| s.key).collect())
    }

    /// Takes this migration's mark off blobs; with `undo` also the references to snapshots that came with it.
    async fn unmark_content(&self, undo: bool) -> Result<()> {
        for info in self.plain.marked_content(&self.migration).await? {
            let ours = |k: &String| k == LABEL || undo && k.starts_with(GC_REF_SNAPSHOT);
            let gone = info.labels.into_keys().filter(ours).map(|k| (k, String::new()));
            self.plain.label_blob(&info.digest, gone).await.found()?;
        }
        Ok(())
    }
}

impl Containerd {
    /// Deletes a task that has ended. A client in the foreground (`ctr run`) deletes it too when it
    /// hears of the end: whichever is second meets a task, or a shim, that is going.
    async fn delete_ended_task(&self, id: &str) -> Result<()> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let Err(error) = self.delete_task(id).await else { return Ok(()) };
            if let Ok(None) = self.task(id).await {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Deletes a container that has moved away: its task, which must have ended, its record and its
    /// snapshot. The image stays. What is not there is fine.
    ///
    /// # Errors
    /// [`Error::Call`], also while the task runs: then nothing is deleted.
    pub(crate) async fn delete_source(&self, id: &str) -> Result<()> {
        let record = self.container(id).await?;
        self.delete_ended_task(id).await?;
        self.delete_container(id).await?;
        match record {
            Some(r) if !r.snapshot_key.is_empty() => {
                self.remove_snapshot(&r.snapshotter, &r.snapshot_key).await
            }
            _ => Ok(()),
        }
    }

    async fn marked_content(&self, migration: &str) -> Result<Vec<Info>> {
        let doing = || "list blobs".to_owned();
        let request =
            ListContentRequest { filters: vec![format!("labels.{LABEL:?}=={migration:?}")] };
        let answer = self.contents().list(self.request(request, QUICK)).await;
        let mut stream = answer.doing(doing)?.into_inner();
        let mut found = Vec::new();
        while let Some(message) = stream.message().await.doing(doing)? {
            found.extend(message.info);
        }
        Ok(found)
    }
}

/// Errors collected on the way.
#[derive(Default)]
struct Errors(Vec<Error>);

impl Errors {
    fn take<T: Default>(&mut self, result: Result<T>) -> T {
        result.unwrap_or_else(|error| {
            self.0.push(error);
            T::default()
        })
    }
}
