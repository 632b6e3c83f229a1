//! Dumps a container with runc, with or without its memory hidden and the fast tar, and says what
//! that took: the whole sequence around one dump, as a driver of it does.
//!
//! `dump RUNC_ROOT ID PID FOLDER [hide=LIBRARY] [tar=PROGRAM]` prints a line of `name=value`. The
//! container runs before and after it. PID is its first process.

use ferry_oci::criu::{
    CONFIG_ENV, Config, FastTar, HiddenRange, HiddenTask, Hiding, NetworkLock, Orders, check,
    pages_bytes,
};
use ferry_oci::freezer::Freezer;
use std::error::Error;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// CRIU opens a file of this name in its work directory after its start-up and before it looks at
/// the tasks; a FIFO holds it there.
const HOLD: &str = "irmap-cache";
/// What releases it: an empty image of that kind.
const RELEASE: [u8; 8] = [0x40, 0x59, 0x10, 0x55, 0x59, 0x40, 0x00, 0x57];

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [root, id, pid, folder, options @ ..] = &arguments[..] else {
        return Err("dump RUNC_ROOT ID PID FOLDER [hide=LIBRARY] [tar=PROGRAM]".into());
    };
    let option = |name| options.iter().find_map(|option| option.strip_prefix(name));
    let folder = Path::new(folder);
    let (images, work) = (folder.join("images"), folder.join("work"));
    for folder in [&images, &work] {
        fs::create_dir_all(folder)?;
    }
    let hiding = match option("hide=") {
        Some(library) => Some(Hiding::prepare(&folder.join("orders"), library.as_ref())?),
        None => None,
    };
    let tar = match option("tar=") {
        Some(program) => Some(FastTar::prepare(&folder.join("bin"), program.as_ref())?),
        None => None,
    };

    let mut runc = start(root, id, &images, &work, hiding.as_ref(), tar.as_ref())?;
    let pids = tasks(pid.parse()?)?;
    let mut orders = Orders::default();
    for &pid in &pids {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let stored = hiding.as_ref().map(|h| h.store_smaps(pid, smaps.as_bytes())).transpose()?;
        orders.tasks.push(HiddenTask { pid, ranges: lazy_ranges(&smaps)?, smaps: stored });
    }
    let mut release = open_hold(&work.join(HOLD), &mut runc)?;

    let freezer = Freezer::of(pids[0].unsigned_abs())?;
    freezer.freeze(PATIENCE)?;
    let frozen = Instant::now();
    let ordered = hiding.as_ref().map_or(Ok(()), |hiding| order(hiding, &mut orders));
    let orders_us = frozen.elapsed().as_micros();
    let released = Instant::now();
    if ordered.is_ok() {
        release.write_all(&RELEASE)?;
    }
    // Closed without a word, the dump fails at once and harms nothing.
    drop(release);
    let status = runc.wait()?;
    let dump_us = released.elapsed().as_micros();
    freezer.thaw(PATIENCE)?;
    ordered?;
    if !status.success() {
        return Err(format!("runc: {status}, see {}", work.join("dump.log").display()).into());
    }

    print!("dump_us={dump_us} orders_us={orders_us} bytes={}", bytes(&images)?);
    print!(" pages={} tasks={}", pages_bytes(&images)?, pids.len());
    if let Some(hiding) = &hiding {
        for task in &orders.tasks {
            check(&images, inner_pid(task.pid)?, &task.ranges)?;
        }
        print!(" report={:?}", hiding.report()?.ok_or("criu did not load the library")?);
    }
    match &tar {
        Some(tar) => println!(" tar={:?}", tar.counts()?),
        None => println!(),
    }
    Ok(())
}

