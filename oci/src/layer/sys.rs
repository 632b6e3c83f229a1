//! The calls that neither std nor nix has: extended attributes and write-back of one file.
#![allow(unsafe_code)] // System calls without a safe wrapper in the crates that we use.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The kernel's limit for the value of an attribute, bytes.
pub(super) const MAX_XATTR: usize = 64 << 10;

/// Names of the extended attributes of what `fd` refers to, which may have been opened by `O_PATH`.
pub(super) fn list_xattrs(fd: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let path = magic_link(fd);
    // SAFETY: `path` is a C string, the buffer is as long as is said.
    let names = fill(|at, len| unsafe { libc::listxattr(path.as_ptr(), at.cast(), len) })?;
    Ok(names.split(|b| *b == 0).filter(|n| !n.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Value of one extended attribute; `None` when there is none by this name.
pub(super) fn get_xattr(fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let (path, name) = (magic_link(fd), CString::new(name)?);
    let value =
        // SAFETY: `path` and `name` are C strings, the buffer is as long as is said.
        fill(|at, len| unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), at.cast(), len) });
    match value {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.raw_os_error() == Some(libc::ENODATA) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets one extended attribute.
pub(super) fn set_xattr(fd: BorrowedFd<'_>, name: &[u8], value: &[u8]) -> io::Result<()> {
    let (path, name) = (magic_link(fd), CString::new(name)?);
    let (at, len) = (value.as_ptr().cast(), value.len());
    // SAFETY: `path` and `name` are C strings, the value is as long as is said.
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), at, len, 0) })
}

/// Removes one extended attribute.
pub(super) fn remove_xattr(fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let (path, name) = (magic_link(fd), CString::new(name)?);
    // SAFETY: `path` and `name` are C strings.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
}

/// Has the dirty pages of a file written, and waits. Afterwards they are mapped read-only everywhere, so that
/// the next write through a mapping stamps the file. The file's metadata is not written: that would cost a
/// flush of the disk.
pub(super) fn write_back(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes no pointers.
    check(unsafe { libc::sync_file_range(fd.as_raw_fd(), 0, 0, flags) })
}

/// The path that leads to what `fd` refers to, a symbolic link included, by whatever means it was opened.
fn magic_link(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// Calls `call` with a buffer that is large enough.
fn fill(mut call: impl FnMut(*mut u8, usize) -> isize) -> io::Result<Vec<u8>> {
    // Most files have no attributes, and those that they have are short.
    let mut buffer = vec![0u8; 256];
    loop {
        match usize::try_from(call(buffer.as_mut_ptr(), buffer.len())) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::ERANGE) || buffer.len() >= MAX_XATTR {
                    return Err(error);
                }
                buffer = vec![0; MAX_XATTR];
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
