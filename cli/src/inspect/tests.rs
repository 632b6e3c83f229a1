//! Archives, good and bad.

use std::io::{self, Cursor, Write};

use ferry_oci::criu::images::{Source, Span};

use super::archive::Archive;
use super::report::Report;
use super::text;
use crate::untar::uncompressed;

/// A header as tar(1) makes it.
fn header(name: &[u8], kind: u8, size: u64) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name);
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

fn entry(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = header(name.as_bytes(), kind, content.len() as u64);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend([0; 1024]);
    bytes
}

fn read(bytes: Vec<u8>) -> io::Result<Archive> {
    Archive::read(Box::new(move || uncompressed(Cursor::new(bytes.clone()))))
}

fn pax(lines: &[(&str, &str)]) -> Vec<u8> {
    let line = |(key, value): &(&str, &str)| {
        let rest = format!(" {key}={value}\n");
        let length =
            (1..4).map(|n| n + rest.len()).find(|l| l.to_string().len() + rest.len() == *l);
        format!("{}{rest}", length.unwrap())
    };
    entry("PaxHeaders/x", b'x', lines.iter().map(line).collect::<String>().as_bytes())
}

fn good() -> Vec<u8> {
    let mut pages = vec![7; 5000];
    pages[4000..4005].copy_from_slice(b"hello");
    archive(&[
        entry("./", b'5', b""),
        entry(
            "config.dump",
            b'0',
            br#"{"name":"box","rootfsImageName":"busybox","runtime":"runc"}"#,
        ),
        entry("dump.log", b'0', b"(0.1) Version: 4.2.1 (gitid 0)\n"),
        entry("checkpoint", b'5', b""),
        entry("checkpoint/pages-1.img", b'0', &pages),
        entry("checkpoint/inventory.img", b'0', b"inventory"),
        pax(&[("mtime", "1.5"), ("path", "checkpoint/core-1.img")]),
        entry("short", b'0', b"core"),
        entry("././@LongLink", b'L', b"checkpoint/mm-1.img\0"),
        entry("short", b'0', b"mm"),
        entry("checkpoint/parent", b'2', b""),
    ])
}

#[test]
fn images_are_found_whatever_the_archive_is_packed_with() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&good()).unwrap();
    let zstd = zstd::stream::encode_all(good().as_slice(), 1).unwrap();
    for bytes in [good(), gzip.finish().unwrap(), zstd] {
        let mut archive = read(bytes).unwrap();
        let mut report = Report::new("archive", "x".into());
        report.take_records(&mut archive).unwrap();
        assert_eq!(report.container.as_deref(), Some("box"));
        assert_eq!(report.image.as_deref(), Some("busybox"));
        assert_eq!(report.versions.criu.as_deref(), Some("4.2.1"));
        archive.enter("checkpoint/");
        let names = ["core-1.img", "inventory.img", "mm-1.img", "pages-1.img", "parent"];
        assert_eq!(archive.names(), names);
        assert_eq!(archive.read("core-1.img").unwrap().unwrap(), b"core");
        assert_eq!(archive.read("mm-1.img").unwrap().unwrap(), b"mm");
        assert_eq!(archive.size("pages-1.img"), Some(5000));
        let span = |offset, length| Span { name: "pages-1.img".into(), offset, length };
        let spans = [span(4002, 3), span(0, 2), span(4000, 2), span(4999, 2), span(u64::MAX, 1)];
        let found = archive.pages(&spans).unwrap();
        assert_eq!(found, [&b"llo"[..], &[7, 7], b"he", b"", b""]);
    }
}

#[test]
fn what_leads_out_of_an_archive_is_refused() {
    let bad = [
        (entry("../inventory.img", b'0', b""), "leads out"),
        (entry("a/../../b", b'0', b""), "leads out"),
        (entry("/etc/passwd", b'0', b""), "leads out"),
        ([pax(&[("path", "../x")]), entry("x", b'0', b"")].concat(), "leads out"),
        (entry("core-1.img", b'2', b""), "is a link"),
        (entry("core-1.img", b'1', b""), "is a link"),
        (entry("core-1.img", b'6', b""), "neither a file"),
        (entry("core-1.img", b'S', b""), "neither a file"),
        ([pax(&[("GNU.sparse.major", "1")]), entry("x", b'0', b"")].concat(), "with holes"),
        ([entry("a.img", b'0', b""), entry("./a.img", b'0', b"")].concat(), "twice"),
        (header(b"core-1.img", b'0', 1 << 32), "no such image has more"),
        (header(b"x", b'x', 1 << 32), "too long"),
        (header(b"x", b'L', 1 << 32), "too long"),
        (b"not a tar archive".repeat(40), "no tar archive"),
    ];
    for (bytes, why) in bad {
        let error = read(archive(&[bytes])).err().map(|error| error.to_string());
        assert!(error.as_ref().is_some_and(|error| error.contains(why)), "{why}: {error:?}");
    }
}

#[test]
fn an_archive_cut_anywhere_is_an_error() {
    let whole = good();
    let end = whole.len() - 512;
    for length in (0..end).step_by(13).chain(end - 511..end) {
        assert!(read(whole[..length].to_vec()).is_err(), "{length} bytes");
    }
    assert!(read(whole[..end].to_vec()).is_ok());
}

#[test]
fn a_spoiled_archive_is_an_error_or_another_one_but_no_panic() {
    let whole = good();
    let mut refused = 0;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        refused += usize::from(read(bytes).is_err());
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn text_of_a_checkpoint_gives_the_terminal_no_orders() {
    assert_eq!(text::clean("a\x1b[2Jb\u{202e}c é"), "a\\u{1b}[2Jb\\u{202e}c é");
    assert_eq!(text::size(5000), "4.9 KiB");
    let mut report = Report::new("folder", "/x".into());
    report.container = Some("\x1b]0;gotcha\x07".into());
    assert!(!text::of(&report).contains('\x1b'));
}

#[test]
fn text_tells_how_long_a_container_stood_still_if_it_went_on() {
    for (frozen, told) in [(0, false), (1500, true)] {
        let mut report = Report::new("image", "x".into());
        let record = format!(r#"{{"statistics":{{"frozen_us":{frozen},"dump_us":2000}}}}"#);
        report.recorded(serde_json::from_str(&record).unwrap());
        let text = text::of(&report);
        assert_eq!(text.contains("frozen 1.5 ms"), told, "{text}");
        assert!(text.contains("dumped in 2.0 ms") && !text.contains("frozen 0"), "{text}");
    }
}

#[test]
fn records_may_lack_anything() {
    let mut report = Report::new("image", "x".into());
    for text in [
        "{}",
        r#"{"version":1,"criu":"","options":{"file_locks":true},"statistics":{"frozen_us":1}}"#,
        r#"{"version":9,"ferry":"0.1.0","criu":"4.2.1","exit":true,"more":[1]}"#,
    ] {
        report.recorded(serde_json::from_str(text).unwrap());
    }
    assert_eq!(report.versions.record, Some(1));
    assert_eq!(report.versions.criu.as_deref(), Some("4.2.1"));
    assert_eq!(report.exit, Some(true));
    assert!(report.options.unwrap().file_locks);
}
