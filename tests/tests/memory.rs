//! Memory that moves: every byte of it arrives, by the fast paths and by those behind them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_oci::fast::Fast;
use ferry_tests::memory::{Asked, LATE_FILL, stores, wait_for_fill};
use ferry_tests::scene::{
    FLOATING, finish_client, go_on, stop_at, task_state, traces, wait_for_traces,
};
use ferry_tests::{Host, Scene};
use serde_json::Value;

/// A workload that is checked in a second or two.
const SMALL: &str = "check --processes 3 --threads 1 --megabytes 8";

/// From where a container comes to `to`, and that.
fn there(to: &str) -> (&'static str, &'static str) {
    if to == "b" { ("a", "b") } else { ("b", "a") }
}

fn move_to(scene: &Scene, id: &str, to: &str, more: &str) -> Result<Value> {
    let (from, to) = there(to);
    let more = format!("--ip {FLOATING}/24 --json {more}");
    let output = scene.try_migrate(id, from, to, &more)?;
    let output = output.checked(&format!("ferry migrate {more}"))?;
    serde_json::from_str(&output.stdout).with_context(|| format!("decode {}", output.stdout))
}

/// Moves `mem` and has every byte looked at, while pages are filled and after it. Guards change until
/// the freeze is near.
fn move_checked(scene: &Scene, memory: &mut Asked, to: &str, more: &str) -> Result<Value> {
    memory.keep_guards(false)?;
    let (from, to) = there(to);
    let more = format!("--ip {FLOATING}/24 --json {more}");
    let job = stop_at(scene, "mem", Phase::Hold.name(), (from, to), &more)?;
    memory.keep_guards(true)?;
    go_on(scene.host(from))?;
    let output = job.wait(Duration::from_secs(60))?.checked(&format!("ferry migrate {more}"))?;
    let checked = memory.check().and_then(|pages| {
        ensure!(pages > 1000, "only {pages} pages");
        memory.goes_on()?;
        wait_for_fill(scene.host(to))?;
        memory.check()
    });
    checked.with_context(|| format!("after ferry migrate {more}: {output}"))?;
    serde_json::from_str(&output.stdout).with_context(|| format!("decode {}", output.stdout))
}

/// Starts redis on `a` with `keys` keys of `size` bytes; what its digest is.
fn filled_redis(scene: &Scene, keys: u32, size: u32) -> Result<String> {
    scene.start_redis("a", 0)?;
    scene.host("a").run(&format!("redis-cli debug populate {keys} key {size}"))?;
    digest(scene.host("a"))
}

fn digest(host: &Host) -> Result<String> {
    let text = host.run("timeout 120 redis-cli debug digest")?.stdout;
    ensure!(text.trim().len() == 40, "no digest: {text:?}");
    Ok(text)
}

/// Sum of a number over the rounds of memory while the container ran.
fn live(report: &Value, what: &str) -> u64 {
    let rounds = report["happened"]["rounds"].as_array().map_or(&[][..], Vec::as_slice);
    rounds.iter().filter(|r| r["frozen"] == false).filter_map(|r| r[what].as_u64()).sum()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(u64::MAX)
}

fn kill_driver(host: &Host) -> Result<()> {
    host.run("pkill -9 -f '^ferry migrate'").map(drop)
}

#[test]
fn every_byte_of_every_kind_of_memory_crosses_there_and_back() -> Result<()> {
    let scene = Scene::start()?;
    let mode = "check --processes 3 --megabytes 16";
    let mut memory = scene.start_memory("a", mode, "--privileged")?;
    let before = memory.stats()?;
    let missing = before["missing"].as_array().context("no list of what is missing")?;
    // The pool of huge pages is empty on most machines.
    ensure!(missing.iter().all(|kind| kind == "HugeTlb"), "{before}");
    for to in ["b", "a"] {
        // It writes all the time: how long the pause gets is not what is looked at here.
        let report = move_checked(&scene, &mut memory, to, "--downtime-target 1000")?;
        ensure!(report["warnings"].as_array().is_some_and(Vec::is_empty), "{report}");
        // A file in /dev/shm is mapped and written to until the freeze, but not at every moment.
        ensure!(number(&report["happened"]["tmpfs_again"]) <= 1, "{report}");
        ensure!(live(&report, "stops") >= 3, "three processes, and nobody was stopped: {report}");
    }
    let after = memory.stats()?;
    ensure!(after["events"].as_u64() > before["events"].as_u64(), "{before} {after}");
    // While it was tracked, twice, the kernel has never refused to move memory.
    ensure!(after["refused"] == 0, "{before} {after}");
    Ok(())
}

