//! File systems in memory that a container has: carried beside CRIU, and by it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::ctr::until;
use ferry_tests::scene::{RUNTIME, traces, wait_for_traces_but_pages};
use ferry_tests::{Host, Scene};

/// Appends to a file, writes to one that has no name any more, answers at a socket.
const PROGRAM: &str = r#"
import os, socket, threading, time
log = open("/run/log", "a", buffering=1)
gone = open("/dev/shm/gone", "w+")
os.unlink("/dev/shm/gone")
server = socket.socket(socket.AF_UNIX)
server.bind("/run/socket")
server.listen()
os.mkdir("/run/d", 0o751)
os.chown("/run/d", 12, 34)
os.symlink("d/nowhere", "/run/link")
os.mkfifo("/run/pipe", 0o622)
os.mknod("/dev/shm/null", 0o20666, os.makedev(1, 3))
open("/run/d/data", "wb").write(os.urandom(70000))
def answer():
    while True:
        peer, _ = server.accept()
        gone.seek(0)
        peer.sendall(gone.read().encode())
        peer.close()
threading.Thread(target=answer, daemon=True).start()
n = 0
while True:
    n += 1
    log.write(f"{n}\n")
    gone.seek(0)
    gone.write(f"{n:09}")
    gone.flush()
    time.sleep(0.002)
"#;

/// Asks the program for the file without a name.
const ASK: &str = r#"
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("/run/socket")
print(s.recv(100).decode())
"#;

fn inside(host: &Host, command: &str) -> Result<String> {
    let command = command.replace('\'', "'\\''");
    let run = format!("ctr task exec --exec-id x$$ box sh -c '{command}'");
    Ok(host.run(&run)?.stdout)
}

fn python(host: &Host, script: &str) -> Result<String> {
    host.run(&format!("cat >/tmp/script.py <<'END'\n{script}\nEND"))?;
    let run = "ctr task exec --exec-id x$$ box python3 -c \"$(cat /tmp/script.py)\"";
    Ok(host.run(run)?.stdout)
}

/// Everything there is in these file systems, and how they are mounted, without what changes.
const LIST: &str = r#"
import hashlib, os, stat
for top in ["/dev", "/run"]:
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(f for f in folders if f != "pts")
        for path in [folder] + [os.path.join(folder, f) for f in files]:
            s = os.lstat(path)
            line = [path, oct(s.st_mode), s.st_uid, s.st_gid]
            # CRIU makes sockets anew.
            if not stat.S_ISDIR(s.st_mode) and not stat.S_ISSOCK(s.st_mode) and path != "/run/log":
                line += [s.st_nlink, s.st_rdev, s.st_size, int(s.st_mtime)]
            if stat.S_ISLNK(s.st_mode):
                line.append(os.readlink(path))
            if stat.S_ISREG(s.st_mode) and path != "/run/log":
                line.append(hashlib.sha256(open(path, "rb").read()).hexdigest())
            print(*line)
for line in open("/proc/self/mountinfo"):
    words = line.split()
    if " - tmpfs " in line and words[3] == "/":
        print(*words[4:6], *words[words.index("-"):])
"#;

fn all(host: &Host) -> Result<String> {
    let listing = python(host, LIST)?;
    let mut lines: Vec<&str> = listing.lines().collect();
    lines.sort_unstable();
    Ok(lines.join("\n"))
}

fn start(host: &Host) -> Result<()> {
    let program = PROGRAM.replace('\'', "'\\''");
    host.run(&format!(
        "ctr run -d --null-io --mount type=tmpfs,src=tmpfs,dst=/run/own,options=size=4m:mode=700 \
         --runtime {RUNTIME} docker.io/library/python:latest box python3 -c '{program}'"
    ))?;
    host.wait_until("it writes", |h| inside(h, "tail -1 /run/log").is_ok_and(|t| t.len() > 2))
}

