//! Whether this kernel says where guard pages may be.
#![allow(unsafe_code)] // A mapping to try it on has no safe form in the libraries used here.

use std::ptr::null_mut;

/// `VmFlags` in smaps has `gu` for mappings that may hold guard pages, or there are no guard pages
/// at all. Where this is `false`, every [`HiddenRange`](super::HiddenRange) has to be declared as
/// one that may hold some. Tried on a mapping of this process; 1 ms, the answer never changes.
pub fn guards_are_shown() -> bool {
    const MADV_GUARD_INSTALL: i32 = 102;
    // SAFETY: sysconf has no conditions.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, of which nothing is read or written.
    let at = unsafe { libc::mmap(null_mut(), 2 * page, libc::PROT_READ, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the first page of that mapping.
    let installed = unsafe { libc::madvise(at, page, MADV_GUARD_INSTALL) } == 0;
    let shown = !installed
        || std::fs::read("/proc/self/smaps").is_ok_and(|smaps| marked(&smaps, at as u64));
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(at, 2 * page) };
    shown
}

/// The mapping around `address` has the flag.
fn marked(smaps: &[u8], address: u64) -> bool {
    let text = String::from_utf8_lossy(smaps);
    let mut around = false;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if around {
                return flags.split(' ').any(|flag| flag == "gu");
            }
        } else if let Some((start, end)) = line.split(' ').next().and_then(|r| r.split_once('-')) {
            let number = |text| u64::from_str_radix(text, 16);
            around = matches!((number(start), number(end)), (Ok(s), Ok(e)) if s <= address && address < e);
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_of_the_right_mapping_counts() {
        let smaps = b"1000-2000 rw-p 0 00:00 0 \nSize: 4 kB\nVmFlags: rd gu ac \n\
            2000-4000 rw-p 0 00:00 0 \nVmFlags: rd wr \n";
        assert!(marked(smaps, 0x1800));
        assert!(!marked(smaps, 0x2000));
        assert!(!marked(smaps, 0x4000));
    }

    #[test]
    fn asking_leaves_nothing_behind() {
        assert_eq!(guards_are_shown(), guards_are_shown());
    }
}
