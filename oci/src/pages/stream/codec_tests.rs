//! Every record goes out and comes back, in chunks of any size; whatever is not a record is refused
//! before anything of it is seen.

use super::super::decode::{Decoder, MAX_CHUNK, Record};
use super::super::error::DecodeError;
use super::super::testing::Random;
use super::*;

/// A record as it is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Sample {
    Pages(u32, Vec<Run>, Vec<u8>),
    Same(u32, Vec<SameRun>),
    Gone(u32, Vec<Range<u64>>),
    SpaceGone(u32),
    RoundEnd(u32, u64),
    Hashes(u32, Vec<Run>, Vec<u128>),
}

fn keep(record: Record<'_>) -> Sample {
    match record {
        Record::Pages { space, runs, data } => Sample::Pages(space, runs.into(), data.into()),
        Record::Same { space, runs } => Sample::Same(space, runs.into()),
        Record::Gone { space, ranges } => Sample::Gone(space, ranges.into()),
        Record::SpaceGone { space } => Sample::SpaceGone(space),
        Record::RoundEnd { round, pages } => Sample::RoundEnd(round, pages),
        Record::Hashes { space, runs, hashes } => Sample::Hashes(space, runs.into(), hashes.into()),
    }
}

fn run(addr: u64, pages: u16) -> Run {
    Run { addr, pages }
}

/// One of each kind, the last address of all among them. Batches have up to `most` pages.
fn samples(most: u16) -> Vec<Sample> {
    let data = |pages: usize| Random(pages as u64).bytes(pages * 4096);
    let top = u64::MAX - PAGE + 1;
    vec![
        Sample::Pages(1, vec![run(0, 1), run(top - PAGE, 1)], data(2)),
        Sample::Pages(u32::MAX, vec![run(0x7000, most)], data(most.into())),
        Sample::Pages(3, vec![run(0x7000, most)], vec![9; usize::from(most) * 4096]),
        Sample::Same(1, vec![SameRun { addr: 0, from_space: 2, from_addr: 4096, pages: 3 }]),
        Sample::Gone(1, vec![0..4096, 8192..top]),
        Sample::SpaceGone(7),
        Sample::Hashes(1, vec![run(4096, 2), run(0x9000, 1)], vec![u128::MAX, 2, 3]),
    ]
}

/// The whole stream of `samples`, and where each record begins.
fn encode(samples: &[Sample]) -> (Vec<u8>, Vec<usize>) {
    let (mut out, mut tally, mut at, mut round) = (Vec::new(), Tally::new(), Vec::new(), 0);
    put_header(&mut out);
    for sample in samples {
        at.push(out.len());
        let (check, pages) = match sample {
            Sample::Pages(space, runs, data) => {
                let packed = zstd::bulk::compress(data, 1).unwrap();
                let small = packed.len() < data.len();
                let (encoding, contents) = if small { (ZSTD, &packed) } else { (RAW, data) };
                let check = put_pages(&mut out, *space, runs, encoding, contents, data);
                out.extend(contents);
                (check, runs.iter().map(|run| u64::from(run.pages)).sum())
            }
            Sample::Same(space, runs) => {
                let pages = runs.iter().map(|run| u64::from(run.pages)).sum();
                (put_same(&mut out, *space, runs), pages)
            }
            Sample::Gone(space, ranges) => (put_gone(&mut out, *space, ranges), 0),
            Sample::SpaceGone(space) => (put_space_gone(&mut out, *space), 0),
            Sample::Hashes(space, runs, hashes) => {
                (put_hashes(&mut out, *space, runs, hashes), hashes.len() as u64)
            }
            Sample::RoundEnd(..) => {
                round += 1;
                put_round_end(&mut out, round, tally.take());
                continue;
            }
        };
        tally.add(check, pages);
    }
    at.push(out.len());
    (out, at)
}

