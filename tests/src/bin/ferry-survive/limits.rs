//! Limits of a process, and of its group.

use std::fs;
use std::path::{Path, PathBuf};

use crate::sys::{self, Memory, PAGE};
use crate::turn::{Done, In, Turn, Wrong, holds, same};

const PRLIMIT: i64 = 302;
const CORE: i64 = 4;
const OPEN_FILES: i64 = 7;
const STACK: i64 = 3;
const SETPRIORITY: i64 = 141;
const GETPRIORITY: i64 = 140;
const SET_SCHEDULER: i64 = 144;
const GET_SCHEDULER: i64 = 145;
const BATCH: i64 = 3;
/// More processes, and more memory, than the container may have.
const MOST: usize = 200;
const TOO_MUCH: usize = 200 << 20;

fn limit(which: i64, soft: u64, hard: u64) -> Done {
    let pair = [soft, hard];
    let at = pair.as_ptr().expose_provenance().cast_signed() as i64;
    sys::call(PRLIMIT, [0, which, at, 0, 0]).at("set a limit")?;
    Ok(())
}

pub(crate) fn rlimits(turn: &mut Turn) -> Done {
    limit(OPEN_FILES, 300, 500)?;
    limit(CORE, 4096, 8192)?;
    limit(STACK, 4 << 20, u64::MAX)?;
    let was = fs::read_to_string("/proc/self/limits")?;
    if turn.pass()? {
        limit(OPEN_FILES, 299, 500)?;
    }
    let now = fs::read_to_string("/proc/self/limits")?;
    now.lines().zip(was.lines()).try_for_each(|(now, was)| same("a limit", now, was))
}

/// Niceness, policy, and how readily it is killed when memory is short.
pub(crate) fn scheduling(turn: &mut Turn) -> Done {
    sys::call(SETPRIORITY, [0, 0, 7, 0, 0]).at("be nice")?;
    let priority = [0_i32; 4];
    let at = priority.as_ptr().expose_provenance().cast_signed() as i64;
    sys::call(SET_SCHEDULER, [0, BATCH, at, 0, 0]).at("set the policy")?;
    fs::write("/proc/self/oom_score_adj", "500")?;
    let all = || -> Result<_, Wrong> {
        let numbers = (sys::call(GETPRIORITY, [0; 5])?, sys::call(GET_SCHEDULER, [0; 5])?);
        Ok((numbers, fs::read_to_string("/proc/self/oom_score_adj")?))
    };
    let was = all()?;
    if turn.pass()? {
        sys::call(SETPRIORITY, [0, 0, 8, 0, 0])?;
    }
    same("niceness, policy and score", all()?, was)
}

const FILES: &[&str] = &[
    "memory/memory.limit_in_bytes",
    "pids/pids.max",
    "cpu/cpu.shares",
    "cpu/cpu.cfs_quota_us",
    "cpuset/cpuset.cpus",
    "memory.max",
    "pids.max",
    "cpu.weight",
    "cpu.max",
];

/// The group's file of the most processes.
fn most() -> Result<PathBuf, Wrong> {
    let places = ["pids/pids.max", "pids.max"].map(|name| Path::new("/sys/fs/cgroup").join(name));
    let found = places.into_iter().find(|path| path.exists());
    found.ok_or_else(|| Wrong("its group cannot be seen".into()))
}

/// How many processes can be started, and what becomes of one that takes much memory.
fn tried() -> Result<(usize, Option<i32>), Wrong> {
    let mut started = Vec::new();
    while let Ok(pid) = sys::spawn(|| {
        loop {
            std::thread::park()
        }
    }) {
        started.push(pid);
        if started.len() > MOST {
            break;
        }
    }
    let count = started.len();
    started.into_iter().try_for_each(sys::end)?;
    let greedy = sys::spawn(|| {
        let taken = Memory::map(TOO_MUCH, sys::READ_WRITE, sys::PRIVATE | sys::ANONYMOUS, -1);
        let Ok(taken) = taken else { return 2 };
        (0..TOO_MUCH).step_by(PAGE).for_each(|n| taken.set(n, 1));
        0
    })?;
    Ok((count, sys::wait(greedy)?))
}

/// What the container's group may use, by trying.
pub(crate) fn cgroups(turn: &mut Turn) -> Done {
    let was = tried()?;
    holds(&format!("there are limits: {was:?}"), was.0 < MOST && was.1.is_none())?;
    if turn.pass()? {
        let file = most()?;
        fs::write(&file, "50").at("change a limit")?;
        let now = tried();
        // It is everybody's.
        fs::write(file, "77")?;
        return same("processes and the end of a greedy one", now?, was);
    }
    same("processes and the end of a greedy one", tried()?, was)
}

/// The group's limits, as the container reads them.
pub(crate) fn cgroup_files(turn: &mut Turn) -> Done {
    let root = Path::new("/sys/fs/cgroup");
    let all = || -> Result<Vec<String>, Wrong> {
        let there = FILES.iter().filter(|name| root.join(name).exists());
        let read =
            |name: &&str| Ok(format!("{name} {}", fs::read_to_string(root.join(name))?.trim()));
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        // Which group is mounted there, and where.
        let shown = |line: &str| line.split(' ').skip(3).take(2).collect::<Vec<_>>().join(" at ");
        let mine = fs::read_to_string("/proc/self/cgroup")?;
        let mut all = there.map(read).collect::<Result<Vec<_>, Wrong>>()?;
        all.extend(mine.lines().map(str::to_owned));
        all.extend(mounts.lines().filter(|l| l.contains("/sys/fs/cgroup/")).map(shown));
        Ok(all)
    };
    let pids = most()?;
    let was = all()?;
    holds(
        &format!("limits are set: {was:?}"),
        was.iter().any(|line| line.ends_with("pids.max 77")),
    )?;
    if turn.pass()? {
        fs::write(&pids, "78").at("change a limit")?;
        let changed = all();
        // It is everybody's.
        fs::write(pids, "77")?;
        return same("the limits", changed?, was);
    }
    same("the limits", all()?, was)
}
