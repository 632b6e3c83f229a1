//! Memory of a workload, read in all ways, against what the workload wrote.

use std::collections::BTreeMap;
use std::slice::from_ref;

use super::*;
use crate::pages::tracker::workload::Workload;

/// Reads and gives the pages by address.
fn read(pid: i32, ranges: &[Range<u64>], threads: usize) -> (BTreeMap<u64, Vec<u8>>, ReadPages) {
    let pages = Mutex::new(BTreeMap::new());
    let done = read_pages(pid, ranges, threads, |range, bytes| {
        assert_eq!(range.end - range.start, bytes.len() as u64);
        let mut pages = pages.lock().unwrap();
        for (at, page) in bytes.chunks(PAGE as usize).enumerate() {
            let twice = pages.insert(range.start + at as u64 * PAGE, page.to_vec());
            assert!(twice.is_none());
        }
        Ok(())
    });
    (pages.into_inner().unwrap(), done.unwrap())
}

fn assert_pages(pages: &BTreeMap<u64, Vec<u8>>, start: u64, wanted: impl Iterator<Item = u64>) {
    let mut count = 0;
    for page in wanted {
        let value = page.wrapping_mul(2_654_435_761) ^ 5;
        let bytes = &pages[&(start + page * PAGE)];
        assert_eq!(bytes[..8], value.to_ne_bytes(), "page {page}");
        assert_eq!(bytes[4088..], (value ^ 4088).to_ne_bytes(), "page {page}");
        count += 1;
    }
    assert_eq!(pages.len(), count);
}

#[test]
fn ranges_of_any_size_are_read_by_any_number_of_threads() {
    let mut workload = Workload::start();
    let start = workload.address("map a 5000 rw");
    workload.tell("fill a 0 5000 5");
    let whole = start..start + 5000 * PAGE;
    let scattered: Vec<_> =
        (0..2500).map(|n| start + 2 * n * PAGE..start + (2 * n + 1) * PAGE).collect();
    for threads in 1..4 {
        let (pages, done) = read(workload.pid(), from_ref(&whole), threads);
        assert_eq!((done.bytes, done.missing.len()), (5000 * PAGE, 0));
        assert_pages(&pages, start, 0..5000);
        let (pages, done) = read(workload.pid(), &scattered, threads);
        assert_eq!((done.bytes, done.missing.len()), (2500 * PAGE, 0));
        assert_pages(&pages, start, (0..5000).step_by(2));
    }
    assert_eq!(read(workload.pid(), &[], 2).1, ReadPages::default());
}

#[test]
fn what_the_process_itself_may_not_read_is_read() {
    let mut workload = Workload::start();
    let start = workload.address("map a 3000 rw");
    workload.tell("fill a 0 3000 5");
    workload.tell("protect a none");
    let (pages, done) = read(workload.pid(), from_ref(&(start..start + 3000 * PAGE)), 2);
    assert_eq!((done.bytes, done.missing.len()), (3000 * PAGE, 0));
    assert_pages(&pages, start, 0..3000);
}

#[test]
fn pages_that_are_gone_are_reported_and_the_rest_is_read() {
    let mut workload = Workload::start();
    let start = workload.address("map a 3000 rw");
    workload.tell("fill a 0 3000 5");
    workload.tell("unmap a 100 200");
    workload.tell("unmap a 2999 3000");
    let pieces: Vec<_> =
        (0..60).map(|n| start + 50 * n * PAGE..start + 50 * (n + 1) * PAGE).collect();
    for ranges in [&pieces[..], from_ref(&(start..start + 3000 * PAGE))] {
        let (pages, done) = read(workload.pid(), ranges, 2);
        let missing: u64 = done.missing.iter().map(|r| r.end - r.start).sum();
        assert_eq!(missing, 101 * PAGE, "{:x?}", done.missing);
        assert_eq!(done.bytes, (3000 - 101) * PAGE);
        assert_pages(&pages, start, (0..100).chain(200..2999));
    }
    let pid = workload.pid();
    drop(workload);
    let (pages, done) = read(pid, &pieces, 2);
    assert!(pages.is_empty());
    assert_eq!(done.missing.iter().map(|r| r.end - r.start).sum::<u64>(), 3000 * PAGE);
}

#[test]
fn an_error_of_the_sink_ends_the_reading() {
    let mut workload = Workload::start();
    let start = workload.address("map a 5000 rw");
    workload.tell("fill a 0 5000 5");
    let calls = AtomicUsize::new(0);
    let ranges = vec![start..start + 5000 * PAGE, start + 6000 * PAGE..start + 6001 * PAGE];
    let done = read_pages(workload.pid(), &ranges, 1, |_, _| {
        calls.fetch_add(1, Ordering::SeqCst);
        Err(io::Error::other("full"))
    });
    assert_eq!(done.unwrap_err().to_string(), "full");
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}
