use super::*;

fn task(pid: i32, ranges: &[(u64, u64)]) -> HiddenTask {
    let range = |&(start, end)| HiddenRange { start, end, guards: false };
    HiddenTask { pid, ranges: ranges.iter().map(range).collect(), smaps: None }
}

fn hiding(folder: &Path) -> Hiding {
    Hiding::prepare(folder, Path::new("/opt/libferry_hide.so")).unwrap()
}

#[test]
fn orders_are_words_with_a_checksum() {
    let guarded = HiddenRange { start: 0x9000, end: 0xa000, guards: true };
    let mut orders = Orders { tasks: vec![task(5, &[(0x1000, 0x3000)]), task(6, &[])] };
    orders.tasks[0].ranges.push(guarded);
    orders.tasks[1].smaps = Some(StoredSmaps::new(6, &[b'x'; 77]));
    let bytes = orders.encode().unwrap();
    let words: Vec<_> =
        bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(&bytes[..8], b"ferryhid");
    assert_eq!(words[1..4], [1, 2, 2]);
    assert_eq!(words[4], f::checksum(words.iter().copied()));
    assert_eq!(words[5..], [5, 0, 0, 2, 6, 1, 77, 0, 0x1000, 0x3000, 0x9001, 0xa000]);
}

#[test]
fn orders_that_make_no_sense_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let hiding = hiding(dir.path());
    let write = |task: HiddenTask| hiding.write(&Orders { tasks: vec![task] });
    for ranges in [
        &[(0x1000, 0x1000)][..],
        &[(0x1000, 0x1001)],
        &[(0x1, 0x1000)],
        &[(0x3000, 0x4000), (0x1000, 0x2000)],
        &[(0x1000, 0x3000), (0x2000, 0x4000)],
    ] {
        let err = write(task(5, ranges)).unwrap_err();
        assert!(matches!(err, HideError::Range(_, _, 5)), "{err}");
    }
    assert!(matches!(write(task(0, &[])), Err(HideError::Pid(0))));
    let smaps = Some(hiding.store_smaps(7, b"").unwrap());
    let err = write(HiddenTask { smaps, ..task(8, &[]) }).unwrap_err();
    assert!(matches!(err, HideError::Smaps(7, 8)), "{err}");
    assert!(!dir.path().join(f::ORDERS).exists());
    write(task(5, &[(0x1000, 0x2000)])).unwrap();
    assert!(dir.path().join(f::ORDERS).exists());
}

#[test]
fn a_folder_used_before_starts_without_orders() {
    let dir = tempfile::tempdir().unwrap();
    hiding(dir.path()).write(&Orders::default()).unwrap();
    std::fs::write(dir.path().join(f::REPORT), "old").unwrap();
    assert_eq!(hiding(dir.path()).report().unwrap(), None);
    assert!(!dir.path().join(f::ORDERS).exists());
}

#[test]
fn a_report_of_another_kind_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let hiding = hiding(dir.path());
    for text in [&b""[..], &[0; 300]] {
        std::fs::write(dir.path().join(f::REPORT), text).unwrap();
        assert_eq!(hiding.report().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

#[test]
fn a_library_that_would_be_read_as_two_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let err = Hiding::prepare(dir.path(), Path::new("/a b/libferry_hide.so")).unwrap_err();
    assert!(matches!(err, HideError::Path(_)), "{err}");
}

#[test]
fn the_environment_names_library_and_folder() {
    let dir = tempfile::tempdir().unwrap();
    let [preload, folder] = hiding(dir.path()).env();
    assert_eq!(preload.0, "LD_PRELOAD");
    assert!(preload.1.to_str().unwrap().starts_with("/opt/libferry_hide.so"));
    assert_eq!(folder, ("FERRY_HIDE", dir.path().into()));
}
