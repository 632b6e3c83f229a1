//! Processes with their sessions and groups, and threads.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::signals;
use crate::sys;
use crate::turn::{Done, In, Turn, Wrong, same};

/// Exit code of the process that nobody has waited for.
const CODE: i32 = 7;

/// ```text
/// this ─┬─ leader (its own session) ─┬─ in a group of its own
///       │                            └─ in the leader's group
///       ├─ orphan, of the leader's session
///       ├─ child in this one's group
///       └─ ended, and not waited for
/// ```
pub(crate) fn tree(turn: &mut Turn) -> Done {
    if turn.is_control() {
        sys::adopt_orphans()?;
    }
    let (mut line, other) = UnixStream::pair()?;
    let leader = sys::spawn(|| i32::from(lead(other).is_err()))?;
    let mut pids = [0; 12];
    line.read_exact(&mut pids).at("hear of the processes")?;
    let orphan = i32::from_ne_bytes([pids[8], pids[9], pids[10], pids[11]]);
    let child = sys::spawn(idle)?;
    let ended = sys::spawn(|| CODE)?;
    let mut words = line.try_clone()?;
    let mut ask = || -> Result<String, Wrong> {
        words.write_all(b"?").at("ask the leader")?;
        let mut length = [0];
        words.read_exact(&mut length).at("hear the leader")?;
        let mut text = vec![0; usize::from(length[0])];
        words.read_exact(&mut text).at("hear the leader")?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    // It has ended once it is a zombie.
    while !stat(ended)?.starts_with("zombie") {
        std::thread::yield_now();
    }
    let (was, itself) = (all()?, ask()?);
    let done =
        if turn.pass()? { sys::join_group(child, child).map_err(Wrong::from) } else { Ok(()) };
    let done = done
        .and_then(|()| same("what the leader says of itself", ask()?, itself))
        .and_then(|()| same("the list of processes", all()?, was))
        .and_then(|()| same("the exit code", sys::wait(ended)?, Some(CODE)));
    // The leader's end is that of what it has started, but for the orphan: it would hold up whoever
    // waits for the output of a control.
    for pid in [child, leader, orphan] {
        sys::end(pid).at("end a process")?;
    }
    done
}

/// Starts what belongs to the leader, tells of it, and answers.
fn lead(mut line: UnixStream) -> Result<(), Wrong> {
    sys::new_session()?;
    let alone = sys::spawn(idle)?;
    sys::join_group(alone, alone)?;
    let beside = sys::spawn(idle)?;
    let (mut from, mut to) = std::io::pipe()?;
    let between = sys::fork_off(|| {
        let started = sys::fork_off(idle);
        started.and_then(|pid| to.write_all(&pid.to_ne_bytes())).is_err().into()
    })?;
    let mut orphan = [0; 4];
    from.read_exact(&mut orphan)?;
    sys::wait(between)?;
    let pids = [alone.to_ne_bytes(), beside.to_ne_bytes(), orphan].concat();
    line.write_all(&pids)?;
    let mut byte = [0];
    while line.read_exact(&mut byte).is_ok() {
        let text = stat(std::process::id().cast_signed())?;
        line.write_all(&[text.len() as u8])?;
        line.write_all(text.as_bytes())?;
    }
    Ok(())
}

fn idle() -> i32 {
    loop {
        std::thread::park();
    }
}

/// Of all processes that are there.
fn all() -> Result<BTreeMap<i32, String>, Wrong> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        if let Ok(pid) = entry?.file_name().to_string_lossy().parse() {
            found.insert(pid, stat(pid)?);
        }
    }
    Ok(found)
}

/// Whether it is a zombie; parent, group, session.
fn stat(pid: i32) -> Result<String, Wrong> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).at("read of a process")?;
    let (_, rest) = text.rsplit_once(") ").ok_or_else(|| Wrong(text.clone()))?;
    let fields: Vec<_> = rest.split(' ').take(4).collect();
    let state = if fields[0] == "Z" { "zombie" } else { "alive" };
    Ok(format!("{state} {}", fields[1..].join(" ")))
}

thread_local! {
    static OWN: Cell<usize> = const { Cell::new(0) };
}

/// A thread that waits for questions.
struct Thread {
    ask: Sender<()>,
    answers: Receiver<usize>,
}

pub(crate) fn threads(turn: &mut Turn) -> Done {
    let threads: Vec<Thread> = (0..4).map(thread).collect::<Result<_, _>>()?;
    let own = |threads: &[Thread]| -> Result<Vec<usize>, Wrong> {
        let ask = |thread: &Thread| {
            thread.ask.send(()).map_err(|err| Wrong(err.to_string()))?;
            thread.answers.recv().map_err(|err| Wrong(err.to_string()))
        };
        threads.iter().map(ask).collect()
    };
    // Once they answer they have their names.
    let (values, was) = (own(&threads)?, tasks()?);
    same("the threads' variables", values.clone(), vec![100, 101, 102, 103])?;
    if turn.pass()? {
        let task = was.keys().last().map(i32::to_string).unwrap_or_default();
        fs::write(format!("/proc/self/task/{task}/comm"), "changed")?;
    }
    same("the threads' variables", own(&threads)?, values)?;
    same("the list of threads", tasks()?, was)
}

fn thread(number: usize) -> Result<Thread, Wrong> {
    let (ask, questions) = channel::<()>();
    let (tell, answers) = channel();
    let body = move || {
        OWN.set(100 + number);
        signals::block(signals::FIRST_REALTIME + number as i32);
        questions.iter().take_while(|()| tell.send(OWN.get()).is_ok()).for_each(drop);
    };
    std::thread::Builder::new().name(format!("survivor-{number}")).spawn(body)?;
    Ok(Thread { ask, answers })
}

/// Name and blocked signals of every thread.
fn tasks() -> Result<BTreeMap<i32, String>, Wrong> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        let status = fs::read_to_string(entry.path().join("status"))?;
        let lines = status.lines().filter(|l| l.starts_with("Name:") || l.starts_with("SigBlk:"));
        let tid = entry.file_name().to_string_lossy().parse().map_err(|_| Wrong("tid".into()))?;
        found.insert(tid, lines.collect::<Vec<_>>().join(" "));
    }
    Ok(found)
}
