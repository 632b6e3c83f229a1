//! The library in a program that asks the kernel as CRIU does, compared with the same program
//! without it.

mod real;
mod stage;
mod stand_in;

use stage::{PAGE, Stage, pid, scan, skip};
use std::collections::BTreeSet;
use std::ptr::null_mut;

/// Not a test of its own: what the program does when it is started as a stand-in for CRIU.
#[test]
fn play() {
    stand_in::play();
}

/// Memory of this process in which `page` of `pages` is there if `present(page)`.
struct Memory {
    at: *mut u8,
    pages: usize,
}

impl Memory {
    fn new(pages: usize, present: impl Fn(usize) -> bool) -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, written only within its bounds.
        let at = unsafe {
            let at = libc::mmap(null_mut(), pages * PAGE, access, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            // Huge pages would make neighbours present.
            libc::madvise(at, pages * PAGE, libc::MADV_NOHUGEPAGE);
            let at = at.cast::<u8>();
            (0..pages).filter(|page| present(*page)).for_each(|page| at.add(page * PAGE).write(1));
            at
        };
        Self { at, pages }
    }

    fn page(&self, page: usize) -> usize {
        self.at as usize + page * PAGE
    }

    fn scan(&self, kind: &str, vec_len: usize) -> String {
        scan(kind, self.page(0), self.page(self.pages), vec_len)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.at.cast(), self.pages * PAGE) };
    }
}

fn addresses(found: &str) -> BTreeSet<usize> {
    let address = |line: &str| usize::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
    found.lines().map(address).collect()
}

/// A small generator of numbers; the same seed gives the same numbers.
fn numbers(mut seed: u64) -> impl FnMut(usize) -> usize {
    move |limit| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % limit
    }
}

#[test]
fn a_scan_finds_exactly_what_is_not_hidden() {
    let mut below = numbers(7);
    for round in 0..25 {
        let density = 1 + below(4);
        let touched: Vec<_> = (0..600).map(|_| below(density) == 0).collect();
        let memory = Memory::new(600, |page| touched[page]);
        let (mut ranges, mut at) = (Vec::new(), below(50));
        while at < 600 {
            let end = (at + 1 + below(60)).min(600);
            ranges.push((memory.page(at), memory.page(end), true));
            at = end + below(2) * below(60);
        }
        let stage = Stage::new();
        stage.hide(&ranges, None);
        // Windows that begin and end anywhere, with vectors of any length.
        let mut role = format!("scans pages {}", pid());
        for _ in 0..30 {
            let (start, length) = (below(599), 1 + below(600));
            let end = (start + length).min(600);
            let vec_len = 1 + below(40);
            role += &format!(" {} {} {vec_len}", memory.page(start), memory.page(end));
        }
        let plain = stage.run_with("criu", &role, false);
        let seen = stage.run("criu", &role);
        let hidden = |address: usize| ranges.iter().any(|r| r.0 <= address && address < r.1);
        let is_visible = |line: &&str| addresses(line).into_iter().all(|a| !hidden(a));
        let expected: Vec<_> = plain.lines().filter(is_visible).collect();
        assert_eq!(seen.lines().collect::<Vec<_>>(), expected, "round {round}");
        assert!(expected.len() < plain.lines().count());
    }
}

#[test]
fn hidden_scans_are_counted() {
    let memory = Memory::new(8, |_| true);
    let stage = Stage::new();
    stage.hide(&[(memory.page(2), memory.page(5), false)], None);
    let seen = addresses(&stage.run("criu", &memory.scan("pages", 100)));
    let pages = [0, 1, 5, 6, 7].map(|page| memory.page(page));
    assert_eq!(seen, pages.into());
    let report = stage.report();
    assert_eq!((report.loaded, report.orders_read), (1, 1));
    assert_eq!((report.scans, report.scans_hidden, report.errors), (1, 1, 0));
    assert_eq!(report.bytes_hidden, 3 * PAGE as u64);
    stage.run("criu", &memory.scan("pages", 100));
    assert_eq!(stage.report().loaded, 2, "reports of several processes add up");
}

