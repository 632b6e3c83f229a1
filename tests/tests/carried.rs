//! Memory that CRIU carries in the pause: named in the plan, with what it costs.

use anyhow::{Context, Result, ensure};
use ferry_tests::Scene;
use ferry_tests::memory::wait_for_fill;
use ferry_tests::scene::{FLOATING, RUNTIME};
use serde_json::Value;

fn plan(scene: &Scene, id: &str, more: &str) -> Result<(String, Value)> {
    let text = scene.try_migrate(id, "a", "b", &format!("{more} --dry-run"))?;
    let json = scene.try_migrate(id, "a", "b", &format!("{more} --dry-run --json"))?;
    let json = json.checked("dry run")?.stdout;
    Ok((text.checked("dry run")?.stdout, serde_json::from_str(&json)?))
}

#[test]
fn memory_that_criu_carries_is_named_with_its_size_and_its_cost() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    let ip = format!("--ip {FLOATING}/24");
    for (kind, name) in [("locked", "mlocked"), ("shared", "shared"), ("file", "file-private")] {
        let mode = format!("hold --megabytes 24 --kind {kind}");
        let memory = scene.start_memory("a", &mode, "--privileged")?;
        let (text, json) = plan(&scene, "mem", &ip)?;
        // What the program itself has changed of its file comes on top.
        let named = text.lines().find_map(|l| l.strip_prefix("  carried by CRIU in the pause: 2"));
        ensure!(named.is_some_and(|l| l.contains(&format!(" MiB {name} (about "))), "{text}");
        let parts = json["carried"].as_array().context("nothing is carried")?;
        let part = parts.iter().find(|part| part["kind"] == name).context(kind)?;
        ensure!(part["bytes"].as_u64() >= Some(24 << 20), "{part}");
        ensure!(part["ms"].as_f64() > Some(1.0), "{part}");
        drop(memory);
        end(&scene, "mem")?;
    }
    let memory = scene.start_memory("a", "hold --megabytes 24", "")?;
    let (text, json) = plan(&scene, "mem", &ip)?;
    ensure!(!text.contains("carried by CRIU"), "{text}");
    ensure!(json["carried"].as_array().is_some_and(Vec::is_empty), "{json}");
    let (text, _) = plan(&scene, "mem", &format!("{ip} --mode stop"))?;
    ensure!(text.contains("carried by CRIU in the pause: 25 MiB private"), "{text}");
    drop(memory);
    end(&scene, "mem")?;

    start_with_tmpfs(&scene, 24)?;
    let (text, _) = plan(&scene, "box", "")?;
    ensure!(text.contains("24 MiB tmpfs (about "), "{text}");
    a.run("ctr task kill -s 9 box").map(drop)
}

fn end(scene: &Scene, id: &str) -> Result<()> {
    let script = format!(
        "ctr task kill -s 9 {id}; while ctr task ls | grep -q '^{id} .*RUNNING'; do sleep 0.05; \
         done; ctr task rm {id} >/dev/null 2>&1; ctr container rm {id}"
    );
    ["a", "b"].iter().try_for_each(|host| scene.host(host).output(&script).map(drop))
}

/// A container `box` with a file of so many MB in a tmpfs of its own.
fn start_with_tmpfs(scene: &Scene, megabytes: u64) -> Result<()> {
    let a = scene.host("a");
    a.run(&format!(
        "ctr run -d --null-io --runtime {RUNTIME} docker.io/library/busybox:latest box \
         sh -c 'dd if=/dev/urandom of=/dev/shm/x bs=1M count={megabytes}; touch /tmp/full; \
         while :; do sleep 1; done'"
    ))?;
    let full = "pid=$(ctr task ls | awk '/^box/ {print $2}'); test -e /proc/$pid/root/tmp/full";
    a.wait_until("its tmpfs is full", |h| h.output(full).is_ok_and(|o| o.status.success()))
}

/// The least that the two shims needed to dump and to restore, ms: what else runs on the machine does
/// not count.
fn times(scene: &Scene, id: &str, more: &str) -> Result<[f64; 2]> {
    let mut all = [Vec::new(), Vec::new()];
    for (from, to) in [("a", "b"), ("b", "a")].into_iter().cycle().take(8) {
        let output = scene.try_migrate(id, from, to, &format!("{more} --json"))?;
        let output = output.checked("ferry migrate")?;
        let report: Value = serde_json::from_str(&output.stdout)?;
        for (n, what) in ["shim_dump_us", "shim_restore_us"].into_iter().enumerate() {
            all[n].push(report["happened"][what].as_f64().context(what)? / 1000.0);
        }
        wait_for_fill(scene.host(to))?;
    }
    Ok(all.map(|times| times.into_iter().fold(f64::MAX, f64::min)))
}

/// What a MB of each kind adds to dump and restore. Prints it.
#[test]
#[ignore = "a measurement"]
fn measure_what_criu_carries() -> Result<()> {
    let scene = Scene::start()?;
    let ip = format!("--ip {FLOATING}/24");
    let told = |name: &str, small: [f64; 2], large: [f64; 2], megabytes: f64| {
        let per = |n: usize| (large[n] - small[n]) / megabytes;
        println!("{name}: dump {:.2}, restore {:.2} ms/MB  ({small:?} {large:?})", per(0), per(1));
    };
    let kinds = [
        ("dense", "--mode stop"),
        ("locked", ""),
        ("file", ""),
        ("shared", ""),
        ("memoryfile", ""),
    ];
    for (kind, more) in kinds {
        let mut found = Vec::new();
        for megabytes in [16, 144] {
            let mode = format!("hold --megabytes {megabytes} --kind {kind}");
            let memory = scene.start_memory("a", &mode, "--privileged")?;
            found.push(times(&scene, "mem", &format!("{ip} {more}"))?);
            drop(memory);
            end(&scene, "mem")?;
        }
        told(kind, found[0], found[1], 128.0);
    }
    // Beyond 8 MB the real tar packs it.
    for (name, small, large) in [("tmpfs", 1, 7), ("large tmpfs", 9, 57)] {
        let mut found = Vec::new();
        for megabytes in [small, large] {
            start_with_tmpfs(&scene, megabytes)?;
            found.push(times(&scene, "box", "")?);
            end(&scene, "box")?;
        }
        told(name, found[0], found[1], (large - small) as f64);
    }
    Ok(())
}
