//! Everything that reads what other programs have written is given bytes that nobody means, and has to
//! come back with a value or an error.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use fastrand::Rng;
use ferry_oci::criu::{self, DumpRecord, Pagemap, parse_mappings, rpc};
use ferry_oci::pages::areas::{parse_maps, parse_smaps};
use ferry_oci::pages::stream::Decoder;
use ferry_oci::runc::last_error;

/// Inputs to each decoder.
const TIMES: usize = 20_000;
/// Inputs to each that reads a file.
const FILES: usize = 3_000;
const SEED: &str = "FERRY_SEED";

fn rng() -> Result<Rng> {
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse().context("FERRY_SEED is no number")?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
    };
    println!("{SEED}={seed}");
    Ok(Rng::with_seed(seed))
}

/// One of `samples` with some bytes changed, cut out or put in.
fn input(rng: &mut Rng, samples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = samples[rng.usize(..samples.len())].clone();
    for _ in 0..rng.usize(0..6) {
        let at = rng.usize(0..=bytes.len());
        match rng.u8(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(0..8),
            1 => bytes.truncate(at),
            2 => drop(bytes.splice(at..at, (0..rng.usize(1..20)).map(|_| rng.u8(..)))),
            3 => drop(bytes.splice(at..at, [0xff; 9])),
            _ => drop(bytes.drain(at..bytes.len().min(at + rng.usize(0..9)))),
        }
    }
    bytes
}

fn all(
    rng: &mut Rng,
    what: &str,
    samples: &[Vec<u8>],
    times: usize,
    decode: impl Fn(&[u8]) -> bool,
) {
    let accepted = (0..times).filter(|_| decode(&input(rng, samples))).count();
    println!("{what}: {times} inputs, {accepted} accepted");
    assert!(accepted > 0, "{what}: the samples are no longer accepted");
}

#[test]
fn decoders_of_bytes_give_a_value_or_an_error() -> Result<()> {
    let mut rng = rng()?;
    // A notify of CRIU with a pid, and an answer with a version.
    let notify = b"\x08\x06\x10\x01\x2a\x10\x0a\x0cpost-restore\x10\x07".to_vec();
    let answer = b"\x08\x01\x10\x01\x52\x04\x08\x04\x10\x02".to_vec();
    all(&mut rng, "messages of CRIU", &[notify.clone(), answer], TIMES, |b| {
        rpc::parse(b).is_some()
    });
    let changes = || rpc::Changes { images_fd: 3, work_fd: 4, log_level: Some(rpc::QUIET) };
    all(&mut rng, "requests to CRIU", &[notify], TIMES, |b| rpc::amend(b, changes()).is_some());

    let maps = std::fs::read("/proc/self/maps")?;
    all(&mut rng, "maps", &[maps], FILES, |b| parse_maps(b).is_ok());
    let smaps = std::fs::read("/proc/self/smaps")?;
    all(&mut rng, "smaps", &[smaps], FILES / 10, |b| parse_smaps(b).is_ok());

    let image = |entries: &[&[u8]]| {
        let mut bytes = [0x5456_4319_u32, 0x5608_4025].map(u32::to_le_bytes).concat();
        for entry in entries {
            bytes.extend((entry.len() as u32).to_le_bytes());
            bytes.extend(*entry);
        }
        bytes
    };
    let pagemap = image(&[b"\x08\x01", b"\x08\x80\x20\x10\x05\x20\x04"]);
    let parse = |b: &[u8]| Pagemap::parse(b).is_ok() | parse_mappings(b).is_ok();
    all(&mut rng, "images of CRIU", &[pagemap, image(&[b"\x08\x01"])], TIMES, parse);

    let header = b"FERRYPGS\x01\0\0\0\0\0".to_vec();
    all(&mut rng, "streams of pages", &[header], TIMES, |bytes| {
        let mut decoder = Decoder::new();
        let pushed = decoder.push(bytes).is_ok();
        for _ in 0..100 {
            match decoder.next() {
                Ok(Some(_)) => {}
                _ => break,
            }
        }
        pushed
    });
    Ok(())
}

#[test]
fn decoders_of_files_give_a_value_or_an_error() -> Result<()> {
    let mut rng = rng()?;
    let folder = std::env::temp_dir().join(format!("ferry-decoders-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let with = |name: &str, bytes: &[u8], read: &dyn Fn(&Path) -> bool| {
        let file = folder.join(name);
        std::fs::write(&file, bytes).is_ok() && read(&file)
    };
    let runc =
        b"{\"level\":\"error\",\"msg\":\"exec: \\\"x\\\": not found\",\"time\":\"t\"}\n".to_vec();
    all(&mut rng, "runc's log", &[runc], FILES, |b| {
        with("log.json", b, &|file| matches!(last_error(file), Ok(Some(_))))
    });
    let log = b"(00.000001) Version: 4.2.1 (gitid 0)\n(00.000002) CRIU run id = 1a-2b\n\
                (00.1) 7: Error (criu/a.c:1): Can't lookup mount=1\n(00.2) Error (b.c:2): x\n";
    all(&mut rng, "CRIU's log", &[log.to_vec()], FILES, |b| {
        with("dump.log", b, &|file| {
            let failure = criu::failure(file).map(|failure| failure.to_string());
            criu::version(file).is_ok() & criu::run_ids(file).is_ok() & failure.is_ok()
        })
    });
    let record = DumpRecord::new(Default::default(), "4.2.1".into(), "1.3.6".into());
    record.write(&folder)?;
    let record = std::fs::read(folder.join(criu::RECORD_FILE))?;
    all(&mut rng, "records of dumps", &[record], FILES, |b| {
        with(criu::RECORD_FILE, b, &|_| DumpRecord::read(&folder).is_ok())
    });
    std::fs::remove_dir_all(&folder).context("remove the files")
}