#[test]
fn without_usable_orders_nothing_is_hidden() {
    let memory = Memory::new(8, |page| page != 3);
    let stage = Stage::new();
    let role = memory.scan("pages", 100);
    let plain = stage.run_with("criu", &role, false);
    assert_eq!(stage.run("criu", &role), plain, "no orders");
    assert_eq!(stage.report().errors, 0);
    stage.hide(&[(memory.page(0), memory.page(8), false)], None);
    let orders = stage.dir.path().join("orders/ranges");
    let good = std::fs::read(&orders).unwrap();
    assert_eq!(stage.run("criu", &role), "");
    for (errors, length) in [0, 7, 8, 40, good.len() - 8, good.len() - 1].into_iter().enumerate() {
        std::fs::write(&orders, &good[..length]).unwrap();
        assert_eq!(stage.run("criu", &role), plain, "{length} bytes");
        assert_eq!(stage.report().errors, errors as u64 + 1);
    }
    let mut changed = good.clone();
    changed[81] ^= 0x10;
    std::fs::write(&orders, changed).unwrap();
    assert_eq!(stage.run("criu", &role), plain, "a changed address");
    std::fs::remove_file(&orders).unwrap();
    std::fs::create_dir(&orders).unwrap();
    assert_eq!(stage.run("criu", &role), plain, "a folder");
}

#[test]
fn orders_of_other_tasks_hide_nothing() {
    let memory = Memory::new(4, |_| true);
    let stage = Stage::new();
    let ranges = vec![ferry_oci::criu::HiddenRange {
        start: memory.page(0) as u64,
        end: memory.page(4) as u64,
        guards: false,
    }];
    let task = ferry_oci::criu::HiddenTask { pid: pid() + 1, ranges, smaps: None };
    stage.hiding.write(&ferry_oci::criu::Orders { tasks: vec![task] }).unwrap();
    assert_eq!(addresses(&stage.run("criu", &memory.scan("pages", 9))).len(), 4);
}

