//! Tells containerd when a container has run out of memory.
//!
//! On v1 the kernel signals an eventfd before it kills, on v2 it changes `memory.events`. Both are
//! looked at once more when a process has ended, so that the event comes before that of its exit.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use containerd_shim::protos::events::task::TaskOOM;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::Cgroup;
use super::files::KeyValues;
use crate::error::{Context as _, Result};
use crate::events::Events;

/// Watches one container until it is dropped.
pub(crate) struct Watch {
    source: Arc<Source>,
    task: AbortHandle,
}

/// Where the kernel tells it.
struct Source {
    id: String,
    events: Arc<Events>,
    kernel: AsyncFd<OwnedFd>,
    /// What has been told already, and the turn to look.
    kind: Mutex<Kind>,
}

enum Kind {
    /// The memory cgroup: its end is signalled too.
    V1 { folder: PathBuf },
    /// `memory.events`, and the kills that it had counted when it was last looked at.
    V2 { events: PathBuf, kills: u64 },
}

impl Watch {
    /// Watches the container `id`. None if its memory is not counted.
    pub(crate) fn start(id: &str, cgroup: &Cgroup, events: Arc<Events>) -> Result<Option<Self>> {
        let Some((kernel, kind)) = open(cgroup)? else { return Ok(None) };
        let kernel = watched(kernel).context("watch the memory cgroup")?;
        let kind = Mutex::new(kind);
        let source = Arc::new(Source { id: id.to_string(), events, kernel, kind });
        let watched = source.clone();
        let task = tokio::spawn(async move {
            while let Ok(mut ready) = watched.kernel.readable().await {
                ready.clear_ready();
                watched.look();
            }
        });
        Ok(Some(Self { source, task: task.abort_handle() }))
    }

    /// Sends the event if there is reason to and it has not been sent. When it returns, all that
    /// happened before the call has been told.
    pub(crate) fn look(&self) {
        self.source.look();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Source {
    fn look(&self) {
        let mut kind = self.kind.lock().unwrap_or_else(PoisonError::into_inner);
        if kind.has_happened(&self.kernel) {
            log::info!("{} has run out of memory", self.id);
            let container_id = self.id.clone();
            self.events.send(TaskOOM { container_id, ..Default::default() });
        }
    }
}

impl Kind {
    /// Whether memory has run out since the last call.
    fn has_happened(&mut self, kernel: &AsyncFd<OwnedFd>) -> bool {
        let signalled = drain(kernel.get_ref());
        match self {
            Self::V1 { folder } => signalled && folder.exists(),
            Self::V2 { events, kills } => {
                let now = KeyValues::read(events).map(|events| events.get("oom_kill"));
                let before = *kills;
                *kills = now.unwrap_or(before);
                *kills > before
            }
        }
    }
}

/// Reads all that `kernel` has; whether there was something.
fn drain(kernel: &OwnedFd) -> bool {
    let mut bytes = [0; 4096];
    let mut some = false;
    while nix::unistd::read(kernel, &mut bytes).is_ok_and(|count| count > 0) {
        some = true;
    }
    some
}

// One call.
#[allow(unsafe_code)]
fn watched(kernel: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor as long as it lives.
    unsafe { AsyncFd::register(kernel) }.map_err(Into::into)
}

fn open(cgroup: &Cgroup) -> Result<Option<(OwnedFd, Kind)>> {
    match cgroup {
        Cgroup::V1(members) => {
            let memory = members.iter().find(|member| member.has("memory"));
            memory.map(|memory| open_v1(&memory.folder)).transpose()
        }
        Cgroup::V2(folder) => {
            let events = folder.join("memory.events");
            if events.exists() { open_v2(events).map(Some) } else { Ok(None) }
        }
    }
}

fn open_v1(folder: &Path) -> Result<(OwnedFd, Kind)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event = EventFd::from_value_and_flags(0, flags).context("make an eventfd")?;
    let control = File::open(folder.join("memory.oom_control")).context("open the OOM control")?;
    let order = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
    std::fs::write(folder.join("cgroup.event_control"), order).context("ask for OOM events")?;
    Ok((event.into(), Kind::V1 { folder: folder.to_owned() }))
}

fn open_v2(events: PathBuf) -> Result<(OwnedFd, Kind)> {
    let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
    let inotify = Inotify::init(flags).context("watch memory.events")?;
    inotify.add_watch(&events, AddWatchFlags::IN_MODIFY).context("watch memory.events")?;
    Ok((inotify.into(), Kind::V2 { events, kills: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_kill_on_v2_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let events = dir.path().join("memory.events");
        std::fs::write(&events, "oom 0\noom_kill 0\n").unwrap();
        let (kernel, mut kind) = open_v2(events.clone()).unwrap();
        let kernel = watched(kernel).unwrap();
        assert!(!kind.has_happened(&kernel));
        std::fs::write(&events, "oom 1\noom_kill 2\n").unwrap();
        let wait = std::time::Duration::from_secs(20);
        tokio::time::timeout(wait, kernel.readable()).await.unwrap().unwrap().clear_ready();
        assert!(kind.has_happened(&kernel));
        assert!(!kind.has_happened(&kernel));
        std::fs::write(&events, "oom 2\noom_kill 3\n").unwrap();
        assert!(kind.has_happened(&kernel));
        // With the container its cgroup goes.
        std::fs::remove_file(&events).unwrap();
        assert!(!kind.has_happened(&kernel));
    }

    #[tokio::test]
    async fn the_end_of_a_v1_cgroup_is_no_event() {
        let dir = tempfile::tempdir().unwrap();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(1, flags).unwrap();
        let kernel = watched(OwnedFd::from(event)).unwrap();
        let mut kind = Kind::V1 { folder: dir.path().to_owned() };
        assert!(kind.has_happened(&kernel), "it was signalled");
        assert!(!kind.has_happened(&kernel), "it was told");
        let event = EventFd::from_value_and_flags(1, flags).unwrap();
        let kernel = watched(OwnedFd::from(event)).unwrap();
        drop(dir);
        assert!(!kind.has_happened(&kernel), "the cgroup is gone");
    }

    #[test]
    fn a_container_whose_memory_is_not_counted_is_not_watched() {
        assert!(open(&Cgroup::V1(vec![])).unwrap().is_none());
        assert!(open(&Cgroup::V2("/nowhere".into())).unwrap().is_none());
    }
}
