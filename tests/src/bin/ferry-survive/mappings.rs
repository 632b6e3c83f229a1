//! Memory: private, shared, of files, and named.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crate::files::scratch;
use crate::sys::{self, ANONYMOUS, Memory, NONE, PAGE, PRIVATE, READ, READ_WRITE, SHARED};
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const LENGTH: usize = 64 * PAGE;

fn filled(memory: &Memory, seed: usize) -> Done {
    match memory.differs(seed) {
        None => Ok(()),
        Some(n) => Err(Wrong(format!("byte {n} of memory {seed} is {}", memory.get(n)))),
    }
}

/// Protection of the mapping that starts at `address`, as the kernel lists it.
fn protection(address: usize) -> Result<String, Wrong> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let start = format!("{address:08x}-");
    let line = maps.lines().find(|line| line.starts_with(&start));
    let line = line.ok_or_else(|| Wrong(format!("nothing starts at {address:x}")))?;
    Ok(line.split(' ').nth(1).unwrap_or_default().to_owned())
}

pub(crate) fn anonymous(turn: &mut Turn) -> Done {
    let memory = Memory::map(LENGTH, READ_WRITE, PRIVATE | ANONYMOUS, -1)?;
    memory.fill(1);
    // Areas of their own, with pages in them that cannot be read just now.
    let areas = [(16, READ), (32, NONE)];
    for (page, kind) in areas {
        memory.protect(page * PAGE, PAGE, kind)?;
    }
    let heap: Vec<usize> = (0..100_000).collect();
    if turn.pass()? {
        memory.set(5 * PAGE + 1, memory.get(5 * PAGE + 1) ^ 1);
    }
    for ((page, _), expected) in areas.into_iter().zip(["r--p", "---p"]) {
        same("a protection", protection(memory.address() + page * PAGE)?, expected.to_owned())?;
        memory.protect(page * PAGE, PAGE, READ_WRITE)?;
    }
    holds("the heap is as it was", heap.iter().enumerate().all(|(n, value)| n == *value))?;
    filled(&memory, 1)
}

/// Shared with another process: what one writes the other has to see, afterwards too.
pub(crate) fn shared(turn: &mut Turn) -> Done {
    let memory = Memory::map(LENGTH, READ_WRITE, SHARED | ANONYMOUS, -1)?;
    memory.fill(2);
    let (mut line, mut other) = UnixStream::pair()?;
    let child = sys::spawn(|| {
        let mut byte = [0];
        while other.read_exact(&mut byte).is_ok() {
            let good = memory.differs(2).is_none();
            memory.set(3, byte[0]);
            if other.write_all(&[good.into()]).is_err() {
                break;
            }
        }
        0
    })?;
    if turn.pass()? {
        memory.set(LENGTH - 1, memory.get(LENGTH - 1) ^ 1);
    }
    filled(&memory, 2)?;
    line.write_all(&[200])?;
    let mut good = [0];
    line.read_exact(&mut good).at("hear the other process")?;
    same("the other process's view", good, [1])?;
    same("what the other process has written", memory.get(3), 200)?;
    sys::end(child).map_err(Wrong::from)
}

/// A file that is mapped shared and private, with changes that only the private mapping has.
pub(crate) fn of_files(turn: &mut Turn) -> Done {
    let path = scratch("mapped")?;
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
    let content: Vec<u8> = (0..LENGTH).map(|n| sys::byte(3, n)).collect();
    file.write_all(&content)?;
    let shared = Memory::map(LENGTH, READ_WRITE, SHARED, file.as_raw_fd())?;
    let private = Memory::map(LENGTH, READ_WRITE, PRIVATE, file.as_raw_fd())?;
    (PAGE..2 * PAGE).for_each(|n| private.set(n, 0x55));
    shared.set(10 * PAGE, 0xaa);
    if turn.pass()? {
        private.set(PAGE + 9, 0x56);
    }
    for n in 0..LENGTH {
        let in_file = if n == 10 * PAGE { 0xaa } else { sys::byte(3, n) };
        let own = if n / PAGE == 1 { 0x55 } else { in_file };
        let found = (shared.get(n), private.get(n));
        if found != (in_file, own) {
            return same(&format!("byte {n} of both mappings"), found, (in_file, own));
        }
    }
    // It is the file still.
    shared.set(20 * PAGE, 0xbb);
    same("what is written by memory", fs::read(&path)?[20 * PAGE], 0xbb)
}

/// What shm_open(3) makes, here of a file that has lost its name, and of memfd_create(2).
pub(crate) fn posix(turn: &mut Turn) -> Done {
    let open = |name: &str| {
        let path = format!("/dev/shm/{name}-{}", std::process::id());
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        file.set_len(LENGTH as u64)?;
        Ok::<_, Wrong>((path, file))
    };
    let (name, named) = open("named")?;
    let (gone, nameless) = open("nameless")?;
    fs::remove_file(gone)?;
    const MEMFD_CREATE: i64 = 319;
    let fd = sys::call(MEMFD_CREATE, [c"memory".as_ptr().addr().cast_signed() as i64, 1, 0, 0, 0])?;
    let nobodys = sys::made(fd as i32)?;
    nobodys.set_len(LENGTH as u64)?;
    let files = [&named, &nameless, &nobodys];
    let mut memories = Vec::new();
    for (n, file) in files.iter().enumerate() {
        let memory = Memory::map(LENGTH, READ_WRITE, SHARED, file.as_raw_fd())?;
        memory.fill(n + 4);
        memories.push(memory);
    }
    if turn.pass()? {
        memories[1].set(PAGE, memories[1].get(PAGE) ^ 1);
    }
    for (n, (memory, mut file)) in memories.iter().zip(files).enumerate() {
        filled(memory, n + 4)?;
        // Both are one still.
        memory.set(0, 0xcc);
        let mut first = [0];
        std::io::Seek::rewind(&mut file)?;
        file.read_exact(&mut first)?;
        same("what is written by memory", first, [0xcc])?;
    }
    same("what the name leads to", fs::read(&name)?[0], 0xcc)?;
    fs::remove_file(name).map_err(Wrong::from)
}
