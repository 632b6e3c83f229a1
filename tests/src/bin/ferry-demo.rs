//! `ferry-demo`: a redis of 400 MB moved there and back, by hand and with ferry, each time under the
//! eyes of clients that never connect again. Called by `hack/demo`.
//!
//! ```text
//!  per way of moving:   the same redis, started on a
//!                       a -> b, b -> a
//!  its clients:         one for each move (the numbers of that move)
//!                       one through both (the same connections moved twice)
//! ```

use std::fs;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use ferry_tests::scene::{FLOATING, migrate_command, traces, wait_for_traces};
use ferry_tests::{Host, Job, Output, Scene, sweep};
use serde_json::Value;

/// Keys in redis; with values of 60 bytes they are somewhat more than 400 MB of resident memory.
const KEYS: u64 = 3_000_000;
/// Connections of each client.
const CONNECTIONS: u64 = 4;
/// How long clients ask before and after each move.
const AROUND: Duration = Duration::from_secs(2);
/// The two moves.
const MOVES: [(&str, &str); 2] = [("a", "b"), ("b", "a")];

/// The bundle of the container that is moved by hand: root file system and configuration are those
/// that containerd would give the same container, and lie on both hosts before anything moves.
const BUNDLE: &str = r#"
set -e
mkdir -p /var/lib/containerd/hand/rootfs /mnt/image
cd /var/lib/containerd/hand
ctr image mount docker.io/library/redis:latest /mnt/image >/dev/null
cp -a /mnt/image/. rootfs
umount /mnt/image
ctr container create --net-host docker.io/library/redis:latest hand \
    redis-server --protected-mode no --save '' --enable-debug-command yes
ctr container info --spec hand >config.json
ctr container rm hand
"#;

/// Its start. A container whose output is a file of the host could not be dumped.
const START: &str = "ip addr add $FLOATING/24 dev eth0; cd /var/lib/containerd/hand
runc run --detach hand </dev/null >/dev/null 2>&1";

/// The move by hand, as a careful administrator scripts it: images in memory at both ends, one
/// connection, the address away before it is added elsewhere, added before the sockets are bound to
/// it, announced at once. Run on the host that is left; `$TO` is the other.
const MOVE: &str = r#"
set -eu
images=/run/hand/images
mkdir -p $images
ssh $TO mkdir -p $images
echo start $(date +%s%3N)
runc checkpoint --tcp-established --image-path $images --work-path /run/hand hand
echo checkpoint $(date +%s%3N)
ip addr del $FLOATING/24 dev eth0
tar -C $images -cf - . | ssh $TO "
    set -eu
    tar -C $images -xf -
    echo copy \$(date +%s%3N)
    ip addr add $FLOATING/24 dev eth0
    runc restore --detach --tcp-established --bundle /var/lib/containerd/hand \
        --image-path $images --work-path /run/hand hand </dev/null >/dev/null 2>&1
    arping -q -A -c 1 -I eth0 $FLOATING
    echo restore \$(date +%s%3N)"
"#;

/// What must be cleared away by hand so that the next moves start on clean hosts.
const CLEAN: &str = "rm -rf /run/hand; runc delete -f hand; ip addr del $FLOATING/24 dev eth0
iptables -F; nft flush ruleset; true";

/// Counts the rules that CRIU made to keep a connection silent during a dump, by its mark.
const RULES: &str = "nft list ruleset | grep -ci c114 || true";

/// One value for the contents of 10,000 keys.
const DIGEST: &str =
    "seq -f key:%.0f 0 300 2999999 | xargs redis-cli debug digest-value | sha256sum";

