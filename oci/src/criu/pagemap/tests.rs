use super::super::decode::{encode, image};
use super::*;

const ANONYMOUS: u32 = 0x22;

fn message(fields: &[(u64, u64)]) -> Vec<u8> {
    fields.iter().flat_map(|(field, value)| encode::number(*field, *value)).collect()
}

fn mm(mappings: &[(u64, u64, u32, u32)]) -> Vec<u8> {
    let mut record = message(&[(1, 0x40_0000), (12, 3), (13, u64::MAX)]);
    for (start, end, flags, status) in mappings {
        let mapping =
            [(1, *start), (2, *end), (3, 0), (6, u64::from(*flags)), (7, u64::from(*status))];
        let mut mapping = message(&mapping);
        // A negative number, ten bytes long.
        mapping.extend(encode::number(8, u64::MAX));
        record.extend(encode::bytes(14, &mapping));
    }
    record.extend(message(&[(15, 1)]));
    image(MM_MAGIC, &[record])
}

fn hide(start: u64, end: u64) -> HiddenRange {
    HiddenRange { start, end, guards: true }
}

fn run_of(start: u64, end: u64) -> PageRun {
    PageRun { start, end, in_parent: false, lazy: false, present: true }
}

#[test]
fn old_and_new_pagemaps_are_read() {
    let records = [
        message(&[(1, 7)]),
        message(&[(1, 0x1000), (2, 2), (4, 4), (5, 2)]),
        message(&[(1, 0x9000), (2, 1), (4, 6)]),
        message(&[(1, 0x2_0000), (2, 0), (4, 2), (5, 1 << 33)]),
        message(&[(1, 1 << 50), (2, 3), (3, 1)]),
        message(&[(1, 1 << 51), (2, 3)]),
    ];
    let pagemap = Pagemap::parse(&image(PAGEMAP_MAGIC, &records)).unwrap();
    assert_eq!(pagemap.pages_id, 7);
    assert_eq!(pagemap.runs[0], run_of(0x1000, 0x3000));
    assert_eq!(pagemap.runs[1], PageRun { lazy: true, ..run_of(0x9000, 0xa000) });
    let far = PageRun { lazy: true, present: false, ..run_of(0x2_0000, 0x2_0000 + (1 << 45)) };
    assert_eq!(pagemap.runs[2], far);
    assert!(pagemap.runs[3].in_parent && !pagemap.runs[3].present);
    assert!(pagemap.runs[4].present && !pagemap.runs[4].in_parent);
    assert_eq!(pagemap.bytes(), 6 * 4096);
}

#[test]
fn an_image_cut_anywhere_is_an_error_or_fewer_records() {
    let records = [message(&[(1, 7)]), message(&[(1, 0x1000), (2, 2), (4, 4)])];
    let whole = image(PAGEMAP_MAGIC, &records);
    for length in 0..whole.len() {
        let ends_well = length == 8 + 4 + records[0].len();
        assert_eq!(Pagemap::parse(&whole[..length]).is_ok(), ends_well, "{length} bytes");
    }
    assert!(Pagemap::parse(&image(MM_MAGIC, &records)).is_err());
    let endless = message(&[(1, u64::MAX - 4095), (2, 2)]);
    assert!(Pagemap::parse(&image(PAGEMAP_MAGIC, &[message(&[]), endless])).is_err());
}

#[test]
fn only_plain_private_memory_is_lazy() {
    let image = mm(&[
        (0x1000, 0x2000, ANONYMOUS, 1 << 9 | 1),
        (0x2000, 0x3000, ANONYMOUS | 0x100, 1 << 9 | 1),
        (0x3000, 0x4000, 0x02, 1 << 6 | 1),
        (0x4000, 0x5000, 0x21, 1 << 8),
        (0x5000, 0x6000, ANONYMOUS | 0x2000, 1 << 9),
        (0x6000, 0x7000, ANONYMOUS | 0x4_0000, 1 << 9),
        (0x7000, 0x8000, ANONYMOUS, 1 << 3),
        (0x8000, 0x9000, ANONYMOUS, 1 << 12),
        (0x9000, 0xa000, ANONYMOUS, 1 << 2),
    ]);
    let lazy: Vec<_> = parse_mappings(&image).unwrap().iter().map(Mapping::can_be_lazy).collect();
    assert_eq!(lazy, [true, true, false, false, false, false, false, false, false]);
}

#[test]
fn hidden_memory_must_be_exactly_the_lazy_memory() {
    let mapping = |start, end, flags| Mapping { start, end, flags, status: 1 << 9 };
    let mappings = [
        mapping(0x1000, 0x3000, ANONYMOUS),
        mapping(0x3000, 0x4000, ANONYMOUS),
        mapping(0x4000, 0x5000, 0x02),
        mapping(0x8000, 0x9000, ANONYMOUS),
    ];
    let pagemap = |runs: &[(u64, u64)]| Pagemap {
        pages_id: 1,
        runs: runs.iter().map(|run| run_of(run.0, run.1)).collect(),
    };
    let file = pagemap(&[(0x4000, 0x5000)]);
    let both = [hide(0x1000, 0x4000), hide(0x8000, 0x9000)];
    check_parsed(&file, &mappings, &both).unwrap();
    let split = [hide(0x1000, 0x2000), hide(0x2000, 0x4000), hide(0x8000, 0x9000)];
    check_parsed(&file, &mappings, &split).unwrap();

    let err = |pagemap: &Pagemap, hidden: &[HiddenRange]| {
        check_parsed(pagemap, &mappings, hidden).unwrap_err()
    };
    assert!(matches!(err(&file, &[]), Leak::NotHidden(0x1000, 0x4000)));
    assert!(matches!(err(&file, &both[..1]), Leak::NotHidden(0x8000, 0x9000)));
    let part = [hide(0x1000, 0x3000), both[1]];
    assert!(matches!(err(&file, &part), Leak::NotHidden(0x3000, 0x4000)));
    let late = [hide(0x2000, 0x4000), both[1]];
    assert!(matches!(err(&file, &late), Leak::NotHidden(0x1000, 0x2000)));
    let much = [hide(0x1000, 0x5000), both[1]];
    assert!(matches!(err(&file, &much), Leak::NotLazy(0x4000, 0x5000)));
    let other = [both[0], hide(0x7000, 0x9000)];
    assert!(matches!(err(&file, &other), Leak::NotLazy(0x7000, 0x8000)));
    let leak = pagemap(&[(0x2000, 0x3000), (0x4000, 0x5000)]);
    assert!(matches!(err(&leak, &both), Leak::InImages(0x2000, 0x3000)));
}

#[test]
fn only_pages_images_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    for (name, size) in [("pages-1.img", 5000), ("pages-2.img", 1), ("pagemap-1.img", 900)] {
        std::fs::write(dir.path().join(name), vec![0; size]).unwrap();
    }
    assert_eq!(pages_bytes(dir.path()).unwrap(), 5001);
}
