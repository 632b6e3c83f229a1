//! Memory that changes goes through the stream, and the destination ends up with every byte of it,
//! by no more pages than it lacks.

use super::testing::{Changed, Memory, Random, Source, Store};
use super::worker::lock;
use super::*;
use crate::pages::PAGE;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

fn options() -> Options {
    Options { restraint: None, threads: 3, ..Options::default() }
}

/// A source at the end of a link to a store.
struct Rig<F> {
    source: Source<F>,
    sender: Sender,
    receiver: Receiver,
    store: Store,
    random: Random,
}

fn rig<F: Fn(&mut Memory) + Sync>(memory: Memory, meanwhile: F) -> Rig<F> {
    Rig {
        source: Source { memory: Mutex::new(memory), meanwhile },
        sender: Sender::new(options()),
        receiver: Receiver::new(),
        store: Store::default(),
        random: Random(99),
    }
}

impl<F: Fn(&mut Memory) + Sync> Rig<F> {
    fn send(&mut self, frozen: bool, changed: &Changed) -> RoundStats {
        let mut wire = Vec::new();
        let stats = self.sender.round(frozen, &changed.list(), &self.source, &mut wire).unwrap();
        assert_eq!(stats.bytes, wire.len() as u64);
        let (mut rest, mut received) = (&wire[..], None);
        while !rest.is_empty() {
            let chunk = 1 + self.random.below(MAX_CHUNK as u64) as usize;
            let (chunk, more) = rest.split_at(chunk.min(rest.len()));
            rest = more;
            received = self.receiver.push(chunk, &mut self.store).unwrap();
        }
        self.receiver.finish().unwrap();
        let received = received.unwrap();
        assert_eq!(
            (received.round, received.pages, received.same),
            (stats.round, stats.sent(), stats.same)
        );
        stats
    }

    fn round(&mut self) -> RoundStats {
        let changed = lock(&self.source.memory).round();
        self.send(false, &changed)
    }

    /// Begins anew with what the store holds.
    fn second_attempt(&mut self) -> RoundStats {
        (self.sender, self.receiver) = (Sender::new(options()), Receiver::new());
        let mut wire = Vec::new();
        let count = send_hashes(self.store.hashes(), &mut wire).unwrap();
        assert_eq!(count, self.store.pages.len() as u64);
        let mut reader = HashReader::new();
        let mut complete = false;
        for chunk in wire.chunks(77_777) {
            complete = reader.push(chunk, |s, a, h| self.sender.learn(s, a, h)).unwrap();
        }
        assert!(complete && reader.finish().is_ok());
        let changed = lock(&self.source.memory).all();
        self.send(false, &changed)
    }

    fn assert_equal(&self) {
        assert!(self.store.pages == lock(&self.source.memory).wanted(), "the destination differs");
    }
}

fn nothing(_: &mut Memory) {}

fn page(random: &mut Random) -> Vec<u8> {
    random.bytes(PAGE as usize)
}

/// Does something that programs do to their memory.
fn mutate(memory: &mut Memory, random: &mut Random) {
    let space = 1 + random.below(4) as u32;
    let addr = 0x5500_0000_0000 + random.below(1500) * PAGE;
    match random.below(100) {
        0 => memory.exit(space),
        1..6 => memory.unmap(space, addr..addr + (1 + random.below(300)) * PAGE),
        6..20 => memory.write(space, addr, vec![0; PAGE as usize]),
        20..50 => {
            // Contents that are, or were, elsewhere.
            let mut few = Random(random.below(40));
            memory.write(space, addr, page(&mut few));
        }
        50..60 => {
            if let Some(same) = memory.pages.get(&(space, addr)).cloned() {
                memory.write(space, addr, same);
            }
        }
        _ => memory.write(space, addr, page(random)),
    }
}

#[test]
fn the_destination_ends_equal_whatever_the_container_does_meanwhile() {
    for seed in 0..3 {
        let mut random = Random(seed * 1000);
        let frozen = AtomicU64::new(0);
        let inside = Mutex::new(Random(seed));
        let mut rig = rig(Memory::default(), |memory: &mut Memory| {
            // Between the list of a round and its reading: vanished and changed pages.
            if frozen.load(Relaxed) == 0 {
                (0..20).for_each(|_| mutate(memory, &mut lock(&inside)));
            }
        });
        for attempt in 0..3 {
            for _ in 0..5 {
                for _ in 0..random.below(2000) {
                    mutate(&mut lock(&rig.source.memory), &mut random);
                }
                rig.round();
            }
            frozen.store(1, Relaxed);
            let changed = lock(&rig.source.memory).round();
            let stats = rig.send(true, &changed);
            assert_eq!((stats.known, stats.same, stats.zstd, stats.vanished), (0, 0, 0, 0));
            rig.assert_equal();
            frozen.store(0, Relaxed);
            // A freeze that was given up, then an attempt that was given up.
            if attempt == 1 {
                (0..500).for_each(|_| mutate(&mut lock(&rig.source.memory), &mut random));
                rig.second_attempt();
            }
        }
    }
}

