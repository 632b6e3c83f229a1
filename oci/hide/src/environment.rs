//! The environment: what it says to this library, and how to take that out of it.

use crate::format as f;
use std::ffi::CStr;

/// The folder with the orders.
pub(crate) fn folder() -> Option<&'static CStr> {
    const { assert!(matches!(f::FOLDER_ENV.as_bytes(), b"FERRY_HIDE")) };
    // SAFETY: the environment is not changed while a library is loaded.
    let value = unsafe { libc::getenv(c"FERRY_HIDE".as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: a string that ends; `forget` frees nothing.
    Some(unsafe { CStr::from_ptr(value) })
}

/// Takes this library out of the environment, so that children of this process do not load it.
/// Called when it is loaded and nothing else runs.
pub(crate) fn forget() {
    // SAFETY: nobody else uses the environment now.
    unsafe { libc::unsetenv(c"FERRY_HIDE".as_ptr()) };
    // SAFETY: as above.
    let list = unsafe { libc::getenv(c"LD_PRELOAD".as_ptr()) };
    if list.is_null() {
        return;
    }
    // SAFETY: a string that ends, in memory of this process that may be written: the stack it
    // was started with.
    let bytes = unsafe { std::slice::from_raw_parts_mut(list.cast::<u8>(), libc::strlen(list)) };
    let left = without_library(bytes);
    if left == 0 {
        // SAFETY: as above.
        unsafe { libc::unsetenv(c"LD_PRELOAD".as_ptr()) };
    } else if let Some(end) = bytes.get_mut(left) {
        *end = 0;
    }
}

/// Takes this library out of `list`, in place; returns the length of what is left.
fn without_library(list: &mut [u8]) -> usize {
    let is_separator = |byte: u8| byte == b':' || byte == b' ';
    let (mut from, mut to) = (0, 0);
    while from < list.len() {
        let rest = list.get(from..).unwrap_or_default();
        let length = rest.iter().position(|byte| is_separator(*byte)).unwrap_or(rest.len());
        let entry = rest.get(..length).unwrap_or_default();
        let own = entry.rsplit(|byte| *byte == b'/').next() == Some(f::LIBRARY.as_bytes());
        if !own && length > 0 {
            if to > 0 {
                put(list, to, b':');
                to += 1;
            }
            for at in 0..length {
                let byte = list.get(from + at).copied().unwrap_or_default();
                put(list, to + at, byte);
            }
            to += length;
        }
        from += length + 1;
    }
    to
}

fn put(list: &mut [u8], at: usize, byte: u8) {
    if let Some(place) = list.get_mut(at) {
        *place = byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_libraries_stay() {
        for (before, after) in [
            ("/a/libferry_hide.so", ""),
            ("/a/b.so", "/a/b.so"),
            ("/a/libferry_hide.so:/a/b.so", "/a/b.so"),
            ("x.so /a/libferry_hide.so y.so", "x.so:y.so"),
            ("::x.so:libferry_hide.so: y.so ", "x.so:y.so"),
            (
                "/a/libferry_hide.so.bak:/libferry_hide.so/x",
                "/a/libferry_hide.so.bak:/libferry_hide.so/x",
            ),
            ("", ""),
        ] {
            let mut list = before.as_bytes().to_vec();
            let left = without_library(&mut list);
            assert_eq!(std::str::from_utf8(&list[..left]).unwrap(), after);
        }
    }
}
