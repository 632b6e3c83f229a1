//! Areas as the kernel prints them, and those of a process that has one of each kind.

use std::io::Write;

use super::*;
use crate::pages::tracker::workload::Workload;

const SMAPS: &str = "\
55d0c000-55d0e000 rw-p 00001000 fe:00 1234                       /usr/bin/with blank
Size:                  8 kB
Rss:                   8 kB
Anonymous:             4 kB
Swap:                  4 kB
VmFlags: rd wr mr mw me ac 
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 
Rss:                2048 kB
Swap:                 16 kB
VmFlags: rd wr mr mw me ac lo sd 
7f0000200000-7f0000600000 rw-s 00000000 00:01 5                          /memfd:x (deleted)
Rss:                  12 kB
VmFlags: rd wr sh mr mw me ms 
7f0000600000-7f0000a00000 rw-p 00000000 00:0e 9                          /anon_hugepage (deleted)
Rss:                   0 kB
Private_Hugetlb:    2048 kB
Shared_Hugetlb:     2048 kB
VmFlags: rd wr mr mw me ht 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Rss:                   0 kB
VmFlags: ex 
";

/// One area as `smaps` would show it.
fn area(line: &str, flags: &str) -> Area {
    let text = format!("{line}\nVmFlags: {flags}\n");
    parse_smaps(text.as_bytes()).unwrap().remove(0)
}

#[test]
fn smaps_are_read_with_sizes_and_flags() {
    let areas = parse_smaps(SMAPS.as_bytes()).unwrap();
    assert_eq!(areas.len(), 5);
    let first = &areas[0];
    assert_eq!((first.start, first.end, first.offset), (0x55d0_c000, 0x55d0_e000, 0x1000));
    assert_eq!((first.dev, first.inode), ((0xfe, 0), 1234));
    assert_eq!(first.name, b"/usr/bin/with blank");
    assert_eq!((first.rss, first.swap, first.anonymous), (8192, 4096, 4096));
    assert!(areas[1].flags.any_of(VmFlags::LOCKED) && areas[3].flags.any_of(VmFlags::HUGETLB));
}

#[test]
fn maps_are_the_first_lines_of_smaps() {
    let mut smaps = Layout::read(std::process::id().cast_signed()).unwrap();
    let areas = parse_maps(&smaps.maps).unwrap();
    for (mut with_flags, without) in smaps.areas.drain(..).zip(areas) {
        with_flags.flags = VmFlags::default();
        (with_flags.rss, with_flags.swap) = (0, 0);
        (with_flags.pss, with_flags.swap_pss) = (0, 0);
        (with_flags.anonymous, with_flags.hugetlb) = (0, 0);
        assert_eq!(with_flags, without);
    }
    let workload = Workload::start();
    workload.stop();
    let mut maps = Vec::new();
    read_maps(workload.pid(), &mut maps).unwrap();
    assert_eq!(Layout::read(workload.pid()).unwrap().maps, maps);
}

#[test]
fn lines_that_are_no_areas_are_errors() {
    for text in ["x", "1000-2000", "2000-1000 rw-p 0 0:0 0", "1000-2000 rw-q 0 0:0 0", "Rss: 1 kB"]
    {
        assert!(parse_smaps(text.as_bytes()).is_err(), "{text}");
    }
    assert!(parse_smaps(b"1000-2000 rw-p 0 0:0 0\nRss: many\n").is_err());
    assert_eq!(parse_smaps(b"").unwrap(), []);
}

#[test]
fn hideable_is_what_criu_can_restore_lazily() {
    const PLAIN: &str = "7f00-8f00 rw-p 00000000 00:00 0";
    for (line, flags, hideable) in [
        (PLAIN, "rd wr mr mw me ac sd", true),
        (PLAIN, "rd wr mr mw me ac gu", true),
        (PLAIN, "rd wr mr mw me ac uw wf dd", true),
        (PLAIN, "rd wr lo", false),
        (PLAIN, "rd wr ht", false),
        (PLAIN, "rd wr dp wf", false),
        (PLAIN, "rd wr io", false),
        (PLAIN, "rd wr pf", false),
        (PLAIN, "rd wr ss", true),
        ("7f00-8f00 ---p 00000000 00:00 0", "mr mw me", true),
        ("7f00-8f00 r--p 00000000 00:00 0", "rd mr mw me", true),
        ("7f00-8f00 rw-s 00000000 00:00 0", "rd wr sh", false),
        ("7f00-8f00 rw-p 00000000 00:00 0   [heap]", "rd wr", true),
        ("7f00-8f00 rw-p 00000000 00:00 0   [stack]", "rd wr gd", true),
        ("7f00-8f00 rw-p 00000000 00:00 0   [anon:x]", "rd wr", true),
        ("7f00-8f00 r-xp 00000000 00:00 0   [vdso]", "rd ex", false),
        // As CRIU has it: without its protection the name alone makes no vdso.
        ("7f00-8f00 rw-p 00000000 00:00 0   [vdso]", "rd wr", true),
        ("7f00-8f00 r--p 00000000 00:00 0   [vvar]", "rd io dd pf", false),
        ("7f00-8f00 r--p 00000000 00:00 0   [vvar_vclock]", "rd io dd pf", false),
        ("7f00-8f00 --xp 00000000 00:00 0   [vsyscall]", "ex", false),
        ("7f00-8f00 --xp 00000000 00:00 0   [uprobes]", "ex io", false),
        ("7f00-8f00 rw-p 00000000 00:01 9   /dev/zero (deleted)", "rd wr", false),
        ("7f00-8f00 rw-p 00000000 00:05 3   /dev/zero", "rd wr", false),
        ("7f00-8f00 rw-s 00000000 00:11 3   /[aio] (deleted)", "rd wr sh de", false),
        ("7f00-8f00 rw-p 00000000 00:01 9   /memfd:x (deleted)", "rd wr", false),
        ("7f00-8f00 rw-p 00000000 fe:00 9   /lib/libc.so", "rd wr", false),
    ] {
        assert_eq!(area(line, flags).hideable(), hideable, "{line} {flags}");
    }
}

