//! What a lazy restore of CRIU tells through `lazy-pages.socket`.
//!
//! Per task its process id (int32), then one byte that carries its userfaultfd; a zombie is its negative
//! id alone. In the end a magic number: the restore is over and the tasks are about to run. The
//! messages are read into shared memory, so that a worker can go on where a keeper was killed.
#![allow(unsafe_code)] // recvmsg(2) into shared memory.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use super::descriptor;
use super::shared::{Field, LIVE, ROOTS, Shared, Word, now};

/// The restore is over: "ReSTore Finished".
const FINISHED: u32 = 0x5253_5446;
/// Control data of one descriptor, in words.
const CONTROL: u64 = 3;

/// How the restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lazy {
    /// More may come.
    Open,
    /// It has closed the socket.
    Closed,
}

/// Reads what has come.
///
/// # Errors
/// When it is not what CRIU sends, or there are too many tasks.
pub(super) fn pump(shared: &Shared) -> io::Result<Lazy> {
    let Some(fd) = (shared.get(Word::LazyFd) as RawFd).checked_sub(1).filter(|fd| *fd >= 0) else {
        return Ok(Lazy::Open);
    };
    loop {
        let word = shared.get(Word::Said) as u32;
        if word == 0 {
            let (at, _) = shared.buffer(Word::Said, 1);
            // SAFETY: four bytes of a word in shared memory.
            let n = unsafe { libc::recv(fd, at as *mut libc::c_void, 4, libc::MSG_DONTWAIT) };
            match n {
                4 if shared.get(Word::Said) != 0 => {}
                0 => return Ok(Lazy::Closed),
                -1 => return would_block(),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        } else if word == FINISHED {
            if shared.get(Word::Marker) == 0 {
                shared.put(Word::Marker, now());
            }
            shared.put(Word::Said, 0);
        } else if (word as i32) < 0 {
            shared.put(Word::Said, 0);
        } else {
            let control = shared.words(Word::Control, CONTROL);
            if control[0].load(Ordering::Acquire) == 0 {
                match receive(shared, fd) {
                    Ok(0) => return Ok(Lazy::Closed),
                    Ok(_) => {}
                    Err(_) => return would_block(),
                }
            }
            // A struct cmsghdr: length, level and type, descriptor.
            let [len, kind, uffd] = [0, 1, 2].map(|at: usize| control[at].load(Ordering::Acquire));
            let rights = (libc::SCM_RIGHTS as u64) << 32 | libc::SOL_SOCKET as u64;
            let uffd = uffd as u32 as RawFd;
            if len != 20 || kind != rights || !descriptor::is_uffd(uffd) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            add(shared, word, uffd)?;
            control.iter().for_each(|word| word.store(0, Ordering::Release));
            shared.put(Word::Said, 0);
        }
    }
}

fn would_block() -> io::Result<Lazy> {
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::WouldBlock => Ok(Lazy::Open),
        e if e.kind() == io::ErrorKind::ConnectionReset => Ok(Lazy::Closed),
        e => Err(e),
    }
}

/// Receives one byte, and a descriptor in the control data.
fn receive(shared: &Shared, fd: RawFd) -> io::Result<usize> {
    let (at, len) = shared.buffer(Word::Control, CONTROL);
    let mut byte = 0u8;
    let mut data = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: all zeros is a struct msghdr without anything in it.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    message.msg_control = at as *mut libc::c_void;
    message.msg_controllen = len as _;
    // SAFETY: `message` names a byte of ours and words of shared memory, with their lengths.
    let n =
        unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Makes a task's descriptor known to the worker.
fn add(shared: &Shared, space: u32, uffd: RawFd) -> io::Result<()> {
    let inode = descriptor::inode(uffd).unwrap_or(0);
    let known = |slot: usize| {
        shared.read(slot, Field::State) == LIVE
            && shared.read(slot, Field::Fd) as RawFd == uffd
            && shared.read(slot, Field::Inode) == inode
    };
    if (0..ROOTS).any(known) {
        return Ok(());
    }
    descriptor::never_wait(uffd);
    let slot = shared.claim(false).ok_or_else(|| io::Error::other("too many tasks"))?;
    shared.clear_log(slot, 0)?;
    shared.clear_log(slot, 1)?;
    let fields =
        [(Field::Fd, uffd as u64), (Field::Inode, inode), (Field::Space, u64::from(space))];
    fields.into_iter().for_each(|(field, value)| shared.write(slot, field, value));
    shared.write(slot, Field::Log, 0);
    shared.write(slot, Field::State, LIVE);
    if shared.get(Word::FirstFd) == 0 {
        shared.put(Word::FirstFd, now());
    }
    shared.add(Word::Contexts, 1);
    Ok(())
}

/// Closes the restore's socket.
pub(super) fn hang_up(shared: &Shared) {
    let fd = shared.get(Word::LazyFd) as RawFd;
    if fd > 0 {
        shared.put(Word::LazyFd, 0);
        shared.put(Word::Said, 0);
        shared
            .words(Word::Control, CONTROL)
            .iter()
            .for_each(|word| word.store(0, Ordering::Release));
        descriptor::close(fd - 1);
    }
}
