//! The page daemon: hands a restored container its memory, page by page, while it runs already.
//!
//! ```text
//!   agent ──control.sock──▶ keeper ◀──lazy-pages.socket── criu restore --lazy-pages
//!     │ writes pages          │ makes the memory, keeps the tasks' descriptors, restarts the worker
//!     ▼                       │ clone(CLONE_FILES)
//!   page store ═══(shared)═══ worker ◀──userfaultfd──▶ restored processes
//! ```
//!
//! A task whose userfaultfd is closed finds zeros where its memory has not arrived. So the process that
//! does the work may die, and the descriptors live on: worker and keeper share one table of descriptors,
//! and what a worker knows lies in memory that the next one sees. Should the keeper die, the worker goes
//! on alone until all is in.
//!
//! # A restore
//! 1. [`keeper_main`] runs in a process of its own. The agent connects ([`Client`]), opens the store and
//!    writes pages; [`Client::listen`] says where CRIU will connect.
//! 2. CRIU sends a descriptor for each task. Nothing is served before [`Client::complete`].
//! 3. A restore whose socket closes before it said that it is over is aborted: the store is as before.
//!    Up to then pages may be filled and none is given back.
//! 4. After it, the store's memory is given back in chunks of 2 MB as they are filled. When all is in, the
//!    descriptors are closed and worker, keeper and folder go.
//!
//! # Limits
//! - The kernel does not report `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE`, and filling goes over a guard
//!   page (seen on 6.18): memory that a task guards after the restore and before its pages came is
//!   readable again when they come, with its old content, and has it still after the guard is removed.
//!   Guards from before the restore are safe, as there is no page in the store for them.
//! - Memory that a child does not inherit, or finds wiped, has to be marked in the store
//!   ([`crate::pages::store::Store::mark_wiped_on_fork`]); what the task advises later is not seen.
//! - The kernel reports a fork after the memory was copied. A thread that drops memory in between, while
//!   another forks, can be reported first; the child then finds zeros there. The same holds for CRIU's own
//!   daemon, and only for pages that are not in yet.
//! - Copy-on-write sharing between tasks is not brought back: each has its own copy.

mod answer;
mod client;
mod descriptor;
mod keeper;
mod lazy;
mod meta;
mod points;
mod protocol;
mod segments;
mod shared;
mod uffd;
mod worker;

#[cfg(test)]
mod tests;

pub use client::{Client, DaemonError};
pub use keeper::keeper_main;
pub use meta::Meta;
#[doc(hidden)]
pub use points::Point;
pub use protocol::{State, Status};