/// Moves the same container there and back with each of `ways` once.
fn crosses_by(ways: &[String]) -> Result<()> {
    let scene = Scene::start()?;
    let mut memory = scene.start_memory("a", SMALL, "")?;
    for (n, way) in ways.iter().enumerate() {
        let to = if n % 2 == 0 { "b" } else { "a" };
        let report = move_checked(&scene, &mut memory, to, way)?;
        let choices = report["fast"].as_array().context("no choices")?;
        for choice in choices.iter().filter(|c| way.contains(c["name"].as_str().unwrap_or("?"))) {
            ensure!(choice["off"].is_string(), "{choice} is on: {report}");
        }
        for (fast, what) in
            [(Fast::Hide, "scans_hidden"), (Fast::Tmpfs, "tmpfs"), (Fast::Tar, "fast_tar_calls")]
        {
            let off = way.contains(fast.name()) || way.contains(Fast::HeldDump.name());
            ensure!(!off || report["happened"][what] == 0, "{what} after {way}: {report}");
        }
    }
    Ok(())
}

#[test]
fn the_slow_path_behind_each_fast_one_is_as_correct() -> Result<()> {
    crosses_by(&Fast::ALL.map(|fast| format!("--no-fast {}", fast.name())))
}

#[test]
fn memory_crosses_whole_without_a_tracker_and_without_precopy() -> Result<()> {
    let all: String = Fast::ALL.map(|fast| format!("--no-fast {} ", fast.name())).concat();
    let stop = ["--mode stop", "--mode stop --no-fast held-restore", "--tracker none"];
    crosses_by(&[&stop.map(str::to_owned)[..], &[all]].concat())
}

/// Moves `id`, and looks at what waits for the freeze on both hosts before it comes.
fn move_held(scene: &Scene, id: &str, to: &str) -> Result<Value> {
    let (from, to) = there(to);
    let more = format!("--ip {FLOATING}/24 --json");
    let job = stop_at(scene, id, Phase::Freeze.name(), (from, to), &more)?;
    for (host, what) in [(from, "checkpoint"), (to, "restore")] {
        let processes = scene.host(host).run("ps -eo args")?.stdout;
        let of = |program: &str, what: &str| {
            processes.lines().find(|line| line.starts_with(program) && line.contains(what))
        };
        let runc = of("runc ", what).with_context(|| format!("no {what} waits: {processes}"))?;
        ensure!(runc.contains("--manage-cgroups-mode ignore"), "{runc}");
        let criu = of("criu", if what == "restore" { "restore" } else { "dump" });
        ensure!(criu.is_some(), "no criu waits on {host}: {processes}");
    }
    go_on(scene.host(from))?;
    let output = job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
    serde_json::from_str(&output.stdout).with_context(|| format!("decode {}", output.stdout))
}

