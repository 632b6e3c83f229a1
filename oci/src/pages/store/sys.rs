//! Shared memory: the mapping of a memory file, seen as atomics so that several processes may look.
#![allow(unsafe_code)] // mmap(2) has no safe form.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A shared mapping of the beginning of a file. It is unmapped when dropped.
pub(in crate::pages) struct Map {
    at: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is only read and written as atomics.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `len` bytes of `file`, for writing too if `write`.
    pub(in crate::pages) fn new(file: &File, len: u64, write: bool) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let access = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing else.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at).map(|at| Self { at, len }).ok_or_else(|| io::ErrorKind::Other.into())
    }

    /// Address of byte `offset`, for the kernel to read or write.
    ///
    /// # Panics
    /// If `offset` and `len` reach beyond the mapping.
    pub(in crate::pages) fn address(&self, offset: u64, len: u64) -> u64 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len as u64),
            "beyond the map"
        );
        self.at.as_ptr() as u64 + offset
    }

    /// `count` words from byte `offset` on.
    ///
    /// # Panics
    /// If they reach beyond the mapping or `offset` is not a multiple of 8.
    pub(in crate::pages) fn words(&self, offset: u64, count: u64) -> &[AtomicU64] {
        let at = self.address(offset, count * 8);
        assert!(at.is_multiple_of(8), "words must be aligned");
        // SAFETY: in the mapping, aligned (checked above), and valid for every bit pattern.
        unsafe { std::slice::from_raw_parts(at as *const AtomicU64, count as usize) }
    }

    /// `count` half words from byte `offset` on.
    ///
    /// # Panics
    /// If they reach beyond the mapping or `offset` is not a multiple of 4.
    pub(in crate::pages) fn halves(&self, offset: u64, count: u64) -> &[AtomicU32] {
        let at = self.address(offset, count * 4);
        assert!(at.is_multiple_of(4), "half words must be aligned");
        // SAFETY: in the mapping, aligned (checked above), and valid for every bit pattern.
        unsafe { std::slice::from_raw_parts(at as *const AtomicU32, count as usize) }
    }

    /// Gives the kernel an advice about a range: `MADV_*`.
    pub(in crate::pages) fn advise(&self, offset: u64, len: u64, advice: i32) -> io::Result<()> {
        let at = self.address(offset, len) as *mut libc::c_void;
        // SAFETY: in the mapping, which is shared: no advice that we give changes its content.
        match unsafe { libc::madvise(at, len as usize, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Keeps pages of a range in memory once they are there, so that the kernel never has to wait
    /// for one when it writes there.
    pub(in crate::pages) fn lock_on_fault(&self, offset: u64, len: u64) -> io::Result<()> {
        let at = self.address(offset, len) as *const libc::c_void;
        // SAFETY: in the mapping; locking changes no content.
        match unsafe { libc::mlock2(at, len as usize, libc::MLOCK_ONFAULT as libc::c_uint) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is ours; what borrows from it cannot outlive `self`.
        unsafe { libc::munmap(self.at.as_ptr(), self.len) };
    }
}

/// A new memory file of `len` bytes, none of which takes room yet. It can never shrink: a mapping
/// of it cannot fault.
pub(in crate::pages) fn memory_file(name: &std::ffi::CStr, len: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: `name` is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that we have just been given.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call takes no pointers.
    match unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A new file without a name below `dir`, of `len` bytes, none of which takes room yet.
pub(super) fn unnamed_file(dir: &Path, len: u64) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::create_dir_all(dir)?;
    let mut options = File::options();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    let file = options.open(dir).or_else(|_| {
        // Some file systems have no files without a name.
        let path = dir.join(format!("spill.{}", std::process::id()));
        let file =
            File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok::<_, io::Error>(file)
    })?;
    file.set_len(len)?;
    Ok(file)
}

/// Gives back the room of a range of `file`, which reads as zeros from then on.
pub(in crate::pages) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the call takes no pointers.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