/// Prints a line. That nobody reads on is no error.
macro_rules! say {
    ($($text:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

fn main() -> ExitCode {
    if let Err(e) = sweep::remove_at_signal() {
        eprintln!("ferry-demo: {e:#}");
        return ExitCode::FAILURE;
    }
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("ferry-demo: ferry's moves were not clean, see above");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("ferry-demo: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether ferry's moves kept every connection and every answer was right.
fn run() -> Result<bool> {
    let start = Instant::now();
    // Other work on the machine shows in the numbers.
    let load = fs::read_to_string("/proc/loadavg").context("read the load")?;
    let load = load.split(' ').next().unwrap_or_default().to_owned();
    let scene = Scene::start()?;
    say!("hosts a, b and a client in {:.1} s:", start.elapsed().as_secs_f64());
    for host in scene.lab.hosts().iter().chain([scene.lab.client()]) {
        say!("  {:<7} {}", host.name(), host.address());
    }
    say!("  redis   {FLOATING}, on a first, then on b, then on a again");
    say!("clients have {CONNECTIONS} connections, ask without pause and never connect again");
    let versions = versions(scene.host("a"))?;

    say!("\nBY HAND: runc checkpoint, tar over ssh, runc restore, arping");
    let by_hand = by_hand(&scene)?;
    say!("\nWITH FERRY");
    let ferry = with_ferry(&scene)?;
    drop(scene);

    say!(
        "\n{:<17} {:>11} {:>14} {:>9} {:>7} {:>5}",
        "",
        "downtime ms",
        "longest gap ms",
        "requests",
        "errors",
        "lost"
    );
    by_hand.table("by hand");
    ferry.table("ferry");
    say!("downtime: frozen to running; ferry's, as it reports it, until the address is announced");
    say!("lost: connections, of {CONNECTIONS}; a client gives one up at its first error");
    say!("{versions}; load before: {load}");
    say!("the hosts are removed; all of it took {:.0} s", start.elapsed().as_secs_f64());
    Ok(ferry.clean())
}

/// A move and what its client saw.
struct Moved {
    /// Milliseconds; none when the container did not arrive.
    downtime: Option<f64>,
    seen: Seen,
}

/// Two moves, there and back.
struct Trip {
    moves: Vec<Moved>,
    /// The client that stayed through all of it.
    through: Seen,
    /// Whether redis held the same keys at the end.
    keys: bool,
}

impl Trip {
    fn clean(&self) -> bool {
        let arrived = self.moves.iter().filter(|m| m.downtime.is_some()).count() == MOVES.len();
        let seen = self.moves.iter().map(|m| &m.seen).chain([&self.through]);
        arrived && self.keys && seen.into_iter().all(Seen::clean)
    }

    fn table(&self, way: &str) {
        for ((from, to), moved) in MOVES.iter().zip(&self.moves) {
            let downtime = moved.downtime.map_or("failed".into(), |ms| format!("{ms:.0}"));
            moved.seen.row(&format!("{way:<8} {from} -> {to}"), &downtime);
        }
        self.through.row(&format!("{way:<8} both"), "");
    }
}

/// What a client saw.
struct Seen {
    connections: u64,
    requests: u64,
    errors: Vec<String>,
    longest_gap_ms: f64,
}

impl Seen {
    /// Ends `client` and reads its report.
    fn of(client: Job) -> Result<Self> {
        let output = client.stop()?;
        let line = output.stdout.lines().last().with_context(|| format!("no report: {output}"))?;
        let report: Value = serde_json::from_str(line).with_context(|| format!("read {line}"))?;
        let errors = report["errors"].as_array().context("the report has no errors")?;
        Ok(Self {
            connections: report["connections"].as_u64().context("no connections")?,
            requests: report["requests"].as_u64().context("no requests")?,
            errors: errors.iter().map(|e| e.as_str().unwrap_or_default().to_owned()).collect(),
            longest_gap_ms: report["longest_gap_ms"].as_f64().context("no gap")?,
        })
    }

    fn clean(&self) -> bool {
        self.errors.is_empty() && self.requests > 0 && self.connections == CONNECTIONS
    }

    /// Connections that broke; on the others an answer was wrong.
    fn lost(&self) -> usize {
        self.errors.iter().filter(|e| !e.contains("the answer was")).count()
    }

    fn row(&self, what: &str, downtime: &str) {
        say!(
            "{what:<17} {downtime:>11} {:>14.0} {:>9} {:>7} {:>5}",
            self.longest_gap_ms,
            self.requests,
            self.errors.len(),
            self.lost()
        );
    }

    fn say(&self, who: &str) {
        say!(
            "  {who}: {} requests, {} errors, longest gap {:.0} ms, {}",
            self.requests,
            self.errors.len(),
            self.longest_gap_ms,
            match self.lost() {
                0 => "every connection kept".to_owned(),
                n => format!("{n} of {} connections lost", self.connections),
            }
        );
        if let Some(first) = self.errors.first() {
            say!("    first error: {first}");
        }
    }
}

/// Moves the same redis, a plain container of runc, without ferry.
fn by_hand(scene: &Scene) -> Result<Trip> {
    let (a, b) = (scene.host("a"), scene.host("b"));
    for host in [a, b] {
        host.run(BUNDLE)?;
    }
    let config = "var/lib/containerd/hand/config.json";
    fs::copy(a.root().join(config), b.root().join(config)).context("copy the configuration")?;
    a.run(&with_address(START))?;
    a.wait_until("redis answers", |h| h.output("redis-cli ping").is_ok_and(|o| answers(&o)))?;
    let trip = there_and_back(scene, |from, to| {
        for host in [from, to] {
            host.run("rm -rf /run/hand")?;
        }
        let output = from.output(&format!("TO={}\n{}", to.address(), with_address(MOVE)))?;
        if !output.status.success() {
            say!("  it failed: {output}");
            return Ok(None);
        }
        let times = times(&output.stdout)?;
        let steps: Vec<_> = times
            .windows(2)
            .map(|pair| format!("{} {} ms", pair[1].0, pair[1].1 - pair[0].1))
            .collect();
        say!("  {}", steps.join(", "));
        Ok(Some((running(to)? - frozen(from)?) * 1000.0))
    })?;
    let rules = |host: &Host| Ok::<_, anyhow::Error>(host.run(RULES)?.stdout.trim().to_owned());
    say!("  left behind: {} of CRIU's firewall rules on a, {} on b", rules(a)?, rules(b)?);
    for host in [a, b] {
        host.run(&with_address(CLEAN))?;
    }
    Ok(trip)
}

/// Moves redis as a container of ferry.
fn with_ferry(scene: &Scene) -> Result<Trip> {
    let (a, b) = (scene.host("a"), scene.host("b"));
    let without = traces(b)?;
    scene.start_redis("a", 0)?;
    let with_redis = traces(a)?;
    let trip = there_and_back(scene, |from, to| {
        let command = migrate_command("redis", to, &format!("--ip {FLOATING}/24"));
        say!("  {}# {command}", from.name());
        let output = from.output(&command)?;
        if !output.status.success() {
            say!("  it failed: {output}");
            return Ok(None);
        }
        for line in output.stdout.lines() {
            say!("    {line}");
        }
        let downtime = output.stdout.split("downtime ").nth(1).and_then(|t| t.split(' ').next());
        let downtime = downtime.with_context(|| format!("no downtime in {output}"))?;
        Ok(Some(downtime.parse().with_context(|| format!("read {downtime}"))?))
    })?;
    let left = wait_for_traces(a, &with_redis, "after both moves")
        .and_then(|()| wait_for_traces(b, &without, "after both moves"));
    say!("  left behind: {}", left.map_or_else(|e| format!("{e:#}"), |()| "nothing".into()));
    Ok(trip)
}

/// Fills redis, and moves it while clients ask. `go` moves it and says for how many milliseconds it
/// stood still, or that it did not arrive.
fn there_and_back(
    scene: &Scene,
    mut go: impl FnMut(&Host, &Host) -> Result<Option<f64>>,
) -> Result<Trip> {
    let a = scene.host("a");
    a.run(&format!("redis-cli debug populate {KEYS} key 60"))?;
    let digest = a.run(DIGEST)?.stdout;
    let memory = a.run("redis-cli info memory")?.stdout;
    let resident = memory.lines().find_map(|l| l.strip_prefix("used_memory_rss_human:"));
    say!("redis is on a: {KEYS} keys, {} resident", resident.unwrap_or("?").trim());

    let through = client(scene)?;
    let mut moves = Vec::new();
    for (from, to) in MOVES {
        say!("{from} -> {to}");
        let near = client(scene)?;
        std::thread::sleep(AROUND);
        let downtime = go(scene.host(from), scene.host(to))?;
        std::thread::sleep(AROUND);
        let seen = Seen::of(near)?;
        seen.say("its client");
        moves.push(Moved { downtime, seen });
        if downtime.is_none() {
            break;
        }
    }
    let through = Seen::of(through)?;
    through.say("client of both moves");

    // Each connection of a client counts in a key of its own.
    let keys = KEYS + CONNECTIONS * (moves.len() as u64 + 1);
    let count = a.output("redis-cli dbsize")?.stdout;
    let keys = count.trim() == keys.to_string() && a.output(DIGEST)?.stdout == digest;
    say!("  keys afterwards: {} ({})", count.trim(), if keys { "the same" } else { "WRONG" });
    Ok(Trip { moves, through, keys })
}

/// Starts a client and waits until it is connected.
fn client(scene: &Scene) -> Result<Job> {
    let mut job = scene.lab.client().spawn(&format!(
        "exec ferry-echo redis {FLOATING}:6379 --connections {CONNECTIONS} --interval-us 0"
    ))?;
    job.wait_for("ready", Duration::from_secs(10))?;
    Ok(job)
}

fn answers(output: &Output) -> bool {
    output.stdout.contains("PONG")
}

fn with_address(script: &str) -> String {
    format!("FLOATING={FLOATING}\n{script}")
}

/// The lines `step milliseconds` of [`MOVE`].
fn times(text: &str) -> Result<Vec<(&str, i64)>> {
    let times: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(step, ms)| Some((step, ms.parse().ok()?)))
        .collect();
    ensure!(times.len() == 4, "unexpected output of the move by hand: {text}");
    Ok(times)
}

/// When the last dump on `host` wrote to the freezer, in seconds. CRIU's log counts from its own
/// start, so it is found backwards from the log's end.
fn frozen(host: &Host) -> Result<f64> {
    let (log, end) = log(host, "dump.log")?;
    let stamp = |line: &str| line.strip_prefix('(')?.split(')').next()?.parse::<f64>().ok();
    let froze = log.lines().find(|l| l.contains("freezing ")).and_then(stamp);
    let last = log.lines().rev().find_map(stamp);
    Ok(end - last.context("an empty log of CRIU")? + froze.context("CRIU did not freeze")?)
}

/// When the last restore on `host` was done.
fn running(host: &Host) -> Result<f64> {
    log(host, "restore.log").map(|(_, end)| end)
}

/// A log of CRIU, and when its last line was written.
fn log(host: &Host, name: &str) -> Result<(String, f64)> {
    let path = host.root().join("run/hand").join(name);
    let what = || format!("read {}", path.display());
    let end = fs::metadata(&path).and_then(|m| m.modified()).with_context(what)?;
    let text = fs::read(&path).with_context(what)?;
    Ok((String::from_utf8_lossy(&text).into_owned(), end.duration_since(UNIX_EPOCH)?.as_secs_f64()))
}

/// Date, kernel and programs, one line.
fn versions(host: &Host) -> Result<String> {
    let script = "
        echo $(date +%F), kernel $(uname -r), $(nproc) CPUs, \
        containerd $(containerd --version | awk '{print $3}'), \
        runc $(runc --version | awk 'NR == 1 {print $3}'), \
        criu $(criu --version | awk 'NR == 1 {print $2}'), \
        redis $(redis-server --version | sed 's/.*v=\\([^ ]*\\).*/\\1/')";
    Ok(host.run(script)?.stdout.trim().to_owned())
}