#[test]
#[ignore = "half an hour: hack/test --all"]
fn memory_crosses_in_every_mode_with_each_fast_path_off_ten_times() -> Result<()> {
    let off = Fast::ALL.map(|fast| format!("--no-fast {}", fast.name()));
    for mode in ["stop", "pre", "auto"] {
        for off in off.iter().map(String::as_str).chain([""]) {
            let way = format!("--mode {mode} {off}");
            crosses_by(&vec![way.clone(); 10]).with_context(|| way)?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "13 GB of memory: hack/test --all"]
fn redis_has_the_same_digest_at_40_mb_400_mb_and_4_gb() -> Result<()> {
    for keys in [10_000, 100_000, 1_000_000] {
        let scene = Scene::start()?;
        let before = filled_redis(&scene, keys, 4000)?;
        for to in ["b", "a"] {
            move_to(&scene, "redis", to, "")?;
            wait_for_fill(scene.host(to))?;
            ensure!(digest(scene.host(to))? == before, "{keys} keys are others on {to}");
        }
    }
    Ok(())
}

#[test]
fn no_fast_path_falls_back_silently() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 1000)?;
    let client = scene.start_client(5)?;
    let report = move_held(&scene, "redis", "b")?;
    let choices = report["fast"].as_array().context("no choices")?;
    ensure!(choices.len() == Fast::ALL.len(), "{report}");
    ensure!(choices.iter().all(|choice| choice["off"].is_null()), "{report}");
    ensure!(report["warnings"].as_array().is_some_and(Vec::is_empty), "{report}");
    let happened = &report["happened"];
    for (what, expected) in [
        ("scans_hidden", true),
        ("guard_scans_hidden", true),
        ("smaps_given", true),
        ("smaps_real", false),
        ("tmpfs", true),
        ("patched_bytes", true),
        ("tmpfs_again", false),
        // All of them are left out.
        ("fast_tar_calls", false),
        ("real_tar_calls", false),
        ("early_images", true),
    ] {
        ensure!((number(&happened[what]) > 0) == expected, "{what}: {report}");
    }
    ensure!(happened["packets_queued"] == true && happened["criu_lock"] == false, "{report}");
    let pages = number(&report["bytes"]["pages"]);
    ensure!(pages < 3 << 20 && pages < number(&report["resident"]), "{report}");

    wait_for_fill(scene.host("b"))?;
    let plain = move_to(&scene, "redis", "a", "--no-fast hide --no-fast tmpfs")?;
    ensure!(plain["happened"]["scans_hidden"] == 0 && plain["happened"]["tmpfs"] == 0, "{plain}");
    let tars = [&plain["happened"]["fast_tar_calls"], &happened["tmpfs"]].map(number);
    ensure!(tars[0] == tars[1] && plain["happened"]["real_tar_calls"] == 0, "{plain}");
    ensure!(number(&plain["bytes"]["pages"]) > pages, "{plain}");

    wait_for_fill(scene.host("a"))?;
    let slow = "--no-fast lock --no-fast queue --no-fast images --no-fast freezer";
    let slow = move_to(&scene, "redis", "b", slow)?;
    let happened = &slow["happened"];
    ensure!(happened["packets_queued"] == false && happened["criu_lock"] == true, "{slow}");
    ensure!(happened["early_images"] == 0, "{slow}");
    finish_client(client)?;
    Ok(())
}

/// A container on `a` after two moves, and a migration of it to `b` whose driver was killed when all
/// its memory was there. With the report of the first move, which sent all of it.
fn cancelled(scene: &Scene) -> Result<Value> {
    let first = move_to(scene, "redis", "b", "")?;
    wait_for_fill(scene.host("b"))?;
    move_to(scene, "redis", "a", "")?;
    wait_for_fill(scene.host("a"))?;
    let ip = format!("--ip {FLOATING}/24");
    let job = stop_at(scene, "redis", Phase::Hold.name(), ("a", "b"), &ip)?;
    kill_driver(scene.host("a"))?;
    job.wait(Duration::from_secs(20))?;
    go_on(scene.host("a"))?;
    // The agent undoes the rest before the store is free.
    scene.host("b").wait_until("the pages are kept", |h| {
        stores(h).is_ok_and(|s| s.len() == 1 && s[0]["expires_s"].is_u64())
    })?;
    Ok(first)
}

/// Changes a part of every 20th value of redis.
const CHANGE: &str = "for n = 0, 59999, 400 do for m = n, n + 19 do \
    redis.call(\"setrange\", \"key:\" .. m, 100, \"other than before\") end end";

#[test]
fn the_next_attempt_after_a_cancelled_one_sends_only_what_changed() -> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let empty = traces(b)?;
    let before = filled_redis(&scene, 60_000, 500)?;
    let first = cancelled(&scene)?;
    let kept = stores(b)?;
    ensure!(kept[0]["name"] == "default.redis", "{kept:?}");
    ensure!(number(&kept[0]["bytes"]) > 30 << 20, "{kept:?}");
    let told = b.run("ferry status")?.stdout;
    ensure!(told.contains("default/redis") && told.contains("next attempt"), "{told}");
    ensure!(task_state(a, "redis")?.as_deref() == Some("RUNNING"));

    // What the store has of these is old now, and what it has of those in between is not.
    a.run(&format!("redis-cli eval '{CHANGE}' 0"))?;
    let changed = digest(a)?;
    ensure!(changed != before, "nothing has changed");
    let before = changed;

    let again = move_to(&scene, "redis", "b", "")?;
    let all = number(&first["happened"]["rounds"][0]["listed"]);
    let reused = number(&again["happened"]["reused_pages"]);
    ensure!(reused * 10 > all * 8, "{reused} of {all} pages: {again}");
    let (sent, all) = (live(&again, "bytes"), live(&first, "bytes"));
    ensure!(sent * 10 < all * 3, "{sent} instead of {all} bytes: {again}");
    ensure!(digest(b)? == before, "the digest is another");
    wait_for_fill(b)?;
    ensure!(stores(a)?.is_empty() && stores(b)?.is_empty());

    // And nothing of it all is left when it has gone home.
    move_to(&scene, "redis", "a", "")?;
    ensure!(digest(a)? == before, "the digest is another");
    wait_for_traces(b, &empty, "after an attempt that was cancelled")
}

