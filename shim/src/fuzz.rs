//! Decoders of what clients send and runc writes: whatever the bytes, a value or an error.

use crate::options::{self, TaskOptions};
use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim::oci;
use fastrand::Rng;
use std::time::{SystemTime, UNIX_EPOCH};

/// Inputs to each decoder.
const TIMES: usize = 20_000;

fn rng() -> Rng {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("FERRY_SEED").map_or(now, |seed| seed.parse().unwrap());
    println!("FERRY_SEED={seed}");
    Rng::with_seed(seed)
}

/// `sample` with some bytes changed, cut out or put in.
fn mutated(rng: &mut Rng, sample: &[u8]) -> Vec<u8> {
    let mut bytes = sample.to_vec();
    for _ in 0..rng.usize(0..6) {
        let at = rng.usize(0..=bytes.len());
        match rng.u8(0..4) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(0..8),
            1 => bytes.truncate(at),
            2 => drop(bytes.splice(at..at, [0xff; 9])),
            _ => drop(bytes.splice(at..at, (0..rng.usize(1..20)).map(|_| rng.u8(..)))),
        }
    }
    bytes
}

/// Decodes `TIMES` inputs; the sample itself is accepted.
fn all(what: &str, sample: &[u8], decode: impl Fn(&[u8]) -> bool) {
    let mut rng = rng();
    let accepted = (0..TIMES).filter(|_| decode(&mutated(&mut rng, sample))).count();
    println!("{what}: {TIMES} inputs, {accepted} accepted");
    assert!(decode(sample), "{what}: the sample is refused");
}

#[test]
fn options_are_decoded_or_refused() {
    let sent = oci::Options {
        binary_name: "crun".into(),
        root: "/r".into(),
        systemd_cgroup: true,
        io_uid: 7,
        ..Default::default()
    };
    let url = "type.googleapis.com/containerd.runc.v1.Options";
    let sample = Any { type_url: url.into(), value: sent.write_to_bytes().unwrap(), ..Any::new() };
    all("options of a task", &sample.write_to_bytes().unwrap(), |bytes| {
        let any = Any::parse_from_bytes(bytes);
        any.is_ok_and(|any| TaskOptions::decode(Some(&any)).is_ok())
    });
    let sent = oci::CheckpointOptions { exit: true, image_path: "/i".into(), ..Default::default() };
    let value = sent.write_to_bytes().unwrap();
    all("options of a checkpoint", &value, |value| {
        let url = "containerd.runc.v1.CheckpointOptions".into();
        let any = Any { type_url: url, value: value.to_vec(), ..Any::new() };
        options::checkpoint(Some(&any)).is_ok()
    });
}

#[test]
fn options_kept_in_a_bundle_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let sample = br#"{"binary_name":"crun","io_uid":7,"systemd_cgroup":true}"#;
    all("options.json", sample, |bytes| {
        std::fs::write(dir.path().join("options.json"), bytes).unwrap();
        TaskOptions::read(dir.path()).is_ok()
    });
}

#[test]
fn names_of_streams_are_parsed_or_refused() {
    let parse = |name: &[u8]| crate::io::is_served(&String::from_utf8_lossy(name));
    all("streams", b"file:///var/log/a%20b?x=1&y=%2", parse);
    all("streams", b"fifo:///run/containerd/fifo/1/t-stdout", parse);
}
