//! The ends of the stream in real life: processes of this host, and the page store.

use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::sync::Mutex;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::apply::PageSink;
use super::plan::Change;
use super::worker::{PageSource, lock};
use crate::pages::PAGE;
use crate::pages::reader::read_pages;
use crate::pages::store::{Store, StoreError};
use crate::pages::tracker::Changes;

/// Reads the memory of processes of this host.
///
/// Its buffers stay, so that no slice pays for fresh memory.
#[derive(Debug, Default)]
pub struct Processes {
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Processes {
    /// Reads all of `ranges` into `buffer` by one call. False when that did not succeed.
    fn read_at_once(pid: i32, ranges: &[Range<u64>], buffer: &mut Vec<u8>) -> bool {
        let remote = ranges.iter().map(|range| RemoteIoVec {
            base: range.start as usize,
            len: (range.end - range.start) as usize,
        });
        let remote: Vec<_> = remote.collect();
        let length = remote.iter().map(|part| part.len).sum();
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let mut local = [IoSliceMut::new(&mut buffer[..length])];
        process_vm_readv(Pid::from_raw(pid), &mut local, &remote) == Ok(length)
    }
}

impl PageSource for Processes {
    fn read(
        &self,
        pid: i32,
        ranges: &[Range<u64>],
        each: &mut (dyn FnMut(u64, &[u8]) + Send),
    ) -> io::Result<()> {
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        if Self::read_at_once(pid, ranges, &mut buffer) {
            let mut rest = &buffer[..];
            for range in ranges {
                let (bytes, more) = rest.split_at((range.end - range.start) as usize);
                each(range.start, bytes);
                rest = more;
            }
        } else {
            // Something has vanished, or the process itself may not read it.
            let each = Mutex::new(each);
            read_pages(pid, ranges, 1, |range, bytes| {
                lock(&each)(range.start, bytes);
                Ok(())
            })?;
        }
        debug_assert!(buffer.len().is_multiple_of(PAGE as usize));
        lock(&self.buffers).push(buffer);
        Ok(())
    }
}

impl<'a> From<&'a Changes> for Change<'a> {
    fn from(changes: &'a Changes) -> Self {
        Self {
            pid: changes.pid,
            space: changes.space,
            written: &changes.written,
            absent: &changes.absent,
            exited: changes.exited,
        }
    }
}

/// A full store keeps its kind of error, everything else is passed on.
fn stored(result: Result<(), StoreError>) -> io::Result<()> {
    result.map_err(|error| match error {
        StoreError::Io(error) => error,
        StoreError::Full { .. } => io::Error::new(io::ErrorKind::StorageFull, error),
        other => io::Error::other(other),
    })
}

impl PageSink for Store {
    fn write(&mut self, space: u32, addr: u64, pages: &[u8]) -> io::Result<()> {
        stored(Store::write(self, space, addr, pages))
    }

    fn copy(&mut self, from: (u32, u64), to: (u32, u64)) -> io::Result<()> {
        stored(self.copy_page(from, to))
    }

    fn remove(&mut self, space: u32, start: u64, end: u64) -> io::Result<()> {
        stored(Store::remove(self, space, start, end))
    }

    fn remove_space(&mut self, space: u32) -> io::Result<()> {
        stored(Store::remove_space(self, space))
    }

    fn hot(&mut self, space: u32, start: u64, end: u64) -> io::Result<()> {
        stored(self.mark_hot(space, start, end))
    }
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