#[test]
fn ferry_drop_forgets_what_a_failed_migration_left() -> Result<()> {
    let scene = Scene::start()?;
    let b = scene.host("b");
    scene.start_redis("a", 1000)?;
    let empty = traces(b)?;
    cancelled(&scene)?;
    let wrong = b.output("ferry drop another")?;
    ensure!(!wrong.status.success() && wrong.stderr.contains("another"), "{wrong}");
    ensure!(stores(b)?.len() == 1, "it dropped something else");
    let keeper = b.run("pgrep -f '^[^ ]*ferry pages'")?.stdout;
    ensure!(!keeper.is_empty());
    b.run("ferry drop redis")?;
    ensure!(stores(b)?.is_empty(), "it is still there");
    ensure!(!b.output("ferry drop redis")?.status.success(), "dropped twice");
    wait_for_traces(b, &empty, "after ferry drop")?;
    let report = move_to(&scene, "redis", "b", "")?;
    ensure!(report["happened"]["reused_pages"] == 0, "{report}");
    Ok(())
}

/// Moves redis three times at once one after the other, with most of its memory still to come.
fn moves_on_at_once(keys: u32) -> Result<()> {
    let scene = Scene::start()?;
    let before = filled_redis(&scene, keys, 500)?;
    for to in ["b", "a", "b"] {
        move_to(&scene, "redis", to, LATE_FILL)?;
        ensure!(!stores(scene.host(to))?.is_empty(), "its memory is all there already");
    }
    ensure!(digest(scene.host("b"))? == before, "the digest is another");
    Ok(())
}

#[test]
fn a_container_whose_pages_are_being_filled_is_moved_again_unharmed() -> Result<()> {
    moves_on_at_once(150_000)
}

/// Makes a page of a held area a guard, asked from the host itself: the others look for it elsewhere.
fn guard(host: &Host, page: u32) -> Result<()> {
    let ask =
        format!("exec 3<>/dev/tcp/127.0.0.1/7778; echo guard {page} >&3; read -r x <&3; echo $x");
    let answer = host.run(&format!("bash -c '{ask}'"))?.stdout;
    ensure!(answer.trim() == "ok", "guard {page}: {answer:?}");
    Ok(())
}

#[test]
fn guard_pages_cross_that_were_set_long_ago_and_just_before_the_freeze() -> Result<()> {
    let scene = Scene::start()?;
    let mut memory = scene.start_memory("a", "hold --kind guarded --megabytes 16", "")?;
    let ip = format!("--ip {FLOATING}/24 --json");
    // Its second question needs no new memory, and CRIU was told that there are no guards.
    guard(scene.host("a"), 7)?;
    guard(scene.host("a"), 7)?;
    let job = stop_at(&scene, "mem", "announced", ("a", "b"), &ip)?;
    guard(scene.host("a"), 5)?;
    go_on(scene.host("a"))?;
    let output = job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
    let report: Value = serde_json::from_str(&output.stdout)?;
    ensure!(report["warnings"].to_string().contains("has set guard pages just now"), "{report}");
    memory.check()?;
    wait_for_fill(scene.host("b"))?;
    guard(scene.host("b"), 2000)?;
    memory.check()?;
    let report = move_to(&scene, "mem", "a", "")?;
    ensure!(report["warnings"].as_array().is_some_and(Vec::is_empty), "{report}");
    ensure!(report["happened"]["guard_scans_hidden"].as_u64() > Some(0), "{report}");
    memory.check().map(drop)
}

#[test]
#[ignore = "400 MB"]
fn a_large_container_whose_pages_are_being_filled_is_moved_again_unharmed() -> Result<()> {
    moves_on_at_once(600_000)
}

