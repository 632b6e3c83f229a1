//! Dumping a container.

use super::predump::{Chain, OnTop};
use super::silent::blocking;
use super::unfinished::{Unfinished, begin_anew};
use super::{Container, Silent, silent};
use crate::error::{Context as _, Error, Result};
use crate::options;
use crate::rules::{self, DUMP_LOG, Note};
use crate::state::{Op, admit};
use containerd_shim::protos::events::task::TaskCheckpointed;
use containerd_shim::protos::shim::oci::CheckpointOptions;
use ferry_oci::criu::{self, CONFIG_ENV, Config, DumpOptions, DumpRecord, NetworkLock};
use ferry_oci::pages::areas::is_being_filled;
use ferry_oci::runc::Checkpoint;
use ferry_oci::{cgroups, sockets};
use log::warn;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// How long a dump asked for through the Task API may take. It is long because ending CRIU in the
/// middle of a dump leaves its parasite in the tasks.
const DEADLINE: Duration = Duration::from_secs(600);

/// Annotation of a container: `false` has its checkpoints end established TCP connections, which are
/// kept by default.
const OPEN_TCP: &str = "io.ferry.open-tcp";

/// A dump.
pub(crate) struct CheckpointParams {
    /// Folder for the images, made if missing.
    pub(crate) images: PathBuf,
    /// Folder for CRIU's log and statistics, made if missing.
    pub(crate) work: PathBuf,
    /// Keep the container: running, or frozen if it was.
    pub(crate) leave_running: bool,
    /// What is written down beside the images and replayed at restore.
    pub(crate) options: DumpOptions,
    /// Further lines for CRIU's configuration file.
    pub(crate) extra: Vec<String>,
    /// After it, runc and CRIU are killed.
    pub(crate) deadline: Duration,
    /// The pre-dump to build on: the last one.
    pub(crate) parent: Option<PathBuf>,
}

impl Container {
    /// The Task API's Checkpoint.
    pub(crate) async fn checkpoint_task(
        &self,
        path: &str,
        options: CheckpointOptions,
    ) -> Result<()> {
        self.admit(Op::Checkpoint)?;
        let images = match options.image_path.as_str() {
            "" => path,
            image_path => image_path,
        };
        if images.is_empty() {
            return Err(Error::invalid_argument("no path for the images is given"));
        }
        let own_work = options.work_path.is_empty();
        let work = match own_work {
            true => self.work_dir().join("dump"),
            false => options.work_path.clone().into(),
        };
        let unfinished = Unfinished::of(Path::new(images));
        let params = CheckpointParams {
            images: images.into(),
            work: work.clone(),
            leave_running: !options.exit,
            parent: parent_of(&options, Path::new(images))?,
            options: self.dump_options(options)?,
            extra: Vec::new(),
            deadline: DEADLINE,
        };
        let done = self.checkpoint(params).await;
        if done.is_err() {
            unfinished.remove();
        }
        if own_work && let Err(err) = std::fs::remove_dir_all(&work) {
            warn!("remove {}: {err}", work.display());
        }
        done
    }

    /// What a dump with these options does.
    pub(crate) fn dump_options(&self, options: CheckpointOptions) -> Result<DumpOptions> {
        let spec = self.spec()?;
        let annotations = spec.annotations().as_ref();
        let open_tcp = annotations.and_then(|all| all.get(OPEN_TCP)).map(String::as_str);
        match open_tcp {
            None | Some("true") => Ok(dump_options(options, true)),
            Some("false") => Ok(dump_options(options, false)),
            Some(other) => {
                let text = format!("the annotation {OPEN_TCP} is {other:?}: say true or false");
                Err(Error::invalid_argument(text))
            }
        }
    }