fn start(
    root: &str,
    id: &str,
    images: &Path,
    work: &Path,
    hiding: Option<&Hiding>,
    tar: Option<&FastTar>,
) -> Result<Child> {
    let config = Config {
        tcp_established: true,
        network_lock: NetworkLock::Skip,
        extra: vec!["manage-cgroups=ignore".into()],
        ..Config::default()
    };
    if !Command::new("mkfifo").arg(work.join(HOLD)).status()?.success() {
        return Err("make the fifo that holds the dump".into());
    }
    let mut runc = Command::new("runc");
    runc.args(["--root", root, "checkpoint", "--leave-running", "--manage-cgroups-mode", "ignore"]);
    runc.arg("--image-path").arg(images).arg("--work-path").arg(work).arg(id);
    runc.env(CONFIG_ENV, config.write(work)?);
    runc.envs(hiding.into_iter().flat_map(Hiding::env));
    if let Some(tar) = tar {
        runc.envs(tar.env()?);
    }
    Ok(runc.spawn()?)
}

/// What is last before the dump is released. A task whose mappings have changed since the copy is
/// looked at again.
fn order(hiding: &Hiding, orders: &mut Orders) -> Result<()> {
    for task in &mut orders.tasks {
        let maps = fs::read(format!("/proc/{}/maps", task.pid))?;
        if !task.smaps.as_ref().is_some_and(|smaps| smaps.fits(&maps)) {
            let smaps = fs::read_to_string(format!("/proc/{}/smaps", task.pid))?;
            task.ranges = lazy_ranges(&smaps)?;
            task.smaps = None;
        }
    }
    Ok(hiding.write(orders)?)
}

/// The tasks of a container, its first process before all.
fn tasks(init: i32) -> Result<Vec<i32>> {
    let mut tasks = vec![init];
    let mut at = 0;
    while let Some(pid) = tasks.get(at).copied() {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let children = fs::read_to_string(thread?.path().join("children"))?;
            for child in children.split_whitespace() {
                tasks.push(child.parse()?);
            }
        }
        at += 1;
    }
    Ok(tasks)
}

/// A task's pid in its own namespace.
fn inner_pid(pid: i32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    Ok(line.and_then(|line| line.split_whitespace().last()).ok_or("no pid")?.parse()?)
}

/// The mappings that CRIU restores lazily.
fn lazy_ranges(smaps: &str) -> Result<Vec<HiddenRange>> {
    let mut ranges = Vec::new();
    let mut last = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |flag| flags.split_whitespace().any(|word| word == flag);
            let odd = ["lo", "ht", "dp", "io", "pf"].into_iter().any(has);
            ranges.extend(last.take().filter(|_| !odd));
            continue;
        }
        let words: Vec<_> = line.split_whitespace().collect();
        let Some((start, end)) = words.first().and_then(|word| word.split_once('-')) else {
            continue;
        };
        let name = words.get(5).copied().unwrap_or_default();
        let plain = name.is_empty() || name == "[heap]" || name == "[stack]";
        let private = words.get(1).is_some_and(|access| access.ends_with('p'));
        let file = words.get(4).is_some_and(|inode| *inode != "0");
        let number = |text| u64::from_str_radix(text, 16);
        let range = HiddenRange { start: number(start)?, end: number(end)?, guards: true };
        last = (private && !file && (plain || name.starts_with("[anon:"))).then_some(range);
    }
    Ok(ranges)
}

/// Waits until CRIU has opened the fifo.
fn open_hold(path: &Path, runc: &mut Child) -> Result<fs::File> {
    let end = Instant::now() + PATIENCE;
    // No such device: nobody reads it yet.
    const NOBODY: i32 = 6;
    loop {
        match fs::OpenOptions::new().write(true).custom_flags(0o4000).open(path) {
            Err(err) if err.raw_os_error() == Some(NOBODY) && Instant::now() < end => {}
            opened => return Ok(opened?),
        }
        if let Some(status) = runc.try_wait()? {
            return Err(format!("runc ended early: {status}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn bytes(folder: &Path) -> std::io::Result<u64> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}
