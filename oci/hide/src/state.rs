//! What this process knows: whether to act, where, and on which orders.

use crate::format as f;
use crate::orders::Orders;
use crate::{report, sys};
use std::cell::UnsafeCell;
use std::ffi::{CStr, c_int};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// Longest path to a file in the folder, with the byte that ends it.
const PATH: usize = 1024;
/// Room for the longest file name in it.
const NAME: usize = 32;

static ACTIVE: AtomicBool = AtomicBool::new(false);
static FOLDER: Folder = Folder(UnsafeCell::new([0; PATH]));
static FOLDER_LENGTH: AtomicUsize = AtomicUsize::new(0);
/// Somebody has begun to read the orders.
static ASKED: AtomicBool = AtomicBool::new(false);
static ORDERS: AtomicPtr<u64> = AtomicPtr::new(null_mut());
static ORDERS_WORDS: AtomicUsize = AtomicUsize::new(0);

struct Folder(UnsafeCell<[u8; PATH]>);

// SAFETY: written only by `activate`, before `ACTIVE` is set; read only after.
unsafe impl Sync for Folder {}

/// Whether to act in this process.
pub(crate) fn is_active() -> bool {
    ACTIVE.load(Ordering::Acquire)
}

/// Acts from now on, with the files in `folder`. Called once, when the library is loaded and
/// nothing else runs.
pub(crate) fn activate(folder: &CStr) -> bool {
    let folder = folder.to_bytes();
    if is_active() || folder.first() != Some(&b'/') || folder.len() + NAME > PATH {
        return false;
    }
    // SAFETY: not active, so nobody reads it, and called once.
    let place = unsafe { &mut *FOLDER.0.get() };
    place.iter_mut().zip(folder).for_each(|(to, from)| *to = *from);
    FOLDER_LENGTH.store(folder.len(), Ordering::Release);
    with_path(f::REPORT.as_bytes(), None, report::open);
    ACTIVE.store(true, Ordering::Release);
    true
}

/// Calls `then` with the path of a file in the folder: `name`, and `number` in decimal.
fn with_path<T>(name: &[u8], number: Option<i32>, then: impl FnOnce(&CStr) -> T) -> Option<T> {
    let mut path = [0_u8; PATH];
    // SAFETY: nobody writes it once there is somebody to call this.
    let folder = unsafe { &*FOLDER.0.get() };
    let folder = folder.get(..FOLDER_LENGTH.load(Ordering::Acquire))?;
    let mut digits = [0; 12];
    let number = number.map_or(&[][..], |number| decimal(number, &mut digits));
    let parts = folder.iter().chain(b"/").chain(name).chain(number);
    // The last byte stays zero.
    path.iter_mut().take(PATH - 1).zip(parts).for_each(|(to, from)| *to = *from);
    CStr::from_bytes_until_nul(&path).ok().map(then)
}

/// `number`, which is not negative, in decimal.
pub(crate) fn decimal(number: i32, digits: &mut [u8; 12]) -> &[u8] {
    let (mut left, mut at) = (number.unsigned_abs(), digits.len());
    while let Some(digit) = at.checked_sub(1).and_then(|next| digits.get_mut(next)) {
        *digit = b'0' + (left % 10) as u8;
        at -= 1;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    digits.get(at..).unwrap_or_default()
}

/// The orders. Read once, when they are first asked for: CRIU asks long after it was started, in
/// the freeze. If they cannot be used then, nothing is hidden until this process ends.
pub(crate) fn orders() -> Option<Orders<'static>> {
    if !ASKED.swap(true, Ordering::AcqRel) {
        match with_path(f::ORDERS.as_bytes(), None, read)? {
            Ok(Some(words)) => {
                ORDERS_WORDS.store(words.len(), Ordering::Release);
                ORDERS.store(words.as_ptr().cast_mut(), Ordering::Release);
                report::add(f::ORDERS_READ, 1);
            }
            Ok(None) => {}
            Err(()) => report::add(f::ERRORS, 1),
        }
    }
    let at = ORDERS.load(Ordering::Acquire);
    if at.is_null() {
        return None;
    }
    // SAFETY: memory of this many words that stays, never written again.
    let words = unsafe { std::slice::from_raw_parts(at, ORDERS_WORDS.load(Ordering::Acquire)) };
    Orders::checked_before(words)
}

/// Reads orders into memory of their own, so that nothing done to the file later matters.
/// `Ok(None)` if there are none.
fn read(path: &CStr) -> Result<Option<&'static [u64]>, ()> {
    let Some(fd) = sys::open(path, libc::O_RDONLY) else { return Ok(None) };
    let words = read_words(fd);
    sys::close(fd);
    words.filter(|words| Orders::new(words).is_some()).map(Some).ok_or(())
}

fn read_words(fd: c_int) -> Option<&'static [u64]> {
    let length = usize::try_from(sys::stat(fd)?.st_size).ok()?;
    if length == 0 || length % 8 != 0 || length > f::ORDERS_MAX {
        return None;
    }
    let at = sys::map(length, None)?;
    // SAFETY: new memory of this length, zeroed, that stays.
    let bytes = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), length) };
    if !sys::read_whole(fd, bytes) {
        return None;
    }
    // SAFETY: as above, aligned to pages, and `bytes` is not used any more.
    Some(unsafe { std::slice::from_raw_parts(at, length / 8) })
}

/// Opens the copy of smaps of the task `pid`, if the orders say that it is valid.
pub(crate) fn smaps(orders: &Orders<'_>, pid: i32) -> Option<c_int> {
    let length = orders.task(pid)?.smaps?;
    let open = |path: &CStr| sys::open(path, libc::O_RDONLY);
    let fd = with_path(f::SMAPS_PREFIX.as_bytes(), Some(pid), open).flatten();
    if let Some(fd) = fd
        && sys::stat(fd).is_some_and(|stat| u64::try_from(stat.st_size) == Ok(length))
    {
        return Some(fd);
    }
    report::add(f::ERRORS, 1);
    if let Some(fd) = fd {
        sys::close(fd);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_decimal() {
        for number in [0, 7, 10, 4711, i32::MAX] {
            assert_eq!(decimal(number, &mut [0; 12]), number.to_string().as_bytes());
        }
    }
}