fn decode(bytes: &[u8], mut chunk: impl FnMut() -> usize) -> Result<Vec<Sample>, DecodeError> {
    let (mut decoder, mut samples, mut at) = (Decoder::new(), Vec::new(), 0);
    while at < bytes.len() {
        let end = (at + chunk()).min(bytes.len());
        decoder.push(&bytes[at..end])?;
        at = end;
        while let Some(record) = decoder.next()? {
            samples.push(keep(record));
        }
    }
    decoder.finish()?;
    Ok(samples)
}

/// Two rounds.
fn rounds(most: u16) -> Vec<Sample> {
    let mut all = samples(most);
    all.push(Sample::RoundEnd(1, 8 + 2 * u64::from(most)));
    all.extend(samples(most));
    all.push(Sample::RoundEnd(2, 8 + 2 * u64::from(most)));
    all
}

fn whole() -> Vec<Sample> {
    rounds(64)
}

#[test]
fn every_record_comes_back_as_it_was_whatever_the_chunks() {
    let (bytes, _) = encode(&whole());
    let mut random = Random(1);
    for most in [1, 7, 5000, 300_000, MAX_CHUNK] {
        let got = decode(&bytes, || 1 + random.below(most as u64) as usize).unwrap();
        assert!(got == whole(), "chunks of up to {most}");
    }
}

#[test]
fn a_stream_that_ends_early_is_short_and_nothing_else() {
    let (bytes, at) = encode(&whole());
    let mut ends: Vec<_> = at.iter().flat_map(|at| [at - 1, at + 1, at + 5, at + 40]).collect();
    ends.extend([1, 9, 13]);
    // The end of the first round is a fine place to end, and so is the end.
    for end in ends.into_iter().filter(|end| *end < bytes.len()) {
        let result = decode(&bytes[..end], || MAX_CHUNK);
        assert!(matches!(result, Err(DecodeError::Short(_))), "cut at {end}: {result:?}");
    }
    assert_eq!(decode(&bytes[..at[8]], || MAX_CHUNK).map(|all| all.len()), Ok(8));
    assert_eq!(decode(&[], || 1), Ok(Vec::new()));
}

#[test]
fn no_flipped_bit_goes_unseen() {
    let mut all = samples(1);
    all.push(Sample::RoundEnd(1, 10));
    let (bytes, at) = encode(&all);
    let mut random = Random(2);
    // Every bit of the heads, and some of all others.
    let mut bits: Vec<_> = (0..HEADER * 8).collect();
    for at in &at[..at.len() - 1] {
        bits.extend(at * 8..((at + HEAD + 20) * 8).min(bytes.len() * 8));
    }
    bits.extend((0..300).map(|_| random.below(bytes.len() as u64 * 8) as usize));
    for bit in bits {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let result = decode(&damaged, || MAX_CHUNK);
        // A compressed frame has bits that mean nothing.
        let packed = (at[2]..at[3]).contains(&(bit / 8));
        let harmless = |got: &Vec<Sample>| *got == all && packed;
        assert!(!result.is_ok_and(|got| !harmless(&got)), "bit {bit} was not missed");
    }
}

#[test]
fn nothing_of_a_damaged_record_is_seen() {
    let (mut bytes, at) = encode(&whole());
    bytes[at[1] + 5000] ^= 1;
    let mut decoder = Decoder::new();
    decoder.push(&bytes[..MAX_CHUNK.min(bytes.len())]).unwrap();
    assert!(decoder.next().is_ok_and(|record| record.is_some()));
    assert_eq!(decoder.next(), Err(DecodeError::Check("pages")));
    assert_eq!(decoder.next(), Err(DecodeError::Check("pages")), "it stays so");
    assert_eq!(decoder.push(&[0]), Err(DecodeError::Check("pages")));
}

