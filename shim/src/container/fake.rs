//! Containers of a runc that is a script, for tests: it can be stopped in any command.

use super::{Container, CreateRequest, ExecRequest};
use crate::containers::Containers;
use crate::events::Events;
use crate::io::Stdio;
use crate::options::TaskOptions;
use crate::reaper::tests::with_reaper;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::sleep;

/// Its processes sleep. A command waits as long as there is a file that says so.
const RUNC: &str = r#"#!/bin/sh
root=$2 here=${0%/*}
shift 6
verb=$1
shift
if [ -e $here/stop-$verb ]; then
    echo $$ >$here/stopped-$verb
    while [ -e $here/stop-$verb ]; do sleep 0.01; done
    read outcome <$here/outcome
    [ $outcome = succeed ] || exit 1
fi
for last; do :; done
case $verb in
create | exec)
    mkdir -p $root/$last
    while [ "$1" != --pid-file ]; do shift; done
    sleep 1000 &
    echo $! >>$root/$last/pids
    echo $! >$2
    ;;
delete)
    kill -9 $(cat $root/$last/pids)
    rm -r $root/$last
    ;;
esac
"#;

const NAMESPACE: &str = "test";

/// A shim's containers.
pub(crate) struct Fake {
    pub(crate) containers: Arc<Containers>,
    folder: TempDir,
    ended: Arc<AtomicBool>,
}

/// Runs `test`.
pub(crate) fn with<F: Future<Output = ()>>(test: impl FnOnce(Fake) -> F) {
    with_reaper(|reaper| {
        let folder = tempfile::tempdir().unwrap();
        let runc = folder.path().join("runc");
        std::fs::write(&runc, RUNC).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&runc, executable).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let end = move || end.store(true, Ordering::Release);
        let events = Arc::new(Events::start("/nobody/listens", NAMESPACE));
        let containers = Containers::new(NAMESPACE, reaper, events, end);
        test(Fake { containers, folder, ended })
    });
}

impl Fake {
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What makes a container, whose bundle is made here.
    pub(crate) fn request(&self, id: &str) -> CreateRequest {
        let bundle = self.path("bundles").join(id);
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::write(bundle.join("config.json"), "{}").unwrap();
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        CreateRequest {
            id: id.to_owned(),
            bundle,
            rootfs: Vec::new(),
            stdio: Stdio::default(),
            options: TaskOptions {
                binary_name: text(self.path("runc")),
                root: text(self.path("root")),
                ..Default::default()
            },
            checkpoint: None,
        }
    }

    /// A container with a process, and with an exec `exec` that is still to be started.
    pub(crate) async fn with_exec(&self, id: &str, exec: &str) -> Arc<Container> {
        let container = self.containers.create(self.request(id)).await.unwrap();
        container.start().await.unwrap();
        let (exec_id, stdio, process) = (exec.to_owned(), Stdio::default(), b"{}".to_vec());
        container.exec(ExecRequest { exec_id, stdio, process }).await.unwrap();
        container
    }

    /// From now on runc stops when it is asked for `verb`.
    pub(crate) fn stop_at(&self, verb: &str) {
        std::fs::write(self.path(format!("stop-{verb}")), "").unwrap();
    }

    /// Waits until it stands there.
    pub(crate) async fn until_stopped(&self, verb: &str) {
        while !self.path(format!("stopped-{verb}")).exists() {
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Lets it `succeed` or `fail`, and does not stop it again.
    pub(crate) fn go_on(&self, verb: &str, outcome: &str) {
        std::fs::write(self.path("outcome"), outcome).unwrap();
        std::fs::remove_file(self.path(format!("stopped-{verb}"))).unwrap();
        std::fs::remove_file(self.path(format!("stop-{verb}"))).unwrap();
    }

    /// Whether runc has container `id`.
    pub(crate) fn runs(&self, id: &str) -> bool {
        self.path("root").join(NAMESPACE).join(id).exists()
    }

    /// Whether the shim has been told to end.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let states = std::fs::read_dir(self.path("root").join(NAMESPACE)).into_iter().flatten();
        for state in states.flatten() {
            let pids = std::fs::read_to_string(state.path().join("pids")).unwrap_or_default();
            for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}