#[test]
fn orders_are_read_when_the_first_task_is_looked_at() {
    let memory = Memory::new(4, |_| true);
    let stage = Stage::new();
    let file = |name: &str| stage.dir.path().join(name);
    let role = memory.scan("pages", 9).replacen("scan ", "late ", 1);
    let role = format!("{role} {} {}", file("ready").display(), file("go").display());
    let mut command = stage.command("criu", &role, &file("output"));
    let mut criu = command.envs(stage.hiding.env()).spawn().unwrap();
    while !file("ready").exists() {
        assert!(criu.try_wait().unwrap().is_none(), "it ended early");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    stage.hide(&[(memory.page(1), memory.page(4), false)], None);
    std::fs::write(file("go"), "").unwrap();
    assert!(criu.wait().unwrap().success());
    let found = addresses(&std::fs::read_to_string(file("output")).unwrap());
    assert_eq!(found, [memory.page(0)].into());
}

#[test]
fn guard_pages_are_looked_for_only_where_they_may_be() {
    const MADV_GUARD_INSTALL: i32 = 102;
    let memory = Memory::new(8, |page| page % 2 == 0);
    for page in [1, 4, 6] {
        // SAFETY: a page of this mapping that nothing refers to.
        let at = unsafe { memory.at.add(page * PAGE) };
        // SAFETY: as above.
        if unsafe { libc::madvise(at.cast(), PAGE, MADV_GUARD_INSTALL) } != 0 {
            return skip("the kernel has no guard pages (6.13)");
        }
    }
    let stage = Stage::new();
    let role = memory.scan("guards", 1);
    let guards = [1, 4, 6].map(|page| memory.page(page));
    assert_eq!(addresses(&stage.run_with("criu", &role, false)), guards.into());
    stage.hide(
        &[(memory.page(0), memory.page(3), true), (memory.page(4), memory.page(6), false)],
        None,
    );
    let found = addresses(&stage.run("criu", &role));
    assert_eq!(found, [guards[0], guards[2]].into());
    assert!(stage.report().guard_scans_hidden > 0);
}

#[test]
fn a_copy_of_smaps_is_handed_out_only_if_it_is_declared_valid() {
    const COPY: &str = "00400000-00401000 r-xp 00000000 08:01 5 /bin/x\nVmFlags: rd ex\n";
    let stage = Stage::new();
    let role = format!("smaps {}", pid());
    let is_real = |text: &str| text.contains("Rss:");
    assert!(is_real(&stage.run("criu", &role)), "no orders");
    let stored = stage.hiding.store_smaps(pid(), COPY.as_bytes()).unwrap();
    stage.hide(&[], None);
    assert!(is_real(&stage.run("criu", &role)), "not declared");
    assert_eq!((stage.report().smaps_given, stage.report().smaps_real), (0, 2));
    stage.hide(&[], Some(stored));
    assert_eq!(stage.run("criu", &role), COPY);
    assert_eq!((stage.report().smaps_given, stage.report().errors), (1, 0));
    std::fs::write(stage.dir.path().join(format!("orders/smaps-{}", pid())), &COPY[1..]).unwrap();
    assert!(is_real(&stage.run("criu", &role)), "another length");
    assert_eq!((stage.report().smaps_given, stage.report().errors), (1, 1));
}

#[test]
fn no_other_program_is_touched() {
    let memory = Memory::new(4, |_| true);
    let stage = Stage::new();
    stage.hide(&[(memory.page(0), memory.page(4), false)], None);
    for name in ["runc", "criu2", "xcriu"] {
        assert_eq!(addresses(&stage.run(name, &memory.scan("pages", 9))).len(), 4, "{name}");
    }
    assert_eq!(stage.hiding.report().unwrap(), None);
    // runc must hand it on.
    let environment = stage.run("runc", "children");
    assert!(environment.contains("FERRY_HIDE=") && environment.contains("LD_PRELOAD="));
}

#[test]
fn children_of_criu_do_not_load_it() {
    let stage = Stage::new();
    let environment = stage.run("criu", "children");
    assert!(environment.contains(stage::ROLE));
    let mut left = environment.lines();
    assert_eq!(left.find(|l| l.starts_with("FERRY_HIDE=") || l.starts_with("LD_PRELOAD=")), None);
}

#[test]
fn errors_and_other_calls_are_as_without_it() {
    let stage = Stage::new();
    stage.hide(&[(PAGE, 4 * PAGE, false)], None);
    let plain = stage.run_with("criu", "errors", false);
    assert_eq!(stage.run("criu", "errors"), plain);
    assert!(plain.contains("bad descriptor -1 Some(9)") && plain.contains("mode 4"), "{plain}");
}

#[test]
fn a_missing_folder_is_no_harm() {
    let memory = Memory::new(4, |_| true);
    let stage = Stage::new();
    std::fs::remove_dir(stage.dir.path().join("orders")).unwrap();
    assert_eq!(addresses(&stage.run("criu", &memory.scan("pages", 9))).len(), 4);
}

#[test]
fn the_probe_tells_whether_it_works() {
    use ferry_oci::criu::{CannotHide, Probe};
    let stage = Stage::new();
    let verdict = |name: &str| {
        let scratch = stage.dir.path().join("scratch");
        let probe = Probe::of(&stage.program(name), &stage::library(), &scratch).unwrap();
        // The test program does not know `--version`, which does not matter.
        probe.command().status().unwrap();
        probe.verdict()
    };
    verdict("criu").unwrap();
    assert!(matches!(verdict("wrapper"), Err(CannotHide::NotLoaded(_))));
}