    /// Dumps the container, which runs or is frozen. If its tasks are not kept, their connections stay
    /// silent until a restore, see [`silent`]. If it fails, the container is as it was,
    /// CRIU's own network lock is gone, and CRIU's log is in the bundle as criu-dump.log.
    pub(crate) async fn checkpoint(&self, mut params: CheckpointParams) -> Result<()> {
        let _op = self.op.write().await;
        admit(self.snapshot().status, Op::Checkpoint)?;
        self.must_be_filled().await?;
        self.refuse_stopped()?;
        for folder in [&params.images, &params.work] {
            std::fs::create_dir_all(folder)
                .context(format!("make the folder {}", folder.display()))?;
        }
        // Asked once and kept: not while it stands still.
        self.runtime.version().await;
        let on_top = self.prepare_on_top(&params).await?;
        let chain = self.take_pre_dumps(params.parent.as_deref()).await?;
        let _note = Note::of_work(&self.bundle, &params.work)?;
        begin_anew(&params.images).context("replace the dump that is there")?;
        let silent = match params.leave_running {
            true => self.stand_still().await?,
            false => self.fall_silent(&mut params.options).await?,
        };
        if let Some(chain) = chain {
            return self.checkpoint_on_top(params, chain, &on_top, silent).await;
        }
        let mut done = Ok(());
        if !params.leave_running {
            // First without CRIU's version: of what has ended nothing may be lost that its restore needs.
            done = self.write_record(&params, String::new()).await;
        }
        if done.is_ok() {
            done = self.dump(&params, &[], None).await;
        }
        if let Err(err) = done {
            let err = self.dump_failed(err, &params.work).await;
            silent::speak(silent).await;
            return Err(err);
        }
        match silent {
            silent if params.leave_running => silent::speak(silent).await,
            // What has ended stays silent.
            silent => silent.into_iter().for_each(Silent::keep),
        }
        let criu = criu::version(&params.work.join(DUMP_LOG)).ok().flatten();
        match self.write_record(&params, criu.unwrap_or_default()).await {
            Err(err) if params.leave_running => return Err(err),
            // The first one is there.
            Err(err) => warn!("{err}"),
            Ok(()) => {}
        }
        self.checkpointed(&params.images);
        Ok(())
    }

    /// [`Self::checkpoint`] on top of pre-dumps: tasks that are to end do so when the images are complete.
    async fn checkpoint_on_top(
        &self,
        params: CheckpointParams,
        chain: Chain,
        on_top: &OnTop,
        mut silent: Option<Silent>,
    ) -> Result<()> {
        if silent.is_none() {
            silent = self.stand_still().await?;
        }
        let exit = !params.leave_running;
        let params = CheckpointParams { leave_running: true, ..params };
        let left = match self.dump_on_top(&params, chain, on_top).await {
            Ok(left) => left,
            Err(err) => {
                let err = self.dump_failed(err, &params.work).await;
                silent::speak(silent).await;
                self.end_pre_dumps().await;
                return Err(err);
            }
        };
        if !exit {
            silent::speak(silent.take()).await;
        }
        let done = async {
            let criu = criu::version(&params.work.join(DUMP_LOG)).ok().flatten();
            self.write_record(&params, criu.unwrap_or_default()).await?;
            if let Some(chain) = left {
                self.complete_on(chain, &params.images, false).await?;
            }
            if exit { self.end_frozen().await } else { Ok(()) }
        };
        if let Err(err) = done.await {
            silent::speak(silent).await;
            return Err(err);
        }
        silent.into_iter().for_each(Silent::keep);
        self.checkpointed(&params.images);
        Ok(())
    }

    /// Refuses a dump while pages are still on their way here: it would take them for zeros.
    pub(crate) async fn must_be_filled(&self) -> Result<()> {
        for pid in self.pids().await? {
            // One that has ended needs no memory.
            if is_being_filled(pid.cast_signed()).unwrap_or_default() {
                let text = format!(
                    "memory of process {pid} is still being filled: try again when ferry status no \
                     longer lists it"
                );
                return Err(Error::failed_precondition(text));
            }
        }
        Ok(())
    }

    /// Keeps CRIU's log, removes its lock, and says what it said.
    pub(super) async fn dump_failed(&self, err: Error, work: &Path) -> Error {
        let log = work.join(DUMP_LOG);
        let err = explain(err, "dump", &log);
        if let Err(err) = std::fs::copy(&log, self.bundle.join("criu-dump.log")) {
            warn!("keep CRIU's log: {err}");
        }
        self.free_connections(work, false).await;
        err
    }

    /// Writes down beside the images how they are made, and by which version of CRIU.
    pub(super) async fn write_record(&self, params: &CheckpointParams, criu: String) -> Result<()> {
        let runc = self.runtime.version().await.to_string();
        let record = DumpRecord::new(params.options.clone(), criu, runc);
        record.write(&params.images).context("write down how the images are made")
    }

    pub(super) fn checkpointed(&self, images: &Path) {
        self.events.send(TaskCheckpointed {
            container_id: self.id.clone(),
            checkpoint: images.to_string_lossy().into_owned(),
            ..Default::default()
        });
    }

