//! Real userfaultfds of real processes, served by a real keeper and its worker, which are killed.

mod crash;
mod life;
mod measure;
mod memory;
mod task;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Client, Point, State, Status, keeper_main};
use crate::pages::PAGE;
use crate::pages::store::{Limits, Store};

/// Longest wait for what must come. Machines may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

fn this_program(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", test, "--nocapture"]);
    command
}

/// A keeper in a process of its own, and who talks to it.
struct Rig {
    _root: tempfile::TempDir,
    dir: PathBuf,
    socket: PathBuf,
    keeper: Child,
    client: Client,
}

impl Rig {
    fn new() -> Self {
        Self::with(&Limits { disk: 0, max_pages: 1 << 20, ..Limits::default() })
    }

    fn with(limits: &Limits) -> Self {
        let root = tempfile::tempdir().expect("folder");
        let dir = root.path().join("store");
        let keeper = this_program("pages::daemon::tests::keeper_process")
            .env("FERRY_TEST_KEEPER", &dir)
            .env("FERRY_TEST_MEMORY", limits.memory.to_string())
            .env("FERRY_TEST_DISK", limits.disk.to_string())
            .env("FERRY_TEST_MAX_PAGES", limits.max_pages.to_string())
            .env("FERRY_TEST_EXPIRY", limits.expiry.as_millis().to_string())
            .env("FERRY_TEST_SPILL", root.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("keeper");
        let client = Client::connect_within(&dir, PATIENCE).expect("keeper listens");
        let socket = root.path().join("lazy-pages.socket");
        Self { _root: root, dir, socket, keeper, client }
    }

    fn open(&self) -> Store {
        let client = Client::connect(&self.dir).expect("keeper listens");
        client.open_store("redis", "migration-1").expect("open")
    }

    /// Writes the memory of tasks.
    fn write(&self, store: &mut Store, spaces: &[u32]) {
        for space in spaces {
            for page in 0..task::PAGES {
                let first = task::content(*space, page);
                let data: Vec<u8> = (0..PAGE / 8)
                    .flat_map(|word| {
                        first.map_or(0, |first| first.wrapping_add(word)).to_le_bytes()
                    })
                    .collect();
                store.write(*space, task::BASE + page as u64 * PAGE, &data).expect("write");
            }
        }
    }

    /// A store that is complete, with a listening page daemon.
    fn ready(spaces: &[u32]) -> Self {
        let rig = Self::new();
        rig.get_ready(spaces);
        rig
    }

    fn get_ready(&self, spaces: &[u32]) {
        let mut store = self.open();
        self.write(&mut store, spaces);
        self.client.listen(&self.socket).expect("listen");
        store.complete().expect("complete");
    }

    fn status(&self) -> Status {
        self.client.status().expect("status")
    }

    fn wait_for(&self, what: &str, mut wanted: impl FnMut(&Status) -> bool) -> Status {
        let start = Instant::now();
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {status:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn kill_worker(&self) {
        if let Ok(Status { worker: Some(worker), .. }) = self.client.status() {
            let _ = kill(Pid::from_raw(worker as i32), Signal::SIGKILL);
        }
    }

    /// Waits until the keeper has ended by itself and left nothing.
    fn end(&mut self) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.keeper.try_wait().expect("wait") {
                assert!(status.success(), "keeper: {status}");
                assert!(!self.dir.exists(), "the folder must be gone");
                return;
            }
            // Who has heard that all is in is not waited for.
            let status = self.client.status();
            assert!(start.elapsed() < PATIENCE, "keeper goes on: {status:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn task(&self, space: u32, script: &str) -> Restored {
        self.task_over(None, space, script)
    }

    /// A task that is restored over a connection that is there already, or over its own.
    fn task_over(&self, connection: Option<&UnixStream>, space: u32, script: &str) -> Restored {
        let mut command = this_program("pages::daemon::tests::task::task_process");
        command
            .env("FERRY_TEST_SCRIPT", script)
            .env("FERRY_TEST_SOCKET", &self.socket)
            .env("FERRY_TEST_SPACE", space.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(connection) = connection {
            task::inherit(&mut command, connection);
        }
        let mut process = command.spawn().expect("task");
        let stdin = process.stdin.take().expect("stdin");
        let stdout = BufReader::new(process.stdout.take().expect("stdout"));
        Restored { process, stdin, stdout }
    }

    /// A task from restore to end, with filling from the beginning if asked for.
    /// Returns what was said about it, if it was not over too soon for that.
    fn restored(spaces: &[u32], fill: bool, script: &str) -> Option<Status> {
        let mut rig = Self::ready(spaces);
        if fill {
            rig.client.fill().expect("fill");
        } else {
            rig.client.hold_fill().expect("hold");
        }
        let mut task = rig.task(spaces[0], &format!("{script};say done;wait"));
        task.hear("done");
        let status = rig.client.status().ok();
        task.go();
        task.right();
        rig.client.fill().ok();
        rig.end();
        status
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.kill_worker();
        let _ = self.keeper.kill();
        self.kill_worker();
        let _ = self.keeper.wait();
    }
}

/// A restored task.
struct Restored {
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Restored {
    /// Waits until the task says `word`; returns the rest of that line.
    fn hear(&mut self, word: &str) -> String {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        loop {
            if self.stdout.buffer().is_empty() {
                let mut fds = [PollFd::new(self.stdout.get_ref().as_fd(), PollFlags::POLLIN)];
                let wait = PollTimeout::try_from(PATIENCE.as_millis() as i32).expect("time");
                assert_eq!(poll(&mut fds, wait), Ok(1), "the task never said {word}");
            }
            let mut line = String::new();
            let n = self.stdout.read_line(&mut line).expect("read");
            assert!(n > 0, "the task ended before it said {word}: {:?}", self.process.wait());
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Lets the task go on from `wait`.
    fn go(&mut self) {
        self.stdin.write_all(b"\n").expect("task waits");
    }

    /// Waits until the task has ended and all was right.
    fn right(&mut self) {
        self.hear("right");
        assert!(self.process.wait().expect("wait").success());
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The keeper's process; in a run of the tests it does nothing.
#[test]
fn keeper_process() {
    let Ok(dir) = std::env::var("FERRY_TEST_KEEPER") else { return };
    let number = |name: &str| std::env::var(name).expect(name).parse().expect(name);
    let limits = Limits {
        memory: number("FERRY_TEST_MEMORY"),
        disk: number("FERRY_TEST_DISK"),
        max_pages: number("FERRY_TEST_MAX_PAGES"),
        expiry: Duration::from_millis(number("FERRY_TEST_EXPIRY")),
        spill_dir: std::env::var("FERRY_TEST_SPILL").expect("folder").into(),
    };
    let result = keeper_main(std::path::Path::new(&dir), limits);
    std::process::exit(i32::from(result.is_err()));
}
