//! A store against a plain model, its limits, and a writer that is killed.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;

const P: usize = PAGE as usize;

fn limits(memory: u64, disk: u64) -> (Limits, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("folder");
    let limits =
        Limits { memory, disk, max_pages: 4096, spill_dir: dir.path().into(), ..Limits::default() };
    (limits, dir)
}

fn page(seed: u64) -> [u8; P] {
    let mut page = [0; P];
    for (at, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(seed * 1000 + at as u64 + 1).to_le_bytes());
    }
    page
}

/// A generator of numbers that are the same every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn a_store_holds_what_a_plain_map_would_hold_in_memory_and_on_disk() {
    let (limits, _dir) = limits(300 * PAGE, 10_000 * PAGE);
    let mut store = Store::create(&limits).expect("store");
    let mut model: BTreeMap<(u32, u64), [u8; P]> = BTreeMap::new();
    let mut numbers = Numbers(7);
    for step in 0..3000 {
        let space = numbers.below(3) as u32;
        // Around the border of two chunks, and far up.
        let addr = [CHUNK - 64 * PAGE, 0x7fff_0000_0000][numbers.below(2) as usize]
            + numbers.below(200) * PAGE;
        match numbers.below(6) {
            0..=2 => {
                let mut data = Vec::new();
                for at in 0..1 + numbers.below(20) {
                    let content =
                        if numbers.below(5) == 0 { [0; P] } else { page(step * 100 + at) };
                    model.insert((space, addr + at * PAGE), content);
                    data.extend(content);
                }
                store.write(space, addr, &data).expect("write");
            }
            3 => {
                let to = (numbers.below(3) as u32, addr + numbers.below(9) * PAGE);
                let content = model.get(&(space, addr)).copied().unwrap_or([0; P]);
                model.insert(to, content);
                store.copy_page((space, addr), to).expect("copy");
            }
            4 => {
                let end = addr + numbers.below(40) * PAGE;
                model.retain(|(s, a), _| *s != space || *a < addr || *a >= end);
                store.remove(space, addr, end).expect("remove");
            }
            _ if numbers.below(100) == 0 => {
                model.retain(|(s, _), _| *s != space);
                store.remove_space(space).expect("remove");
            }
            _ => {}
        }
        model.retain(|_, content| *content != [0; P]);
    }
    assert!(
        store.disk > 0 && (1..=300).contains(&store.memory),
        "{store:?}: pages must have gone to disk"
    );
    assert_eq!(store.pages(), model.len() as u64);
    let mut read = [0; P];
    for ((space, addr), content) in &model {
        assert!(store.read(*space, *addr, &mut read).expect("read"), "{space} {addr:#x}");
        assert_eq!(&read, content);
    }
    let hashes: BTreeMap<_, _> = store.hashes().map(|(s, a, h)| ((s, a), h)).collect();
    let expected = model.iter().map(|(key, content)| (*key, hash(content))).collect();
    assert_eq!(hashes, expected);
    assert_eq!(store.verify().expect("verify"), 0);
}

#[test]
fn a_full_store_names_its_limit_and_keeps_what_it_has() {
    let (small, _dir) = limits(3 * PAGE, 2 * PAGE);
    let mut store = Store::create(&small).expect("store");
    let data: Vec<u8> = (0..6).flat_map(page).collect();
    let error = store.write(1, 0, &data).expect_err("six pages in five");
    assert_eq!(error.to_string(), "page store is full: memory + disk allows 20480");
    assert_eq!((store.memory, store.disk), (3, 2));
    store.write(1, 0, &page(9)).expect("over a page that is there");
    assert_eq!(store.verify().expect("verify"), 0);
    store.remove(1, 0, PAGE).expect("remove");
    store.write(1, 5 * PAGE, &page(5)).expect("room again");

    let (limits, _dir) = limits(1 << 30, 0);
    let mut store = Store::create(&Limits { max_pages: 2, ..limits }).expect("store");
    let error = store.write(1, 0, &data).expect_err("six pages in two");
    assert_eq!(error.to_string(), "page store is full: max_pages allows 2");
    assert_eq!(store.pages(), 2);
}

#[test]
fn what_is_not_made_of_whole_pages_is_refused() {
    let (limits, _dir) = limits(1 << 20, 0);
    let mut store = Store::create(&limits).expect("store");
    assert!(matches!(store.write(1, 1, &page(1)), Err(StoreError::Unaligned { .. })));
    assert!(matches!(store.write(1, 0, &[1; 100]), Err(StoreError::Unaligned { .. })));
    assert!(matches!(store.write(1, 1 << 57, &page(1)), Err(StoreError::Unaligned { .. })));
    assert!(matches!(store.remove(1, PAGE, 0), Err(StoreError::Unaligned { .. })));
    assert_eq!(store.pages(), 0);
}