    /// Dumps, with `env` added to runc's environment, on top of the dump in `parent`, a path relative to the
    /// images.
    pub(super) async fn dump(
        &self,
        params: &CheckpointParams,
        env: &[(&'static str, PathBuf)],
        parent: Option<&str>,
    ) -> Result<()> {
        let config = Config {
            tcp_established: params.options.tcp_established,
            network_lock: params.options.network_lock,
            action_script: None,
            extra: params.extra.clone(),
        };
        let config = config.write(&params.work).context("write CRIU's configuration")?;
        let verb = Checkpoint { parent_path: parent, ..verb(&self.id, params)? };
        let env = env.iter().map(|(name, value)| (*name, value.as_path()));
        let env: Vec<_> = env.chain([(CONFIG_ENV, config.as_path())]).collect();
        let netns = self.netns_for_criu(params.options.in_netns)?;
        self.runtime.call_with(&verb, &env, netns.as_ref(), params.deadline).await
    }

    /// Gives the connections back that a CRIU which worked in `work` has taken out of the protocol and
    /// locked, should it have been killed; those of tasks that are to `end` are only unlocked.
    pub(super) async fn free_connections(&self, work: &Path, end: bool) {
        let (bundle, work, pid) = (self.bundle.clone(), work.to_owned(), self.snapshot().pid);
        let put_back = move || {
            let pids = cgroups::pids(pid).context("list the processes")?;
            sockets::put_back(&pids).context("put the connections back").map(drop)
        };
        let free = move || {
            let back = if end { Ok(()) } else { put_back() };
            rules::remove_criu_table(&bundle, Some(pid), &work).and(back)
        };
        if let Err(err) = blocking(free).await.and_then(|freed| freed) {
            warn!("after a dump that has failed: {err}");
        }
    }
}

/// `runc checkpoint` with `params`.
pub(super) fn verb<'a>(id: &'a str, params: &'a CheckpointParams) -> Result<Checkpoint<'a>> {
    let options = &params.options;
    Ok(Checkpoint {
        id,
        image_path: utf8(&params.images)?,
        work_path: utf8(&params.work)?,
        leave_running: params.leave_running,
        tcp_established: options.tcp_established,
        ext_unix_sk: options.ext_unix_sk,
        shell_job: options.shell_job,
        file_locks: options.file_locks,
        empty_ns: &options.empty_ns,
        manage_cgroups: options.manage_cgroups.as_deref(),
        ..Default::default()
    })
}

/// The pre-dump that a dump through the Task API is to build on. As runc takes it: relative to the images.
fn parent_of(options: &CheckpointOptions, images: &Path) -> Result<Option<PathBuf>> {
    let Some(parent) = options::parent_path(options)? else { return Ok(None) };
    let from = std::path::absolute(images).context("find the folder of the images")?;
    // The folder of the images need not be there yet.
    let mut path = PathBuf::new();
    for part in from.join(parent).components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    Ok(Some(path))
}

/// What a dump through the Task API does. `ctr` always says that connections are not to be kept, since
/// it has no way to be told: they are, unless the container does not want it.
fn dump_options(options: CheckpointOptions, open_tcp: bool) -> DumpOptions {
    DumpOptions {
        tcp_established: open_tcp || options.open_tcp,
        file_locks: options.file_locks,
        ext_unix_sk: options.external_unix_sockets,
        shell_job: options.terminal,
        empty_ns: options.empty_namespaces,
        manage_cgroups: Some(options.cgroups_mode).filter(|mode| !mode.is_empty()),
        // A table of CRIU's own can be told from others and removed; rules among those of the
        // host cannot.
        network_lock: NetworkLock::Nftables,
        ..Default::default()
    }
}

/// runc's error with CRIU's first error line, which says more.
pub(super) fn explain(err: Error, what: &str, log: &Path) -> Error {
    match criu::failure(log) {
        Ok(failure) => {
            warn!("{what} failed: {err}: end of {}:\n{}", log.display(), failure.tail.join("\n"));
            err.context(failure).context(format!("{what} failed"))
        }
        Err(_) => err.context(format!("{what} failed")),
    }
}

pub(super) fn utf8(path: &Path) -> Result<&str> {
    let text = path.to_str();
    text.ok_or_else(|| Error::invalid_argument(format!("{} is not UTF-8", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_kept_unless_the_container_does_not_want_it() {
        let options = dump_options(CheckpointOptions::default(), true);
        assert!(options.tcp_established);
        let unwanted = dump_options(CheckpointOptions::default(), false);
        assert!(!unwanted.tcp_established);
        let asked = CheckpointOptions { open_tcp: true, ..Default::default() };
        assert!(dump_options(asked, false).tcp_established);
        assert_eq!(options.manage_cgroups, None);
        let all = CheckpointOptions {
            file_locks: true,
            cgroups_mode: "soft".into(),
            empty_namespaces: vec!["network".into()],
            ..Default::default()
        };
        let options = dump_options(all, true);
        assert!(options.file_locks);
        assert_eq!(options.manage_cgroups.as_deref(), Some("soft"));
        assert_eq!(options.empty_ns, ["network"]);
    }

    #[test]
    fn the_error_names_criu_s_first_error_line() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        std::fs::write(&log, "(0.1) Error (a.c:1): first\n(0.2) Error (b.c:2): second\n").unwrap();
        let err = explain(Error::internal("runc checkpoint: failed"), "dump", &log);
        let text = err.to_string();
        assert!(text.contains("first") && !text.contains("second"), "{text}");
    }
}
