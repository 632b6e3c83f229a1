//! What ferry tells CRIU, what it remembers of a dump, and what it reads in CRIU's logs.
//!
//! CRIU is always started by runc. What runc's command line cannot say goes through a file that
//! the environment variable [`CONFIG_ENV`] names, one per run.

mod config;
mod gate;
mod hold;
mod log;
mod record;
pub mod rpc;
pub mod wrapper;

pub use config::{CONFIG_ENV, Config, NetworkLock};
pub use gate::{DUMP_GATE, Gate, RESTORE_GATE, Waiting};
pub use hold::{Hold, HoldError};
pub use log::{Failure, failure, run_id, version};
pub use record::{DumpOptions, DumpRecord, RECORD_FILE, RECORD_VERSION, RecordError};