#[test]
fn what_criu_carries_is_counted_by_kind() {
    let areas = parse_smaps(SMAPS.as_bytes()).unwrap();
    let carried = Carried::of([areas.as_slice()]);
    let expected = Carried {
        mlocked: (2048 + 16) << 10,
        hugetlb: 4096 << 10,
        shared: 12 << 10,
        file_private: 8 << 10,
    };
    assert_eq!(carried, expected);
    // What is shared counts once, what is private for each.
    let twice = Carried::of([areas.as_slice(), areas.as_slice()]);
    assert_eq!(twice.shared, expected.shared);
    assert_eq!(twice.mlocked, 2 * expected.mlocked);
    assert_eq!(carried.total(), carried.mlocked + carried.hugetlb + (20 << 10));
}

#[test]
fn areas_of_a_real_process_are_told_apart() {
    let mut workload = Workload::start();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[7; 8 * 4096]).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    let mut map = |name: &str, command: &str, fill: bool| {
        let address = u64::from_str_radix(&workload.tell(command), 16).ok()?;
        if fill {
            workload.tell(&format!("fill {name} 0 4 1"));
        }
        Some(address)
    };
    let plain = map("a", "map a 4 rw", true);
    let locked = map("b", "map b 4 rw locked", true);
    let shared = map("c", "map c 4 rw shared", true);
    let private = map("d", &format!("mapfile d 8 {path} private"), true);
    let droppable = map("e", "map e 4 rw droppable", true);
    let huge = map("f", "map f 512 rw huge", true);
    let layout = Layout::read(workload.pid()).unwrap();
    let find = |address: u64| layout.areas.iter().find(|a| a.range().contains(&address)).unwrap();
    assert!(find(plain.unwrap()).hideable());
    for address in [locked, shared, private, droppable, huge].into_iter().flatten() {
        assert!(!find(address).hideable(), "{:?}", find(address));
    }
    if droppable.is_none() {
        println!(
            "skipped: droppable in areas_of_a_real_process_are_told_apart: not in this kernel"
        );
    }
    if huge.is_none() {
        println!("skipped: hugetlb in areas_of_a_real_process_are_told_apart: no pages reserved");
    }
    let carried = Carried::of([layout.areas.as_slice()]);
    assert!(carried.mlocked >= 4 * 4096 && carried.shared == 4 * 4096);
    assert!(carried.file_private >= 4 * 4096);
    assert_eq!(carried.hugetlb, if huge.is_some() { 2 << 20 } else { 0 });
    for known in ["[vdso]", "[vvar]", "[stack]"] {
        let area = layout.areas.iter().find(|a| a.name == known.as_bytes());
        assert_eq!(area.is_some_and(Area::hideable), known == "[stack]", "{known}");
    }
}

#[test]
fn shared_pages_count_once_and_those_that_a_restore_doubles_for_each() {
    let text = "\
7f00-8f00 rw-p 00000000 00:00 0 
Rss:                 400 kB
Pss:                 200 kB
Swap:                 40 kB
SwapPss:              20 kB
VmFlags: rd wr mr mw me ac 
9000-a000 rw-s 00000000 00:01 5                          /memfd:x (deleted)
Rss:                  80 kB
Pss:                  40 kB
VmFlags: rd wr sh mr mw me ms 
b000-c000 rw-p 00000000 fe:00 7                          /lib/libc.so
Rss:                 100 kB
Pss:                  30 kB
Anonymous:             8 kB
VmFlags: rd wr mr mw me ac 
d000-e000 r--s 00000000 fe:00 8                          /a/file
Rss:                1000 kB
Pss:                1000 kB
VmFlags: rd mr me ms 
";
    let areas = parse_smaps(text.as_bytes()).unwrap();
    let usage = Usage::of([areas.as_slice(), areas.as_slice()]);
    let kb = |bytes: u64| bytes / 1024;
    assert_eq!(kb(usage.once), 2 * (200 + 20 + 40 + 8));
    assert_eq!(kb(usage.each), 2 * (400 + 40 + 40 + 8));
    assert_eq!(kb(usage.carried.total()), 80 + 2 * 8);
}

#[test]
fn what_a_fork_shares_is_counted_once_and_for_each() {
    let mut workload = Workload::start();
    workload.tell("map a 5000 rw");
    workload.tell("fill a 0 5000 1");
    workload.tell("fork a 0 1000 2");
    workload.answer();
    let usage = Usage::read(workload.pids()).unwrap();
    let pages = |bytes: u64| bytes / 4096;
    assert!((6000..6500).contains(&pages(usage.once)), "{usage:?}");
    assert!((10_000..11_000).contains(&pages(usage.each)), "{usage:?}");
    let gone = Usage::read([i32::MAX]).unwrap();
    assert_eq!(gone, Usage::default());
}

#[test]
fn memory_that_is_still_to_come_is_seen() {
    assert!(super::has_missing(b"Rss: 4 kB\nVmFlags: rd wr mr um ac \n7f00-7f01 rw-p\n"));
    // A file may be called anything.
    assert!(!super::has_missing(b"1000-2000 r--p 00000000 00:00 1 /um um\nVmFlags: rd uw \n"));
    // Other tests of this process may have a userfaultfd; another process has none.
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let filling = super::is_being_filled(pid);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!filling.unwrap());
}
