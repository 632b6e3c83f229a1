//! Shims that end before their container: what is left once containerd has called `delete`, and what
//! signals do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::by_hand::{ByHand, IDLE, Shim, exec_request};
use ferry_tests::task::api;
use ferry_tests::versions::can_checkpoint;

use crate::{Answers, SHIMS, compare};

/// How long what is left is waited for to go.
const SOON: Duration = Duration::from_secs(15);
const ID: &str = "dies";
const IMAGES: &str = "/tmp/images-of-dies";

/// Brings the shim's container to where the shim is to die.
type Point = (&'static str, fn(&ByHand<'_>, &Shim) -> Result<()>);

const POINTS: [Point; 7] = [
    ("created", |hand, shim| hand.create(shim, ID, IDLE).map(drop)),
    ("running", running),
    ("running an exec", |hand, shim| {
        running(hand, shim)?;
        shim.task.call::<api::Empty>("Exec", &exec_request(ID, "e", IDLE))?;
        shim.start(ID, "e").map(drop).context("start the exec")
    }),
    ("paused", |hand, shim| {
        running(hand, shim)?;
        let request = api::PauseRequest { id: ID.into(), ..Default::default() };
        shim.task.call::<api::Empty>("Pause", &request).map(drop).context("pause")
    }),
    ("stopped", |hand, shim| {
        hand.create(shim, ID, &["true"])?;
        shim.start(ID, "")?;
        shim.wait(ID, "").map(drop).context("wait")
    }),
    ("being checkpointed", being_checkpointed),
    ("being restored", being_restored),
];

fn running(hand: &ByHand<'_>, shim: &Shim) -> Result<()> {
    hand.create(shim, ID, IDLE)?;
    shim.start(ID, "").map(drop).context("start")
}

/// Starts a request that is not answered before the shim dies.
fn begin(shim: &Shim, method: &'static str, request: Vec<u8>) {
    let task = shim.task.clone();
    std::thread::spawn(move || task.raw(method, request, Duration::from_secs(60)));
}

/// CRIU writes pages into a FIFO that nobody reads: it stands in the middle of the dump.
fn being_checkpointed(hand: &ByHand<'_>, shim: &Shim) -> Result<()> {
    running(hand, shim)?;
    hand.host.run(&format!("mkdir {IMAGES}; mkfifo {IMAGES}/pages-1.img"))?;
    let request =
        api::CheckpointTaskRequest { id: ID.into(), path: IMAGES.into(), ..Default::default() };
    begin(shim, "Checkpoint", ferry_tests::task::protobuf::Message::write_to_bytes(&request)?);
    until_criu_waits(hand)
}

/// The same with the images of a dump that was done before.
fn being_restored(hand: &ByHand<'_>, shim: &Shim) -> Result<()> {
    let before = "dumped";
    hand.create(shim, before, IDLE)?;
    shim.start(before, "")?;
    let path = IMAGES.to_owned();
    let request = api::CheckpointTaskRequest { id: before.into(), path, ..Default::default() };
    shim.task.call::<api::Empty>("Checkpoint", &request)?;
    shim.kill(before, "", 9)?;
    shim.wait(before, "")?;
    shim.delete(before, "")?;
    hand.host.run(&format!("rm {IMAGES}/pages-1.img; mkfifo {IMAGES}/pages-1.img"))?;
    hand.bundle(ID, IDLE)?;
    let request = api::CreateTaskRequest { checkpoint: IMAGES.into(), ..hand.create_request(ID) };
    shim.task.call::<api::CreateTaskResponse>("Create", &request)?;
    let request = api::StartRequest { id: ID.into(), ..Default::default() };
    begin(shim, "Start", ferry_tests::task::protobuf::Message::write_to_bytes(&request)?);
    until_criu_waits(hand)
}

/// Waits until CRIU sleeps in one and the same call.
fn until_criu_waits(hand: &ByHand<'_>) -> Result<()> {
    let calls = "pids=$(pgrep -x criu) && for pid in $pids; do cat /proc/$pid/syscall; done";
    hand.host.wait_until("CRIU stands at the FIFO", |h| {
        let call = || h.output(calls).map(|o| o.stdout).unwrap_or_default();
        let before = call();
        std::thread::sleep(Duration::from_millis(500));
        !before.is_empty() && !before.contains("running") && before == call()
    })
}

