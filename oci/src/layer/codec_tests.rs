//! Every record goes out and comes back; whatever is not a record is refused.

use std::path::PathBuf;

use super::*;

fn meta() -> Meta {
    Meta {
        mode: 0o4755,
        uid: 1,
        gid: 70000,
        mtime: Time { seconds: -5, nanoseconds: 999_999_999 },
        xattrs: vec![(b"user.a".to_vec(), vec![0, 255]), (b"user.b".to_vec(), Vec::new())],
    }
}

fn all() -> Vec<Record> {
    let path = || PathBuf::from(OsString::from_vec(b"a/\xff b/c".to_vec()));
    vec![
        Record::Remove { path: path() },
        Record::Dir { path: PathBuf::new(), meta: meta(), clear: false },
        Record::Dir { path: path(), meta: Meta::default(), clear: true },
        Record::File { path: path(), meta: meta(), size: i64::MAX as u64 },
        Record::Symlink { path: path(), meta: meta(), target: "../../etc//passwd".into() },
        Record::Fifo { path: path(), meta: meta() },
        Record::Device { path: path(), meta: meta(), block: true, major: 0, minor: 0 },
        Record::Device { path: path(), meta: meta(), block: false, major: 1, minor: 1 << 19 },
        Record::Link { path: path(), to: "x".into() },
        Record::Times { path: PathBuf::new(), mtime: Time { seconds: 1, nanoseconds: 0 } },
        Record::End { count: 7 },
    ]
}

fn bytes(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_record(&mut bytes, record).unwrap();
    bytes
}

#[test]
fn every_record_comes_back_as_it_was() {
    let mut stream = Vec::new();
    for record in all() {
        write_record(&mut stream, &record).unwrap();
    }
    let mut input = stream.as_slice();
    for record in all() {
        assert_eq!(read_record(&mut input).unwrap(), record);
    }
    assert!(input.is_empty());
}

#[test]
fn an_empty_or_short_stream_is_refused() {
    for record in all() {
        let whole = bytes(&record);
        for len in 0..whole.len() {
            let result = read_record(&mut &whole[..len]);
            assert!(matches!(result, Err(Error::Stream(_))), "{record:?} cut to {len}: {result:?}");
        }
    }
    for len in 0..10 {
        assert!(matches!(read_header(&mut &b"FERRYLYR\x01\x00"[..len]), Err(Error::Stream(_))));
    }
}

#[test]
fn an_unknown_tag_is_refused() {
    for tag in [0u8, 9, 254] {
        assert!(matches!(read_record(&mut [tag; 64].as_slice()), Err(Error::Malformed(_))));
    }
    assert!(matches!(read_extent(&mut [3u8; 16].as_slice()), Err(Error::Malformed(_))));
}

#[test]
fn another_version_is_named_and_another_file_is_refused() {
    let mut header = Vec::new();
    write_header(&mut header).unwrap();
    assert!(read_header(&mut header.as_slice()).is_ok());
    assert!(matches!(read_header(&mut b"FERRYLYR\x02\x01".as_slice()), Err(Error::Version(0x102))));
    assert!(matches!(read_header(&mut b"ustar 00 \x01\x00".as_slice()), Err(Error::Malformed(_))));
}

#[test]
fn a_path_that_leads_out_is_refused() {
    for path in ["/etc", "..", "a/../../b", "a/..", "./a", "a/.", "a//b", "a/", "a\0b", ""] {
        let mut record = vec![1];
        put_bytes(&mut record, path.as_bytes(), MAX_PATH).unwrap();
        let result = read_record(&mut record.as_slice());
        assert!(matches!(result, Err(Error::Malformed(_))), "{path:?}: {result:?}");
    }
}

#[test]
fn lengths_are_bounded_before_memory_is_taken() {
    let long = [&[1][..], &u32::MAX.to_le_bytes()].concat();
    assert!(matches!(read_record(&mut long.as_slice()), Err(Error::Malformed(_))));
    for len in [0, MAX_DATA as u32 + 1, u32::MAX] {
        let extent = [&[1][..], &len.to_le_bytes()].concat();
        assert!(matches!(read_extent(&mut extent.as_slice()), Err(Error::Malformed(_))));
    }
    let path = PathBuf::from("x".repeat(MAX_PATH + 1));
    assert!(matches!(
        write_record(&mut Vec::new(), &Record::Remove { path }),
        Err(Error::Io { .. })
    ));
}

#[test]
fn metadata_that_would_harm_the_destination_is_refused() {
    let refused = |meta: Meta| {
        let record = bytes(&Record::Fifo { path: "a".into(), meta });
        assert!(matches!(read_record(&mut record.as_slice()), Err(Error::Malformed(_))));
    };
    refused(Meta { mode: 0o140_000, ..meta() });
    refused(Meta { uid: u32::MAX, ..meta() });
    refused(Meta { mtime: Time { seconds: 0, nanoseconds: 1_000_000_000 }, ..meta() });
    for name in ["", "trusted.overlay.opaque", "trusted.overlay.redirect", "security.selinux"] {
        refused(Meta { xattrs: vec![(name.into(), b"y".to_vec())], ..meta() });
    }
    let whiteout =
        Record::Device { path: "a".into(), meta: meta(), block: false, major: 0, minor: 0 };
    assert!(matches!(read_record(&mut bytes(&whiteout).as_slice()), Err(Error::Malformed(_))));
}
