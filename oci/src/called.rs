//! Programs that are one file under several names.

use std::ffi::OsStr;
use std::path::Path;

/// Whether this process was started as `name`.
pub fn is(name: &str) -> bool {
    let called = std::env::args_os().next();
    called.as_deref().map(Path::new).and_then(Path::file_name) == Some(OsStr::new(name))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_test_is_not_criu() {
        assert!(!super::is("criu"));
    }
}
