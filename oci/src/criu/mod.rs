//! What ferry tells CRIU, what it remembers of a dump, and what it reads in CRIU's logs.
//!
//! CRIU is always started by runc. What runc's command line cannot say goes through a file that
//! the environment variable [`CONFIG_ENV`] names, one per run.

mod config;
mod decode;
mod gate;
mod hidden;
mod hold;
pub mod images;
mod log;
mod pagemap;
mod places;
mod record;
pub mod rpc;
mod tar;
pub mod wrapper;

pub use config::{CONFIG_ENV, Config, NetworkLock};
pub use gate::{DUMP_GATE, Gate, RESTORE_GATE, Waiting};
pub use hidden::{
    CannotHide, HIDE_ENV, HiddenRange, HiddenTask, HideError, HideReport, Hiding, Orders, Probe,
    StoredSmaps, find_library,
};
pub use hold::{Hold, HoldError};
pub use log::{Failure, failure, run_ids, version};
pub use pagemap::{
    ImageError, Leak, LeftOut, Mapping, PARENT, PageRun, Pagemap, PagesWriter, check, check_parsed,
    flatten, link_parent, merge, pages_bytes, parse_mappings, path_between, read_mappings, tasks,
};
pub use record::{DumpOptions, DumpRecord, Locked, RECORD_FILE, RECORD_VERSION, RecordError};
pub use tar::{FastTar, TarCounts};