#[test]
fn a_removed_page_gives_its_room_back() {
    let (limits, _dir) = limits(1 << 30, 0);
    let mut store = Store::create(&limits).expect("store");
    let data: Vec<u8> = (0..512).flat_map(page).collect();
    let blocks = |store: &Store| {
        use std::os::unix::fs::MetadataExt;
        store.arena.files.data.metadata().expect("metadata").blocks() * 512 / PAGE
    };
    store.write(1, 0, &data).expect("write");
    assert_eq!(blocks(&store), 512);
    store.write(1, 0, &[0; 100 * P]).expect("zeros");
    store.remove(1, 400 * PAGE, 412 * PAGE).expect("remove");
    assert_eq!(blocks(&store), 400);
}

#[test]
fn verify_takes_out_pages_that_changed_behind_their_hash() {
    let (limits, _dir) = limits(2 * PAGE, 9 * PAGE);
    let mut store = Store::create(&limits).expect("store");
    let data: Vec<u8> = (0..6).flat_map(page).collect();
    store.write(1, 0, &data).expect("write");
    store.arena.files.data.write_all_at(b"x", PAGE + 100).expect("damage in memory");
    let spill = store.arena.files.spill.as_ref().expect("spill file");
    spill.write_all_at(b"x", 4 * PAGE + 4095).expect("damage on disk");
    assert_eq!(store.verify().expect("verify"), 2);
    let left: Vec<u64> = store.hashes().map(|(_, addr, _)| addr / PAGE).collect();
    assert_eq!(left, [0, 2, 3, 5]);
    assert_eq!((store.memory, store.disk), (1, 3));
}

#[test]
fn a_writer_killed_anywhere_leaves_no_torn_page_that_counts() {
    for point in ["store-after-clear", "store-in-data", "store-after-data", "store-after-hash"] {
        let (limits, _dir) = limits(1 << 30, 0);
        let mut store = Store::create(&limits).expect("store");
        let old: Vec<u8> = (0..8).flat_map(page).collect();
        store.write(1, CHUNK - 4 * PAGE, &old).expect("write");
        // The writer is another process that is given the files as its descriptors.
        let fds = [&store.arena.files.index, &store.arena.files.data];
        let fds = fds.map(|file| file.as_fd().try_clone_to_owned().expect("descriptor"));
        for fd in &fds {
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
                .expect("let it be inherited");
        }
        let list = fds.iter().map(|fd| std::os::fd::AsRawFd::as_raw_fd(fd).to_string());
        let status = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "pages::store::tests::writer", "--nocapture"])
            .env("FERRY_STORE_FDS", list.collect::<Vec<_>>().join(","))
            .env("FERRY_STORE_FAULT", point)
            .stdout(std::process::Stdio::null())
            .status()
            .expect("writer");
        assert_eq!(status.signal(), Some(9), "{point}: the writer must have been killed");

        let lease = fds[0].try_clone().expect("any descriptor");
        let mut store = Store::attach(fds.into(), lease).expect("attach");
        let mut read = [0; P];
        for at in 0..8 {
            let there = store.read(1, CHUNK - 4 * PAGE + at * PAGE, &mut read).expect("read");
            let right = read == page(at) || read == page(100 + at);
            assert!(!there || right, "{point}: page {at} counts and is torn");
            assert!(there || at < 4, "{point}: page {at} was not being written");
        }
        assert_eq!(store.pages(), 4, "{point}: four were being written");
        assert_eq!(store.verify().expect("verify"), 0);
        let new: Vec<u8> = (100..108).flat_map(page).collect();
        store.write(1, CHUNK - 4 * PAGE, &new).expect("the next writer goes on");
        assert_eq!((store.pages(), store.verify().expect("verify")), (8, 0));
    }
}

/// The writer of the test above; by itself it does nothing.
#[test]
#[allow(unsafe_code)]
fn writer() {
    let Ok(list) = std::env::var("FERRY_STORE_FDS") else { return };
    use std::os::fd::FromRawFd;
    let fds: Vec<OwnedFd> = list
        .split(',')
        // SAFETY: descriptors that were left open for this process.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd.parse().expect("number")) })
        .collect();
    let lease = fds[0].try_clone().expect("any descriptor");
    let mut store = Store::attach(fds, lease).expect("attach");
    let new: Vec<u8> = (100..108).flat_map(page).collect();
    store.write(1, CHUNK - 4 * PAGE, &new).expect("write");
}
