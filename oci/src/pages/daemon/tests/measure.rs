//! What it costs. To be read, not to be passed: `cargo test --release -- --ignored --nocapture measure`.
#![allow(unsafe_code)] // Memory of its own.

use super::*;

/// First address of the large task.
const BASE: u64 = 0x20_0000_0000;

fn pages() -> u64 {
    std::env::var("FERRY_TEST_MB").ok().and_then(|mb| mb.parse::<u64>().ok()).unwrap_or(1024) << 8
}

fn page(number: u64, page: &mut [u8]) {
    for (at, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(number * 512 + at as u64 + 1).to_le_bytes());
    }
}

/// Kilobytes that a process has: of its own, of files, shared.
fn memory(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?");
        line.trim().to_owned()
    };
    let names = ["RssAnon:", "RssFile:", "RssShmem:", "VmPTE:"];
    names.map(|name| format!("{name} {}", line(name))).join(", ")
}

/// Seconds that a process has run.
fn on_cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    stat.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

/// Bytes that the memory files of the store take.
fn taken(keeper: u32) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let fds = std::fs::read_dir(format!("/proc/{keeper}/fd")).into_iter().flatten().flatten();
    let ours = fds.filter(|fd| {
        std::fs::read_link(fd.path())
            .is_ok_and(|link| link.to_string_lossy().contains("memfd:ferry"))
    });
    ours.filter_map(|fd| Some(std::fs::metadata(fd.path()).ok()?.blocks() * 512)).sum()
}

#[test]
#[ignore = "measures"]
fn measure() {
    let pages = pages();
    let mut rig = Rig::with(&Limits { memory: 64 << 30, disk: 0, ..Limits::default() });
    let mut store = rig.open();
    let mut data = vec![0; 1 << 20];
    let mut spent = Duration::ZERO;
    for at in (0..pages).step_by(256) {
        for (number, part) in (at..).zip(data.chunks_exact_mut(PAGE as usize)) {
            page(number, part);
        }
        let start = Instant::now();
        store.write(1, BASE + at * PAGE, &data).expect("write");
        spent += start.elapsed();
    }
    let gb = (pages * PAGE) as f64 / 1e9;
    println!("write          {:.2} GB/s", gb / spent.as_secs_f64());
    let mut spent = Duration::ZERO;
    for at in (0..pages).step_by(256) {
        for (number, part) in (at..).zip(data.chunks_exact_mut(PAGE as usize)) {
            page(number, part);
        }
        let start = Instant::now();
        store.write(1, BASE + at * PAGE, &data).expect("write");
        spent += start.elapsed();
    }
    println!("write again    {:.2} GB/s", gb / spent.as_secs_f64());
    let start = Instant::now();
    let mut one = vec![0; PAGE as usize];
    for at in 0..20_000 {
        let at = at * 7919 % pages;
        page(at, &mut one);
        store.write(1, BASE + at * PAGE, &one).expect("write");
    }
    println!("single page    {:.2} us", start.elapsed().as_secs_f64() * 1e6 / 20_000.0);
    let start = Instant::now();
    assert_eq!(store.verify().expect("verify"), 0);
    println!("verify         {:.2} GB/s", gb / start.elapsed().as_secs_f64());
    rig.client.listen(&rig.socket).expect("listen");
    std::thread::sleep(Duration::from_millis(1500));
    rig.client.hold_fill().expect("hold");
    store.complete().expect("complete");
    let mut command = this_program("pages::daemon::tests::measure::large_task");
    let mut process = command
        .env("FERRY_TEST_LARGE", &rig.socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("task");
    let stdin = process.stdin.take().expect("stdin");
    let stdout = BufReader::new(process.stdout.take().expect("stdout"));
    let mut task = Restored { process, stdin, stdout };
    println!("fault, by task {}", task.hear("latency"));
    let status = rig.status();
    println!(
        "by the daemon  p50 {} us, p99 {} us, first {:?} us",
        status.fault_p50, status.fault_p99, status.first_fault
    );
    println!("keeper         {}", memory(status.keeper));
    println!("worker         {}", memory(status.worker.expect("worker")));
    let before = taken(status.keeper);
    println!("memory files   {:.3} of the pages", before as f64 / (pages * PAGE) as f64);
    let left = status.pages_left;
    let worker = status.worker.expect("worker");
    let used = on_cpu(worker);
    let mut cpu = 0.0;
    let start = Instant::now();
    rig.client.fill().expect("fill");
    let mut peak = 0f64;
    let mut alone = None;
    while let Ok(status) = rig.client.status() {
        let resident = (pages - status.pages_left) * PAGE;
        peak = peak.max((taken(status.keeper) + resident) as f64 / (pages * PAGE) as f64);
        cpu = (on_cpu(worker) - used).max(cpu);
        if status.pages_left == 0 {
            alone.get_or_insert_with(|| start.elapsed());
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let spent = alone.unwrap_or_else(|| start.elapsed()).as_secs_f64();
    let gb = (left * PAGE) as f64 / 1e9;
    println!("fill           {:.2} GB/s, peak {peak:.3} of the pages", gb / spent);
    println!("fill, worker   {:.2} GB per second of processor", gb / cpu);
    task.go();
    task.right();
    rig.end();
}

/// The large task's process.
#[test]
fn large_task() {
    let Ok(path) = std::env::var("FERRY_TEST_LARGE") else { return };
    let mut socket = UnixStream::connect(path).expect("connect");
    let pages = pages();
    let uffd = task::register(BASE, (pages * PAGE) as usize);
    task::send_uffd(&mut socket, 1, uffd);
    // As CRIU: the first faults come before the end.
    let look = |at: u64| {
        let start = Instant::now();
        // SAFETY: mapped.
        let word = unsafe { std::ptr::read_volatile((BASE + at * PAGE) as *const u64) };
        assert_eq!(word, at * 512 + 1);
        start.elapsed().as_nanos()
    };
    look(77);
    socket.write_all(&0x5253_5446u32.to_le_bytes()).expect("marker");
    std::thread::sleep(Duration::from_millis(20));
    let count = 5000;
    let mut times: Vec<u128> = (0..count).map(|at| look(at * 7907 % pages)).collect();
    times.sort_unstable();
    let of = |part: u64| times[(count * part / 1000) as usize] as f64 / 1000.0;
    println!("latency p50 {:.1} us, p90 {:.1} us, p99 {:.1} us", of(500), of(900), of(990));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("stdin");
    for at in 0..pages {
        look(at);
    }
    println!("right");
    std::process::exit(0);
}