#[test]
fn records_that_are_lost_doubled_or_swapped_are_missed_at_the_end_of_their_round() {
    let (bytes, at) = encode(&whole());
    let (a, b) = (&bytes[at[3]..at[4]], &bytes[at[4]..at[5]]);
    for middle in [&[a][..], &[b], &[], &[b, a], &[a, b, b], &[a, a, b]] {
        let damaged = [&bytes[..at[3]], &middle.concat(), &bytes[at[5]..]].concat();
        let result = decode(&damaged, || MAX_CHUNK);
        assert!(matches!(result, Err(DecodeError::Lost { round: 1, .. })), "{result:?}");
    }
    let twice = [&bytes[..at[8]], &bytes[at[7]..]].concat();
    let result = decode(&twice, || MAX_CHUNK);
    assert_eq!(result, Err(DecodeError::Round { found: 1, due: 2 }));
}

/// One record of `tag` with `body` and a right check.
fn forged(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_header(&mut out);
    let at = out.len();
    out.extend([0; HEAD]);
    out.extend(body);
    seal(&mut out[at..], tag);
    out
}

fn refused(bytes: &[u8]) -> DecodeError {
    decode(bytes, || MAX_CHUNK).unwrap_err()
}

fn fields(space: u32, numbers: &[u64], pages: Option<u16>) -> Vec<u8> {
    let mut body = space.to_le_bytes().to_vec();
    numbers.iter().for_each(|number| body.extend(number.to_le_bytes()));
    pages.iter().for_each(|pages| body.extend(pages.to_le_bytes()));
    body
}

#[test]
fn what_is_no_stream_of_ours_is_refused_by_name() {
    assert_eq!(refused(b"G"), DecodeError::Magic);
    let (bytes, _) = encode(&whole());
    let with = |at: usize, byte: u8| {
        let mut other = bytes[..HEADER].to_vec();
        other[at] = byte;
        other
    };
    assert_eq!(refused(&with(8, 9)), DecodeError::Format(9));
    assert_eq!(refused(&with(11, 64)), DecodeError::PageSize(16384));
    assert_eq!(refused(&forged(99, &[0; 4])), DecodeError::Tag(99));
    assert_eq!(refused(&[&bytes[..HEADER], &[0]].concat()), DecodeError::Tag(0));
}

#[test]
fn a_length_is_refused_before_anything_is_kept_for_it() {
    let mut bytes = forged(GONE, &[]);
    bytes[HEADER + 1..HEADER + 5].copy_from_slice(&(MAX_BODY as u32 + 1).to_le_bytes());
    let error = DecodeError::Length { record: "gone", length: MAX_BODY + 1 };
    assert_eq!(refused(&bytes), error);
    let mut decoder = Decoder::new();
    decoder.push(&vec![0; MAX_CHUNK]).unwrap();
    assert!(matches!(decoder.push(&vec![0; MAX_CHUNK]), Err(DecodeError::TooMuch(_))));
}

#[test]
fn impossible_fields_are_refused_even_with_a_right_checksum() {
    let top = u64::MAX - PAGE + 1;
    let hash = |addr: u64, pages| [fields(1, &[addr], Some(pages)), vec![0; 16]].concat();
    let same = |addr: u64, from: u64, pages: u16| {
        let mut body = fields(1, &[addr], None);
        body.extend(2_u32.to_le_bytes());
        body.extend(from.to_le_bytes());
        body.extend(pages.to_le_bytes());
        body
    };
    let address = |record, addr| DecodeError::Address { record, addr };
    let cases = [
        (SAME, same(0, 4096, 0), DecodeError::Empty("repeated pages")),
        (SAME, same(1, 4096, 1), address("repeated pages", 1)),
        (SAME, same(0, 4097, 1), address("repeated pages", 4097)),
        (SAME, same(0, top, 1), address("repeated pages", top)),
        (SAME, same(top - PAGE, 0, 2), address("repeated pages", top - PAGE)),
        (SAME, fields(1, &[], None), DecodeError::Empty("repeated pages")),
        (GONE, fields(1, &[], None), DecodeError::Empty("gone")),
        (GONE, fields(1, &[4096, 4096], None), address("gone", 4096)),
        (GONE, fields(1, &[8192, 4096], None), address("gone", 8192)),
        (GONE, fields(1, &[0, 4097], None), address("gone", 4097)),
        (GONE, fields(1, &[0], None), DecodeError::Length { record: "gone", length: 12 }),
        (SPACE_GONE, vec![1], DecodeError::Length { record: "process gone", length: 1 }),
        (SPACE_GONE, vec![0; 5], DecodeError::Length { record: "process gone", length: 5 }),
        (HASHES, hash(5, 1), address("hashes", 5)),
        (HASHES, hash(4096, 2), DecodeError::Length { record: "hashes", length: 30 }),
        (HASHES, fields(1, &[], None), DecodeError::Empty("hashes")),
        (ROUND_END, vec![0; 19], DecodeError::Length { record: "round end", length: 19 }),
        (ROUND_END, vec![0; 21], DecodeError::Length { record: "round end", length: 21 }),
    ];
    for (tag, body, error) in cases {
        assert_eq!(refused(&forged(tag, &body)), error, "{body:?}");
    }
}

