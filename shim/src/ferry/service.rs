//! The methods of the Ferry service.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use ferry_oci::api::ferry::{
    CheckpointResponse, CommitRequest, CompleteRequest, DescribeRequest, Description, DumpResponse,
    Empty, FreezeRequest, FreezeResponse, MigrationRequest, Pages, Phase, PreDumpRequest,
    PreDumpResponse, PrepareDumpRequest, PrepareDumpResponse, ReleaseResponse, RestoreRequest,
    RestoreResponse,
};
use ferry_oci::api::ferry_ttrpc::Ferry;
use ferry_oci::paths;
use ferry_oci::record::{Decision, Record};
use ttrpc::r#async::TtrpcContext;

use super::lease::Lease;
use super::moves::{Move, Moves, Side, Step};
use crate::container::Container;
use crate::containers::Containers;
use crate::error::{Context as _, Error, Result};

/// The service.
pub(super) struct FerryService {
    pub(super) containers: Arc<Containers>,
    pub(super) moves: Arc<Moves>,
}

impl FerryService {
    fn find(&self, id: &str, migration: &str) -> Result<(Arc<Container>, Arc<Move>)> {
        if !paths::is_migration_id(migration) {
            return Err(Error::invalid_argument(format!("{migration:?} is no migration's id")));
        }
        Ok((self.containers.get(id)?, self.moves.of(id)))
    }
}

/// Images come from one folder only.
fn check_folder(request: &RestoreRequest) -> Result<()> {
    let images = paths::images(&request.migration);
    if Path::new(&request.images_path) == images {
        return Ok(());
    }
    let text = format!("images are expected in {}", images.display());
    Err(Error::invalid_argument(text))
}

fn absolute(path: &str) -> Result<()> {
    match Path::new(path).is_absolute() {
        true => Ok(()),
        false => Err(Error::invalid_argument(format!("{path:?} is no absolute path"))),
    }
}

/// Runs a step to its end even when its caller is lost in the middle of it.
async fn finish<T: Send + 'static>(
    step: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    Ok(tokio::spawn(step).await.context("the step")??)
}

#[async_trait]
impl Ferry for FerryService {
    async fn describe(
        &self,
        _: &TtrpcContext,
        request: DescribeRequest,
    ) -> ttrpc::Result<Description> {
        let container = self.containers.get(&request.id)?;
        let snapshot = container.snapshot();
        let seen = self.moves.of(&request.id).seen();
        let stdio = container.stdio();
        let images = match seen.phase {
            Phase::PHASE_NONE => String::new(),
            _ => paths::images(&seen.migration).display().to_string(),
        };
        Ok(Description {
            protocol: ferry_oci::PROTOCOL,
            id: request.id,
            namespace: container.namespace().to_owned(),
            bundle: container.bundle().display().to_string(),
            status: format!("{:?}", snapshot.status).to_lowercase(),
            init_pid: snapshot.pid,
            pids: container.pids().await?,
            execs: container.exec_ids(),
            terminal: stdio.terminal,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            runc: container.runtime().runc.binary.display().to_string(),
            // A container that came here and stayed is not being migrated.
            phase: match seen.phase {
                Phase::PHASE_RELEASED => Phase::PHASE_NONE,
                phase => phase,
            }
            .into(),
            migration: seen.migration,
            images_path: images,
            shim_pid: std::process::id(),
            pre_dump: container.last_pre_dump().unwrap_or_default().display().to_string(),
            ..Default::default()
        })
    }