#[test]
fn no_page_is_sent_that_the_destination_has() {
    let mut random = Random(5);
    let mut rig = rig(Memory::default(), nothing);
    let base = 0x7f00_0000_0000;
    let contents: Vec<_> = (0..300).map(|_| page(&mut random)).collect();
    {
        let mut memory = lock(&rig.source.memory);
        for at in 0..300_u64 {
            memory.write(1, base + at * PAGE, contents[at as usize].clone());
            // A child shares them all, and has one of them a hundred times.
            memory.write(2, base + at * PAGE, contents[at as usize].clone());
            memory.write(3, base + at * PAGE, contents[7].clone());
            memory.write(4, base + at * PAGE, vec![0; PAGE as usize]);
        }
    }
    let first = rig.round();
    assert_eq!((first.sent(), first.same, first.zero), (300, 600, 300));
    assert!(first.bytes < 301 * PAGE + 600 * 30, "{} bytes", first.bytes);
    assert_eq!(rig.store.removed, 0, "nothing was there to be removed");
    rig.assert_equal();

    // Written again with what was there, and then with something else.
    {
        let mut memory = lock(&rig.source.memory);
        (0..300_u64)
            .for_each(|at| memory.write(1, base + at * PAGE, contents[at as usize].clone()));
    }
    let again = rig.round();
    assert_eq!((again.known, again.sent(), again.same), (300, 0, 0));
    assert!(again.bytes < 100, "{} bytes", again.bytes);
    lock(&rig.source.memory).write(1, base + PAGE, page(&mut random));
    assert_eq!(rig.round().sent(), 1);
    rig.assert_equal();
}

#[test]
fn a_page_that_is_overwritten_in_the_same_round_is_no_source_for_another() {
    let mut random = Random(6);
    let (old, new) = (page(&mut random), page(&mut random));
    let base = 0x7f00_0000_0000;
    for (first, second) in [(0, 1), (1, 0)] {
        let mut rig = rig(Memory::default(), nothing);
        lock(&rig.source.memory).write(1, base + first * PAGE, old.clone());
        rig.round();
        let mut memory = lock(&rig.source.memory);
        memory.write(1, base + first * PAGE, new.clone());
        memory.write(1, base + second * PAGE, old.clone());
        drop(memory);
        assert_eq!(rig.round().sent(), 2);
        rig.assert_equal();
    }
}

#[test]
fn what_a_frozen_round_has_overwritten_is_not_taken_for_what_was_there() {
    let mut random = Random(13);
    let (old, new) = (page(&mut random), page(&mut random));
    let mut rig = rig(Memory::default(), nothing);
    lock(&rig.source.memory).write(1, PAGE, old.clone());
    rig.round();
    lock(&rig.source.memory).write(1, PAGE, new);
    let changed = lock(&rig.source.memory).round();
    rig.send(true, &changed);
    // Thawed again: the old contents come back, there and elsewhere.
    lock(&rig.source.memory).write(1, 0, old.clone());
    rig.round();
    rig.assert_equal();
    lock(&rig.source.memory).write(1, PAGE, old);
    rig.round();
    rig.assert_equal();
}

#[test]
fn a_second_attempt_may_begin_frozen() {
    let mut random = Random(14);
    let mut rig = rig(Memory::default(), nothing);
    (0..200).for_each(|at| lock(&rig.source.memory).write(1, at * PAGE, page(&mut random)));
    rig.round();
    lock(&rig.source.memory).unmap(1, 50 * PAGE..100 * PAGE);
    lock(&rig.source.memory).write(1, 0, vec![0; PAGE as usize]);
    (rig.sender, rig.receiver) = (Sender::new(options()), Receiver::new());
    rig.store.hashes().for_each(|(s, a, h)| rig.sender.learn(s, a, u128::from_le_bytes(h)));
    let changed = lock(&rig.source.memory).all();
    rig.send(true, &changed);
    rig.assert_equal();
}

