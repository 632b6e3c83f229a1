//! Processes of this machine by id and start time, so that an id used again is not mistaken.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// When process `pid` started, in ticks since boot; none when there is no such process.
pub fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_start(&stat)
}

/// Field 22 of a stat line. The name in field 2 can hold blanks and brackets.
fn parse_start(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Whether `pid` runs and is not a zombie.
pub fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    })
}

/// The children of `pid` and theirs, nearest first.
pub fn descendants(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut next = children(pid);
    while let Some(child) = next.pop() {
        next.extend(children(child));
        found.push(child);
    }
    found
}

fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

/// Sends `signal` to `pid`; that it is gone already is no error.
pub fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_a_name_with_brackets() {
        let stat = "7 (a) (b) c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 1";
        assert_eq!(parse_start(stat), Some(4711));
        assert_eq!(parse_start("7 (a"), None);
    }

    #[test]
    fn this_process_is_alive_and_has_a_start() {
        let me = std::process::id().cast_signed();
        assert!(alive(me));
        assert!(started(me).is_some());
    }
}