#[test]
fn files_in_memory_go_on_where_they_were() -> Result<()> {
    let scene = Scene::start()?;
    let empty = traces(scene.host("b"))?;
    start(scene.host("a"))?;
    let before = all(scene.host("a"))?;
    ensure!(before.contains("/run/d 0o40751 12 34"), "{before}");
    for (to, way, carried) in
        [("b", "", 5), ("a", "--no-fast tmpfs", 0), ("b", "", 5), ("a", "", 5)]
    {
        let from = if to == "b" { "a" } else { "b" };
        let report = scene.try_migrate("box", from, to, &format!("{way} --json"))?;
        let report = report.checked("ferry migrate")?.stdout;
        let report: serde_json::Value = serde_json::from_str(&report).context("decode")?;
        let happened = &report["happened"];
        ensure!(happened["tmpfs"] == carried, "{way}: {report}");
        // The log and the unnamed file are written to until the freeze.
        ensure!((happened["tmpfs_again"].as_u64() > Some(0)) == way.is_empty(), "{way}: {report}");
        let here = scene.host(to);
        assert_eq!(all(here)?, before, "{way}");
        let asked: u64 = python(here, ASK)?.trim().parse()?;
        std::thread::sleep(Duration::from_millis(100));
        let log = inside(here, "cat /run/log")?;
        let numbers: Vec<u64> = log.lines().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(numbers.iter().zip(1..).all(|(seen, n)| *seen == n), "{way}: {log}");
        ensure!(numbers.last() > Some(&asked) && asked > 1, "{way}: {asked}, {:?}", numbers.last());
    }
    wait_for_traces_but_pages(scene.host("b"), &empty, "at the end")
}

#[test]
fn what_is_large_or_odd_is_left_to_criu() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    start(a)?;
    inside(a, "dd if=/dev/urandom of=/run/own/large bs=1M count=2; ln /run/d/data /run/again")?;
    let before = all(a)?;
    ensure!(before.contains("/run/again 0o100644 0 0 2 "), "{before}");
    let report = scene.try_migrate("box", "a", "b", "--json")?.checked("ferry migrate")?.stdout;
    let report: serde_json::Value = serde_json::from_str(&report).context("decode")?;
    // Its own is too large, and /run has a hard link.
    ensure!(report["happened"]["tmpfs"] == 3, "{report}");
    ensure!(report["happened"]["tmpfs_again"] == 0, "{report}");
    assert_eq!(all(scene.host("b"))?, before);
    Ok(())
}

/// Writes down what happens in folders that it watches.
const WATCH: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
watches = libc.inotify_init()
for folder in sys.argv[1:]:
    libc.inotify_add_watch(watches, folder.encode(), 0x100)
log = open("/log", "a", buffering=1)
log.write("watching\n")
while True:
    events, at = os.read(watches, 4096), 0
    while at < len(events):
        watch, _, _, length = struct.unpack_from("iIII", events, at)
        name = events[at + 16:at + 16 + length].rstrip(b"\0").decode()
        log.write(f"{watch} {name}\n")
        at += 16 + length
"#;

/// CRIU finds a watched file by a list whose name the gate of a prepared dump takes.
#[test]
fn watches_on_files_in_memory_go_on_after_a_move() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    std::fs::write(a.root().join("tmp/watch.py"), WATCH)?;
    a.run(&format!(
        "ctr run -d --null-io --mount type=tmpfs,src=tmpfs,dst=/run/own,options=size=4m \
         --runtime {RUNTIME} docker.io/library/python:latest box \
         python3 -c \"$(cat /tmp/watch.py)\" /dev/shm /run/own"
    ))?;
    // Before it has started there is no file.
    let watches = || Ok(inside(a, "cat /log || true")?.contains("watching"));
    until("it watches", watches)?;
    for (number, host) in (0..).zip([a, b]) {
        inside(host, &format!("touch /dev/shm/{number} /run/own/{number}"))?;
        let lines = 3 + 2 * number;
        until("it has seen both", || Ok(inside(host, "cat /log")?.lines().count() == lines))?;
        if number == 0 {
            let report = scene.try_migrate("box", "a", "b", "--json")?.checked("ferry migrate")?;
            let report: serde_json::Value = serde_json::from_str(&report.stdout)?;
            let held = report["fast"].as_array().context("no choices")?;
            let held = held.iter().find(|choice| choice["name"] == "held-dump");
            ensure!(held.is_some_and(|choice| choice["off"].is_null()), "{report}");
        }
    }
    let log = inside(b, "cat /log")?;
    ensure!(log == "watching\n1 0\n2 0\n1 1\n2 1\n", "{log}");
    Ok(())
}