/// What is left of the container and its shim, in words.
fn left(hand: &ByHand<'_>, shim: &Shim) -> Result<String> {
    let script = "ls -d /run/containerd/runc/by-hand/dies >/dev/null 2>&1 && echo runc state
        grep -q /run/by-hand/dies/ /proc/mounts && echo mount
        [ -z \"$(find /sys/fs/cgroup -type d -path '*/by-hand/dies*')\" ] || echo cgroup
        for name in runc criu tail; do
            ps -C $name -o stat= | grep -qv Z && echo process $name
        done
        nft list tables | grep -q . && echo table
        ls /run/ferry/s 2>/dev/null | grep -q . && echo socket of ferry
        true";
    let mut left: Vec<String> = hand.host.run(script)?.stdout.lines().map(str::to_owned).collect();
    if shim.socket.exists() {
        left.push("socket".into());
    }
    Ok(if left.is_empty() { "nothing".into() } else { left.join(", ") })
}

/// Waits until nothing is left; what is, when it stays.
fn finally_left(hand: &ByHand<'_>, shim: &Shim) -> Result<String> {
    let deadline = Instant::now() + SOON;
    loop {
        let now = left(hand, shim)?;
        if now == "nothing" || Instant::now() > deadline {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn wait_for_end(hand: &ByHand<'_>, shim: &Shim) -> Result<()> {
    hand.host.wait_until("the shim has ended", |h| {
        h.output(&format!("grep -q 'State:.[^Z]' /proc/{}/status", shim.pid))
            .is_ok_and(|o| !o.status.success())
    })
}

#[test]
fn a_shim_that_is_killed_is_cleaned_up_wherever_its_container_was() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    let mut both = [Answers::new(), Answers::new()];
    for (program, of) in SHIMS.into_iter().zip(&mut both) {
        println!("{program}:");
        for (point, reach) in POINTS {
            if !can_checkpoint()? && ["being checkpointed", "being restored"].contains(&point) {
                continue;
            }
            let shim = hand.shim(program, ID, crate::service()?)?;
            reach(&hand, &shim).with_context(|| format!("{program}, {point}: {}", shim.log()))?;
            hand.host.run(&format!("kill -9 {}", shim.pid))?;
            wait_for_end(&hand, &shim)?;
            let answer = hand.delete(program, ID);
            let answer = answer.with_context(|| format!("{program}, {point}"))?;
            let left = finally_left(&hand, &shim)?;
            let left = format!("exit status {}; left: {left}", answer.exit_status);
            println!("  {point}: {left}");
            of.push((point.to_owned(), left));
            hand.clear()?;
        }
    }
    compare("shim killed", both)
}

#[test]
fn signals_end_a_shim_as_they_end_the_reference() -> Result<()> {
    let lab = ferry_tests::task_lab()?;
    let hand = ByHand::on(lab.host("a"))?;
    let mut both = [Answers::new(), Answers::new()];
    for (program, of) in SHIMS.into_iter().zip(&mut both) {
        println!("{program}:");
        for signal in ["TERM", "INT", "HUP", "PIPE", "USR1"] {
            let shim = hand.shim(program, ID, crate::service()?)?;
            running(&hand, &shim)?;
            hand.host.run(&format!("kill -{signal} {}", shim.pid))?;
            let deadline = Instant::now() + Duration::from_secs(4);
            let alive = format!("grep -q 'State:.[^Z]' /proc/{}/status", shim.pid);
            while hand.host.output(&alive)?.status.success() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(50));
            }
            let lives = hand.host.output(&alive)?.status.success();
            let socket = if shim.socket.exists() { "its socket there" } else { "its socket gone" };
            let container = hand.host.output("ps -C tail -o stat= | grep -qv Z")?.status.success();
            let answer = format!(
                "{}, {socket}, its container {}",
                if lives { "lives" } else { "ends" },
                if container { "runs" } else { "gone" },
            );
            println!("  {signal}: {answer}");
            of.push((format!("SIG{signal}"), answer));
            if lives {
                hand.host.run(&format!("kill -9 {}", shim.pid))?;
                wait_for_end(&hand, &shim)?;
            }
            let answer = hand.delete(program, ID)?;
            ensure!(answer.exit_status == 137, "{program}: {answer}");
            hand.clear()?;
        }
    }
    compare("signal to the shim", both)
}
