//! Requests that nobody means: whatever comes over its socket, the shim lives, and does right what it
//! is asked right afterwards.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use ferry_tests::by_hand::{ByHand, IDLE, Shim, exec_request};
use ferry_tests::task::api::{self, Status};
use ferry_tests::task::protobuf::Message;
use ferry_tests::task::{Refusal, Task};

use crate::SHIMS;
use crate::asked::{METHODS, bytes};

/// Requests in frames that are right.
const REQUESTS: usize = 18_000;
/// Connections with frames that are not.
const CONNECTIONS: usize = 200;
/// Broken frames on each of them.
const FRAMES: usize = 10;
/// Names another run's seed.
const SEED: &str = "FERRY_SEED";
const PATIENCE: Duration = Duration::from_secs(60);

fn seed() -> Result<u64> {
    if let Ok(seed) = std::env::var(SEED) {
        return seed.parse().context("FERRY_SEED is no number");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock")?;
    Ok(now.as_nanos() as u64)
}

/// Changes bytes, cuts some out, or puts some in.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.usize(1..=4) {
        let at = rng.usize(0..=bytes.len());
        match rng.u8(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(0..8),
            1 if at < bytes.len() => bytes[at] = rng.u8(..),
            2 => bytes.truncate(at),
            3 => {
                let more: Vec<u8> = (0..rng.usize(1..16)).map(|_| rng.u8(..)).collect();
                bytes.splice(at..at, more);
            }
            // A length that is much too long.
            _ => {
                bytes.splice(at..at, [0x0a, 0xff, 0xff, 0xff, 0xff, rng.u8(..) & 0x7f]);
            }
        }
    }
}

/// What becomes a request: of another container where it could do something, so that the one that
/// is looked after goes on.
fn request(rng: &mut Rng, shim: &Shim) -> (String, Vec<u8>) {
    let method = METHODS[rng.usize(..METHODS.len())];
    let id = if rng.u8(0..50) == 0 { "target" } else { "none" };
    let exec = if rng.bool() { "" } else { "e" };
    let mut payload = match rng.u8(0..10) {
        0 => (0..rng.usize(0..200)).map(|_| rng.u8(..)).collect(),
        // Few of a bundle that is there: each takes runc some time.
        1..=8 if method == "Create" => {
            let bundle = "/run/by-hand/none".into();
            let create = api::CreateTaskRequest { id: id.into(), bundle, ..Default::default() };
            create.write_to_bytes().expect("encode a request")
        }
        _ => bytes(shim, method, id, exec),
    };
    if rng.u8(0..10) != 0 {
        mutate(rng, &mut payload);
    }
    let name = match rng.u8(0..20) {
        0 => (0..rng.usize(0..40)).map(|_| rng.char(..)).collect(),
        _ => method.to_owned(),
    };
    (name, payload)
}

/// Sends requests and counts the answers. No answer, or a lost connection, is an error.
fn requests(rng: &mut Rng, shim: &Shim, task: &Task, count: usize) -> Result<(usize, usize)> {
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..count {
        let (method, payload) = request(rng, shim);
        // A shutdown is asked for where there is nothing, and Wait waits.
        let limit = if method == "Wait" { Duration::from_millis(20) } else { PATIENCE };
        match task.raw(&method, payload.clone(), limit) {
            Ok(_) => accepted += 1,
            Err(Refusal::Nothing) if method == "Wait" => refused += 1,
            Err(Refusal::Status(_, text)) => {
                ensure!(!text.contains("panicked"), "{method} {payload:?}: {text}");
                refused += 1;
            }
            Err(refusal) => anyhow::bail!("{method} {payload:?}: {refusal}"),
        }
    }
    Ok((accepted, refused))
}

/// Frames whose header lies, or that end in the middle.
fn frames(rng: &mut Rng, shim: &Shim) -> Result<()> {
    let mut socket = UnixStream::connect(&shim.socket).context("connect to the shim")?;
    socket.set_write_timeout(Some(PATIENCE))?;
    for _ in 0..FRAMES {
        let (_, payload) = request(rng, shim);
        let length = match rng.u8(0..4) {
            0 => rng.u32(..),
            1 => (5 << 20) + rng.u32(0..100),
            _ => payload.len() as u32,
        };
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend(rng.u32(..).to_be_bytes());
        frame.extend([if rng.bool() { rng.u8(..) } else { 1 }, rng.u8(..)]);
        frame.extend(payload);
        if rng.u8(0..10) == 0 {
            frame.truncate(rng.usize(0..frame.len()));
        }
        // It may hang up.
        if socket.write_all(&frame).is_err() {
            return Ok(());
        }
    }
    socket.set_nonblocking(true)?;
    let _ = socket.read(&mut [0; 4096]);
    Ok(())
}

/// Does what is asked of any shim.
fn works(hand: &ByHand<'_>, shim: &Shim) -> Result<()> {
    let task = Task::connect(&shim.socket, crate::service()?)?;
    let request = api::StateRequest { id: "kept".into(), ..Default::default() };
    let state: api::StateResponse = task.call("State", &request)?;
    ensure!(state.status.enum_value() == Ok(Status::RUNNING), "{state}");
    let exec = exec_request("kept", "after", &["sh", "-c", "exit 6"]);
    task.call::<api::Empty>("Exec", &exec)?;
    shim.start("kept", "after")?;
    ensure!(shim.wait("kept", "after")? == 6 && shim.delete("kept", "after")? == 6);
    hand.create(shim, "after", &["sh", "-c", "exit 7"])?;
    shim.start("after", "")?;
    ensure!(shim.wait("after", "")? == 7 && shim.delete("after", "")? == 7);
    Ok(())
}

#[test]
fn no_request_makes_the_shim_panic() -> Result<()> {
    let seed = seed()?;
    println!("{SEED}={seed}");
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    let shim = hand.shim(SHIMS[0], "fuzzed", crate::service()?)?;
    for id in ["kept", "target"] {
        hand.create(&shim, id, IDLE)?;
        shim.start(id, "")?;
    }
    let threads = 6;
    let counts: Vec<Result<(usize, usize)>> = std::thread::scope(|scope| {
        let work = |n: usize| {
            let mut rng = Rng::with_seed(seed + n as u64);
            let task = Task::connect(&shim.socket, crate::service()?)?;
            requests(&mut rng, &shim, &task, REQUESTS / threads)
        };
        let threads: Vec<_> = (0..threads).map(|n| scope.spawn(move || work(n))).collect();
        threads.into_iter().map(|t| t.join().expect("a thread has panicked")).collect()
    });
    let (mut accepted, mut refused) = (0, 0);
    for count in counts {
        let (yes, no) = count.with_context(|| shim.log())?;
        (accepted, refused) = (accepted + yes, refused + no);
    }
    let mut rng = Rng::with_seed(seed);
    for _ in 0..CONNECTIONS {
        frames(&mut rng, &shim)?;
    }
    shim.has_not_panicked()?;
    works(&hand, &shim).with_context(|| format!("after the fuzzing: {}", shim.log()))?;
    let broken = CONNECTIONS * FRAMES;
    println!("{accepted} requests accepted, {refused} refused, {broken} broken frames");
    ferry_tests::table::row(
        "fuzzing",
        &format!("{} requests, {broken} broken frames", accepted + refused),
        "no panic",
        "not asked",
    )
}