/// Lets the process that fills memory on a host run for a moment now and then, for some seconds.
const SLOW_WORKER: &str = r#"
    for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        keeper=$(sed -n 's/.*"keeper":\([0-9]*\).*/\1/p' /run/ferry/pages/*/meta.json 2>/dev/null)
        [ -n "$keeper" ] && worker=$(pgrep -P "$keeper") || exit 0
        kill -STOP $worker; echo slowed; sleep 0.3; kill -CONT $worker; sleep 0.001
    done
"#;

#[test]
fn a_container_is_not_moved_on_before_its_memory_is_in_its_place() -> Result<()> {
    for way in ["--mode stop", "--rounds 1"] {
        let scene = Scene::start()?;
        let b = scene.host("b");
        let before = filled_redis(&scene, 300_000, 500)?;
        let ip = format!("--ip {FLOATING}/24");
        let job = stop_at(&scene, "redis", Phase::Release.name(), ("a", "b"), &ip)?;
        let mut slow = b.spawn(SLOW_WORKER)?;
        slow.wait_for("slowed", Duration::from_secs(20))?;
        go_on(scene.host("a"))?;
        job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
        // It may wait, or refuse; it may not lose anything.
        let back = scene.try_migrate("redis", "b", "a", &format!("{ip} {way}"))?;
        slow.wait(Duration::from_secs(20))?;
        let at = scene.host(if back.status.success() { "a" } else { "b" });
        let after = digest(at).with_context(|| format!("{way}: {back}"))?;
        ensure!(after == before, "{way}: the digest is another after {back}");
    }
    Ok(())
}

/// Kills the process that fills memory on a host, again and again, until told to stop.
const KILL_WORKERS: &str = r#"
    rm -f /tmp/enough; killed=0
    while [ ! -e /tmp/enough ] && [ $killed -lt 12 ]; do
        for keeper in $(sed -n 's/.*"keeper":\([0-9]*\).*/\1/p' /run/ferry/pages/*/meta.json 2>/dev/null); do
            for worker in $(pgrep -P "$keeper"); do
                kill -9 "$worker" && killed=$((killed + 1)) && echo killed
            done
        done
    done
    echo enough
"#;

fn kills_while_filling(keys: u32) -> Result<()> {
    let scene = Scene::start()?;
    let b = scene.host("b");
    let before = filled_redis(&scene, keys, 500)?;
    let ip = format!("--ip {FLOATING}/24");
    let job = stop_at(&scene, "redis", Phase::Release.name(), ("a", "b"), &ip)?;
    let mut killer = b.spawn(KILL_WORKERS)?;
    killer.wait_for("killed", Duration::from_secs(20))?;
    go_on(scene.host("a"))?;
    job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
    ensure!(digest(b)? == before, "the digest is another");
    b.run("touch /tmp/enough")?;
    let killed = killer.wait(Duration::from_secs(20))?;
    ensure!(killed.stdout.matches("killed").count() > 1, "{killed}");
    wait_for_fill(b)?;
    ensure!(digest(b)? == before, "the digest is another");
    Ok(())
}

#[test]
fn a_page_daemon_killed_while_it_fills_loses_nothing() -> Result<()> {
    kills_while_filling(200_000)
}

#[test]
#[ignore = "400 MB"]
fn a_page_daemon_killed_while_it_fills_400_mb_loses_nothing() -> Result<()> {
    kills_while_filling(600_000)
}

#[test]
fn a_page_daemon_killed_under_every_kind_of_memory_loses_nothing() -> Result<()> {
    let scene = Scene::start()?;
    let mut memory = scene.start_memory("a", "check --processes 3 --megabytes 32", "")?;
    let ip = format!("--ip {FLOATING}/24");
    memory.keep_guards(true)?;
    let job = stop_at(&scene, "mem", Phase::Release.name(), ("a", "b"), &ip)?;
    let mut killer = scene.host("b").spawn(KILL_WORKERS)?;
    killer.wait_for("killed", Duration::from_secs(20))?;
    go_on(scene.host("a"))?;
    job.wait(Duration::from_secs(60))?.checked("ferry migrate")?;
    memory.check()?;
    scene.host("b").run("touch /tmp/enough")?;
    wait_for_fill(scene.host("b"))?;
    memory.check()?;
    memory.goes_on()
}
