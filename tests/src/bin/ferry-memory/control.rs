//! Starts the processes and answers for them.
//!
//! ```text
//! control ─▶ process 0 ─▶ process 1 ─▶ process 2     each forked by the one before, which it shares
//!    │            └ threads   └ threads    └ threads  memory with, copy-on-write
//!    └─ TCP
//! ```

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use crate::Options;
use crate::area::Area;
use crate::kinds::{Kind, remove_files};
use crate::pattern::PAGE;
use crate::server;
use crate::sys::{self, Memory};
use crate::turn::Board;
use crate::worker::Worker;

/// How long all may take to see that it is their turn, and to compare.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long processes may take to end.
const END: Duration = Duration::from_secs(2);

pub(crate) fn run(options: &Options) -> Result<(), String> {
    let board = board().map_err(|e| format!("map the board: {e}"))?;
    let child = sys::spawn(|| process(board, options, 0, Vec::new()))
        .map_err(|e| format!("start a process: {e}"))?;
    let count = options.processes * (options.threads + 1);
    board.check(count, PATIENCE)?;
    let one_at_a_time = Mutex::new(());
    let processes = options.processes;
    let answer = move |question: &str| {
        let _turn = one_at_a_time.lock();
        match question {
            "check" => match board.check(count, PATIENCE) {
                Ok(pages) => format!("ok {pages} pages"),
                Err(wrong) => format!("wrong: {wrong}"),
            },
            "stats" => stats(board, processes, count),
            "guards stay" | "guards change" => {
                board.guards_stay.store(u64::from(question == "guards stay"), Ordering::Relaxed);
                "ok".to_owned()
            }
            _ => "say check, stats, guards stay or guards change".to_owned(),
        }
    };
    let died = || sys::ended(child).is_some();
    let result = server::run(options.port, answer, died);
    board.quit();
    for _ in 0..END.as_millis() {
        if sys::ended(child).is_some() {
            break;
        }
        sleep(Duration::from_millis(1));
    }
    remove_files(child.cast_unsigned());
    result
}

fn board() -> std::io::Result<&'static Board> {
    let pages = size_of::<Board>().div_ceil(PAGE);
    let memory = Memory::map(pages, sys::READ_WRITE, sys::SHARED | sys::ANONYMOUS, -1)?;
    Ok(memory.shared())
}

/// Runs process `number` and those it starts.
fn process(board: &'static Board, options: &Options, number: usize, inherited: Vec<Area>) -> i32 {
    let first = number * (options.threads + 1);
    let mut worker = Worker::new(board, first, number as u16, inherited);
    let pages = options.megabytes * (1 << 20) / PAGE;
    let small = (pages / 64).max(18);
    for kind in Kind::ALL {
        match kind {
            // The first has it all; the others have it from the first, and make what they lack.
            _ if number > 0 && kind.is_inherited() && !kind.is_shared() => {}
            Kind::Dense => worker.make(kind, pages / 2),
            Kind::HugePages => worker.make(kind, pages / 4),
            Kind::Sparse => worker.make(kind, small * 16),
            _ => worker.make(kind, small),
        }
    }
    let next = number + 1;
    let child = (next < options.processes).then(|| {
        sys::spawn(|| {
            let areas = worker.areas().drain(..).filter_map(Area::in_child).collect();
            process(board, options, next, areas)
        })
    });
    let count = (options.processes * (options.threads + 1)) as u64;
    let rate = (options.rate / count).max(1);
    for n in 1..=options.threads {
        std::thread::spawn(move || {
            let mut worker = Worker::new(board, first + n, number as u16, Vec::new());
            worker.make(Kind::Dense, small);
            worker.run(rate, 0);
        });
    }
    worker.run(rate, (options.events / options.processes as u64).max(1));
    match child {
        Some(Ok(pid)) => {
            while sys::ended(pid).is_none() {
                sleep(Duration::from_millis(1));
            }
            0
        }
        Some(Err(_)) => 1,
        None => 0,
    }
}

fn stats(board: &Board, processes: usize, count: usize) -> String {
    let sum = |of: fn(&crate::turn::Place) -> u64| -> u64 {
        (0..count).map(|n| of(board.place(n))).sum()
    };
    let missing = board.missing.load(Ordering::Relaxed);
    let missing: Vec<String> = Kind::ALL
        .into_iter()
        .filter(|kind| missing & 1 << *kind as u64 != 0)
        .map(|kind| format!("\"{kind:?}\""))
        .collect();
    format!(
        "{{\"processes\":{processes},\"writers\":{count},\"writes\":{},\"events\":{},\"refused\":{},\"missing\":[{}]}}",
        sum(|place| place.writes.load(Ordering::Relaxed)),
        sum(|place| place.events.load(Ordering::Relaxed)),
        board.refused.load(Ordering::Relaxed),
        missing.join(","),
    )
}
