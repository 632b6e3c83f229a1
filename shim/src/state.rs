//! The states of a task and what may be asked for in each. Pure: no process is touched here.
//!
//! ```text
//!            ┌─────────── Create ──────────┐
//!         Created                       Pending (from a checkpoint, no process yet)
//!            │ Start                        │ Restore
//!            v                              v
//!         Running <─── Release ─── Held, or Running at once
//!          │   ^                            │ Abort
//!    Pause v   │ Resume                     │
//!         Paused                            │
//!            └──── init exits ──> Stopped <─┘ ── Delete ──> Deleted
//! ```

use crate::error::{Error, Result};
use std::fmt;

/// Where a task, or an exec, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Set up by runc, its process waits for Start.
    Created,
    /// Created from a checkpoint: Start restores it.
    Pending,
    /// Restored up to CRIU's post-restore: nothing has run.
    Held,
    /// Its process runs.
    Running,
    /// Being frozen.
    Pausing,
    /// Frozen.
    Paused,
    /// Its process has exited.
    Stopped,
    /// Gone.
    Deleted,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created | Self::Pending => "created",
            Self::Held => "held by a restore",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Deleted => "deleted",
        })
    }
}

/// What is asked of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// Run the process of a created task.
    Start,
    /// Restore a task created from a checkpoint.
    Restore,
    /// Let a held restore run.
    Release,
    /// End a held restore.
    Abort,
    /// Start a further process.
    Exec,
    /// Send a signal.
    Kill,
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Set other limits.
    Update,
    /// Dump.
    Checkpoint,
    /// Remove.
    Delete,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Restore => "restore",
            Self::Release => "release",
            Self::Abort => "abort",
            Self::Exec => "exec in",
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Update => "update",
            Self::Checkpoint => "checkpoint",
            Self::Delete => "delete",
        })
    }
}

/// Whether `op` is legal in `status`; the refusal is FAILED_PRECONDITION, except that what is gone
/// is NOT_FOUND, which is what containerd's clients expect.
pub(crate) fn admit(status: Status, op: Op) -> Result<()> {
    use Status::{Created, Held, Paused, Pending, Running, Stopped};
    let legal = match op {
        Op::Start => matches!(status, Created),
        Op::Restore => matches!(status, Pending),
        Op::Release | Op::Abort => matches!(status, Held),
        Op::Exec => matches!(status, Created | Running),
        Op::Pause => matches!(status, Running),
        Op::Kill | Op::Update => matches!(status, Created | Running | Paused),
        Op::Resume => matches!(status, Paused),
        Op::Checkpoint => matches!(status, Running | Paused),
        Op::Delete => matches!(status, Created | Pending | Stopped),
    };
    match (legal, op, status) {
        (true, ..) => Ok(()),
        (_, Op::Kill, Pending | Stopped | Status::Deleted) => {
            Err(Error::not_found("process already finished or not started"))
        }
        // Two clients may delete at once: the second one must read that there is nothing left.
        (_, _, Status::Deleted) => Err(Error::not_found(format!("cannot {op}: no such task"))),
        _ => Err(Error::failed_precondition(format!("cannot {op} a task that is {status}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::ttrpc::Code;

    const ALL: [Status; 8] = [
        Status::Created,
        Status::Pending,
        Status::Held,
        Status::Running,
        Status::Pausing,
        Status::Paused,
        Status::Stopped,
        Status::Deleted,
    ];

    fn legal(op: Op) -> Vec<Status> {
        ALL.into_iter().filter(|status| admit(*status, op).is_ok()).collect()
    }

    #[test]
    fn each_operation_is_legal_only_where_it_makes_sense() {
        assert_eq!(legal(Op::Start), [Status::Created]);
        assert_eq!(legal(Op::Restore), [Status::Pending]);
        assert_eq!(legal(Op::Release), [Status::Held]);
        assert_eq!(legal(Op::Abort), [Status::Held]);
        assert_eq!(legal(Op::Exec), [Status::Created, Status::Running]);
        assert_eq!(legal(Op::Pause), [Status::Running]);
        assert_eq!(legal(Op::Resume), [Status::Paused]);
        assert_eq!(legal(Op::Checkpoint), [Status::Running, Status::Paused]);
        for op in [Op::Kill, Op::Update] {
            assert_eq!(legal(op), [Status::Created, Status::Running, Status::Paused]);
        }
        assert_eq!(legal(Op::Delete), [Status::Created, Status::Pending, Status::Stopped]);
    }

    #[test]
    fn a_refusal_is_failed_precondition() {
        let err = admit(Status::Running, Op::Delete).unwrap_err();
        assert_eq!(err.code(), Code::FAILED_PRECONDITION);
        assert_eq!(err.to_string(), "cannot delete a task that is running");
        let err = admit(Status::Held, Op::Start).unwrap_err();
        assert_eq!(err.code(), Code::FAILED_PRECONDITION);
    }

    #[test]
    fn killing_what_is_gone_is_not_found() {
        assert_eq!(admit(Status::Stopped, Op::Kill).unwrap_err().code(), Code::NOT_FOUND);
        assert_eq!(admit(Status::Held, Op::Kill).unwrap_err().code(), Code::FAILED_PRECONDITION);
    }
}