#[test]
fn a_second_attempt_sends_only_what_changed_and_removes_what_is_gone() {
    let mut random = Random(7);
    let mut rig = rig(Memory::default(), nothing);
    for at in 0..2000 {
        let space = 1 + at as u32 % 3;
        lock(&rig.source.memory).write(space, at * PAGE, page(&mut random));
    }
    assert_eq!(rig.round().sent(), 2000);
    {
        let mut memory = lock(&rig.source.memory);
        memory.exit(3);
        memory.unmap(2, 0..500 * PAGE);
        (0..10).for_each(|at| memory.write(1, at * 3 * PAGE, page(&mut random)));
        memory.write(1, 1500 * PAGE, vec![0; PAGE as usize]);
    }
    let second = rig.second_attempt();
    assert_eq!(second.sent(), 10);
    assert!(second.bytes < 80 << 10, "{} bytes", second.bytes);
    rig.assert_equal();
}

#[test]
fn hashes_beyond_what_is_remembered_cost_bytes_and_nothing_else() {
    let mut random = Random(8);
    let mut rig = rig(Memory::default(), nothing);
    let small = || Sender::new(Options { remember: 512, ..options() });
    rig.sender = small();
    for at in 0..3000 {
        lock(&rig.source.memory).write(1, at * PAGE, page(&mut random));
    }
    rig.round();
    rig.assert_equal();
    lock(&rig.source.memory).unmap(1, 1000 * PAGE..2000 * PAGE);
    rig.round();
    rig.assert_equal();
    // What is left of an earlier attempt that cannot be remembered is removed as a whole.
    lock(&rig.source.memory).unmap(1, 2500 * PAGE..3000 * PAGE);
    (rig.sender, rig.receiver) = (small(), Receiver::new());
    rig.store.hashes().for_each(|(s, a, h)| rig.sender.learn(s, a, u128::from_le_bytes(h)));
    let changed = lock(&rig.source.memory).all();
    rig.send(false, &changed);
    rig.assert_equal();
}

#[test]
fn pages_that_compress_are_compressed_when_asked_and_frozen_ones_never() {
    let mut random = Random(9);
    let mut rig = rig(Memory::default(), nothing);
    rig.sender = Sender::new(Options { compression: Compression::Always, ..options() });
    let text = |random: &mut Random| {
        (0..PAGE).map(|_| b"abcd"[random.below(4) as usize]).collect::<Vec<_>>()
    };
    let mut write = |rig: &mut Rig<_>, space| {
        for at in 0..200 {
            let page = if space == 1 { text(&mut random) } else { page(&mut random) };
            lock(&rig.source.memory).write(space, at * PAGE, page);
        }
    };
    write(&mut rig, 1);
    let stats = rig.round();
    assert_eq!((stats.zstd, stats.raw), (200, 0));
    assert!(stats.bytes < 200 * PAGE / 2);
    write(&mut rig, 2);
    assert_eq!(rig.round().zstd, 0, "random bytes only get longer");
    write(&mut rig, 1);
    let changed = lock(&rig.source.memory).round();
    assert_eq!(rig.send(true, &changed).raw, 200);
    rig.assert_equal();
}

#[test]
fn a_bandwidth_holds_before_the_freeze_and_not_in_it() {
    let mut random = Random(10);
    let mut rig = rig(Memory::default(), nothing);
    rig.sender = Sender::new(Options { bandwidth: Some(4 << 20), ..options() });
    let mut write = |rig: &mut Rig<_>| {
        for at in 0..512 {
            lock(&rig.source.memory).write(1, at * PAGE, page(&mut random));
        }
    };
    write(&mut rig);
    let live = rig.round();
    assert!(live.took.as_millis() > 400, "2 MB at 4 MB/s took {:?}", live.took);
    assert!(live.limited > live.took / 2);
    write(&mut rig);
    let changed = lock(&rig.source.memory).round();
    assert!(rig.send(true, &changed).limited.is_zero());
    rig.assert_equal();
}

#[test]
fn pages_that_have_vanished_are_named_and_what_the_destination_holds_stays() {
    let mut rig = rig(Memory::default(), nothing);
    (0..100).for_each(|at| lock(&rig.source.memory).write(1, at * PAGE, vec![1; PAGE as usize]));
    rig.round();
    let mut memory = lock(&rig.source.memory);
    (0..100).for_each(|at| memory.write(1, at * PAGE, vec![2; PAGE as usize]));
    let changed = memory.round();
    memory.unmap(1, 10 * PAGE..12 * PAGE);
    memory.unmap(1, 99 * PAGE..100 * PAGE);
    drop(memory);
    assert_eq!(rig.send(false, &changed).vanished, 3);
    let vanished = [(1001, 10 * PAGE..12 * PAGE), (1001, 99 * PAGE..100 * PAGE)];
    assert_eq!(rig.sender.vanished(), vanished);
    assert_eq!(rig.store.pages[&(1, 10 * PAGE)][0], 1);
    rig.round();
    rig.assert_equal();
    assert!(rig.sender.vanished().is_empty());
}