    async fn prepare_dump(
        &self,
        context: &TtrpcContext,
        request: PrepareDumpRequest,
    ) -> ttrpc::Result<PrepareDumpResponse> {
        let (container, a_move) = self.find(&request.id, &request.migration)?;
        for keep in request.keep.iter() {
            absolute(&keep.images_path)?;
            absolute(&keep.work_path)?;
        }
        let lease = Lease::of(context);
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::PrepareDump, &request.migration)?;
            a_move.prepare_dump(&mut side, container, &request, lease).await
        })
        .await
    }

    async fn freeze(
        &self,
        context: &TtrpcContext,
        request: FreezeRequest,
    ) -> ttrpc::Result<FreezeResponse> {
        let (container, a_move) = self.find(&request.id, &request.migration)?;
        let lease = Lease::of(context);
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Freeze, &request.migration)?;
            a_move.freeze(&mut side, container, &request, lease).await
        })
        .await
    }

    async fn dump(
        &self,
        _: &TtrpcContext,
        request: MigrationRequest,
    ) -> ttrpc::Result<DumpResponse> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Dump, &request.migration)?;
            a_move.dump(&mut side).await
        })
        .await
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: MigrationRequest,
    ) -> ttrpc::Result<CheckpointResponse> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Checkpoint, &request.migration)?;
            a_move.checkpoint(&mut side).await
        })
        .await
    }

    async fn complete(&self, _: &TtrpcContext, request: CompleteRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.id)?;
        absolute(&request.images_path)?;
        finish(async move {
            container.complete(Path::new(&request.images_path)).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn pre_dump(
        &self,
        _: &TtrpcContext,
        request: PreDumpRequest,
    ) -> ttrpc::Result<PreDumpResponse> {
        let container = self.containers.get(&request.id)?;
        absolute(&request.folder)?;
        let a_move = self.moves.of(&request.id);
        finish(async move {
            // Not in the middle of a step.
            let side = a_move.side.lock().await;
            a_move.admit(Step::PreDump, "")?;
            let parent = Some(Path::new(&request.parent)).filter(|_| !request.parent.is_empty());
            let done = container.pre_dump(Path::new(&request.folder), parent).await?;
            drop(side);
            Ok(PreDumpResponse {
                bytes: done.report.bytes,
                in_parent: done.report.in_parent,
                processes: done.report.processes,
                took_us: done.report.took_us,
                stopped_us: done.report.stopped_us,
                by_criu: done.by_criu,
                ..Default::default()
            })
        })
        .await
    }

    async fn open_pages(&self, _: &TtrpcContext, request: DescribeRequest) -> ttrpc::Result<Pages> {
        let container = self.containers.get(&request.id)?;
        let a_move = self.moves.of(&request.id);
        finish(async move {
            let side = a_move.side.lock().await;
            a_move.admit(Step::OpenPages, "")?;
            let socket = container.open_pages().await?.display().to_string();
            drop(side);
            Ok(Pages { socket, ..Default::default() })
        })
        .await
    }

    async fn end_pre_dumps(
        &self,
        _: &TtrpcContext,
        request: DescribeRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.id)?;
        let a_move = self.moves.of(&request.id);
        finish(async move {
            // Not those that a dump under way builds on.
            let side = a_move.side.lock().await;
            a_move.admit(Step::EndPreDumps, "")?;
            container.end_pre_dumps().await;
            drop(side);
            Ok(Empty::new())
        })
        .await
    }

    async fn end(&self, _: &TtrpcContext, request: MigrationRequest) -> ttrpc::Result<Empty> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::End, &request.migration)?;
            a_move.end(&mut side).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn thaw(&self, _: &TtrpcContext, request: MigrationRequest) -> ttrpc::Result<Empty> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            // Given back already: by a failed freeze, a lost lease, or the limit.
            if !matches!(*side, Side::Source(_)) {
                return Ok(Empty::new());
            }
            a_move.admit(Step::Thaw, &request.migration)?;
            a_move.thaw(&mut side).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn commit(&self, _: &TtrpcContext, request: CommitRequest) -> ttrpc::Result<Empty> {
        let (container, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Commit, &request.migration)?;
            let (id, namespace) = (container.id(), container.namespace());
            let mut record = Record::new(&request.migration, id, namespace, Decision::Committed);
            record.destination = request.destination;
            record.ip = request.ip;
            record.device = request.device;
            record.epoch = request.epoch;
            a_move.commit(&mut side, &record)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn revert(&self, _: &TtrpcContext, request: MigrationRequest) -> ttrpc::Result<Empty> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Revert, &request.migration)?;
            a_move.revert(&mut side).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn retire(&self, _: &TtrpcContext, request: MigrationRequest) -> ttrpc::Result<Empty> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Retire, &request.migration)?;
            a_move.retire(&mut side).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn prepare_restore(
        &self,
        context: &TtrpcContext,
        request: RestoreRequest,
    ) -> ttrpc::Result<Empty> {
        let (container, a_move) = self.find(&request.id, &request.migration)?;
        check_folder(&request)?;
        let lease = Lease::of(context);
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::PrepareRestore, &request.migration)?;
            a_move.prepare_restore(&mut side, container, &request, lease).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn restore(
        &self,
        context: &TtrpcContext,
        request: RestoreRequest,
    ) -> ttrpc::Result<RestoreResponse> {
        let (container, a_move) = self.find(&request.id, &request.migration)?;
        check_folder(&request)?;
        let lease = Lease::of(context);
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Restore, &request.migration)?;
            a_move.restore(&mut side, container, &request, lease).await
        })
        .await
    }

    async fn release(
        &self,
        _: &TtrpcContext,
        request: MigrationRequest,
    ) -> ttrpc::Result<ReleaseResponse> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Release, &request.migration)?;
            a_move.release(&mut side).await
        })
        .await
    }

    async fn abort(&self, _: &TtrpcContext, request: MigrationRequest) -> ttrpc::Result<Empty> {
        let (_, a_move) = self.find(&request.id, &request.migration)?;
        finish(async move {
            let mut side = a_move.side.lock().await;
            a_move.admit(Step::Abort, &request.migration)?;
            a_move.abort(&mut side).await;
            Ok(Empty::new())
        })
        .await
    }
}