/// A pages record with a right check, whatever is in it.
fn forged_pages(encoding: u8, runs: &[Run], contents: &[u8], plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_header(&mut out);
    put_pages(&mut out, 1, runs, encoding, contents, plain);
    out.extend(contents);
    out
}

#[test]
fn impossible_pages_are_refused_even_with_a_right_checksum() {
    let page = [1; 4096];
    let packed = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
    let length = |length| DecodeError::Length { record: "pages", length };
    let unpack = DecodeError::Unpack { space: 1, addr: 0 };
    let address = |addr| DecodeError::Address { record: "pages", addr };
    let long = vec![0; 65 * 4096];
    let top = u64::MAX - PAGE + 1;
    let cases = [
        (RAW, vec![], &[][..], DecodeError::Empty("pages")),
        (RAW, vec![run(0, 0)], &[], DecodeError::Empty("pages")),
        (RAW, vec![run(0, 2)], &page, length(7 + 10 + 4096)),
        (RAW, vec![run(0, 1)], &page[1..], length(7 + 10 + 4095)),
        (RAW, vec![run(0, 65)], &long, length(7 + 10 + 65 * 4096)),
        (RAW, vec![run(8, 1)], &page, address(8)),
        (RAW, vec![run(top, 1)], &page, address(top)),
        (2, vec![run(0, 1)], &page, DecodeError::Encoding(2)),
        (ZSTD, vec![run(0, 1)], &page, unpack.clone()),
        (ZSTD, vec![run(0, 2)], &packed(&page), unpack.clone()),
        (ZSTD, vec![run(0, 1)], &packed(&long), unpack),
    ];
    for (encoding, runs, contents, error) in cases {
        assert_eq!(refused(&forged_pages(encoding, &runs, contents, contents)), error, "{runs:?}");
    }
}

#[test]
fn random_bytes_never_come_out_as_a_record_and_never_panic() {
    let (good, at) = encode(&whole());
    let mut random = Random(3);
    for _ in 0..3000 {
        let mut bytes = match random.below(3) {
            0 => good[..HEADER].to_vec(),
            1 => good[..at[random.below(at.len() as u64) as usize]].to_vec(),
            _ => Vec::new(),
        };
        let before = bytes.len();
        let length = random.below(200) as usize;
        bytes.extend(random.bytes(length));
        if random.below(2) == 0 && bytes.len() > before {
            bytes[before] = random.below(8) as u8;
        }
        let limit = at.iter().filter(|at| **at <= before).count();
        let mut decoder = Decoder::new();
        let mut records = 0;
        for chunk in bytes.chunks(MAX_CHUNK) {
            if decoder.push(chunk).is_err() {
                break;
            }
            while let Ok(Some(_)) = decoder.next() {
                records += 1;
            }
        }
        assert!(records <= limit, "random bytes were taken for a record");
    }
}