#[test]
fn a_frozen_page_that_cannot_be_read_is_an_error() {
    let mut memory = Memory::default();
    memory.write(1, 0, vec![1; PAGE as usize]);
    let changed = memory.round();
    memory.pages.clear();
    let source = Source { memory: Mutex::new(memory), meanwhile: nothing };
    let mut sender = Sender::new(options());
    let result = sender.round(true, &changed.list(), &source, &mut Vec::new());
    assert!(matches!(result, Err(SendError::Unread { pid: 1001, pages: 1 })), "{result:?}");
    let result = sender.round(false, &[], &source, &mut Vec::new());
    assert!(matches!(result, Err(SendError::Failed)), "{result:?}");
}

/// Takes some bytes and fails.
struct Broken(usize);

impl std::io::Write for Broken {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_broken_link_ends_all_workers_with_an_error() {
    for frozen in [false, true] {
        let mut memory = Memory::default();
        let mut random = Random(11);
        (0..2000).for_each(|at| memory.write(1, at * PAGE, page(&mut random)));
        let changed = memory.round();
        let source = Source { memory: Mutex::new(memory), meanwhile: nothing };
        let result =
            Sender::new(options()).round(frozen, &changed.list(), &source, &mut Broken(3 << 20));
        assert!(matches!(result, Err(SendError::Write(_))), "{result:?}");
    }
}

#[test]
fn a_reader_that_fails_or_panics_ends_all_workers() {
    let mut memory = Memory::default();
    (0..2000).for_each(|at| memory.write(1, at * PAGE, vec![1; PAGE as usize]));
    let changed = memory.round();
    let slices = AtomicU64::new(0);
    let meanwhile = |_: &mut Memory| assert!(slices.fetch_add(1, Relaxed) < 5, "on purpose");
    let source = Source { memory: Mutex::new(memory), meanwhile };
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = Sender::new(options()).round(false, &changed.list(), &source, &mut Vec::new());
    }));
    assert!(panic.is_err());
}

#[test]
fn ranges_in_disorder_are_sent_once_and_impossible_ones_refused() {
    let mut memory = Memory::default();
    let mut random = Random(12);
    (0..20).for_each(|at| memory.write(1, at * PAGE, page(&mut random)));
    memory.round();
    let wanted = memory.wanted();
    let source = Source { memory: Mutex::new(memory), meanwhile: nothing };
    let written = [8 * PAGE..20 * PAGE, 0..10 * PAGE, PAGE..2 * PAGE];
    let change = Change { pid: 1001, space: 1, written: &written, absent: &[], exited: false };
    let (mut wire, mut store) = (Vec::new(), Store::default());
    let stats = Sender::new(options()).round(false, &[change], &source, &mut wire).unwrap();
    Receiver::new().push(&wire, &mut store).unwrap();
    assert_eq!((stats.read, store.pages == wanted), (20, true));
    for range in [1..PAGE, 0..PAGE + 1, PAGE..PAGE] {
        let change = Change { written: &[range], ..change };
        let result = Sender::new(options()).round(false, &[change], &source, &mut Vec::new());
        assert!(matches!(result, Err(SendError::Range { pid: 1001, .. })), "{result:?}");
    }
}

#[test]
fn each_direction_refuses_the_other_ones_records() {
    let (mut wire, mut store) = (Vec::new(), Store::default());
    send_hashes([(1, 0, [9; 16])], &mut wire).unwrap();
    let result = Receiver::new().push(&wire, &mut store);
    assert!(matches!(result, Err(ReceiveError::Direction("hashes"))), "{result:?}");
    let mut memory = Memory::default();
    memory.write(1, 0, vec![1; PAGE as usize]);
    let changed = memory.round();
    let source = Source { memory: Mutex::new(memory), meanwhile: nothing };
    let mut wire = Vec::new();
    Sender::new(options()).round(false, &changed.list(), &source, &mut wire).unwrap();
    let result = HashReader::new().push(&wire, |_, _, _| ());
    assert!(matches!(result, Err(ReceiveError::Direction("pages"))), "{result:?}");
}
