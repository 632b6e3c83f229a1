//! Where ferry's companions of CRIU are installed.

use std::path::{Path, PathBuf};

/// Finds `name` beside this program, or where a package puts what people do not call.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let program = std::env::current_exe().ok();
    let folder = program.as_deref().and_then(Path::parent);
    let beside = ["", "../libexec/ferry", "../lib/ferry"];
    let beside = beside.into_iter().filter_map(|place| Some(folder?.join(place)));
    let fixed = ["/usr/local/libexec/ferry", "/usr/libexec/ferry"].map(PathBuf::from);
    beside.chain(fixed).map(|place| place.join(name)).find(|path| path.is_file())
}
