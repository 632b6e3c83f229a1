//! Checkpoints as files: `ferry checkpoint --export`, podman and checkpointctl, and `ferry restore FILE`.

use anyhow::{Context, Result, ensure};
use ferry_tests::counter::Counter;
use ferry_tests::ctr::{BUSYBOX, until, wait_for_status};
use ferry_tests::layers::{CHECKPOINTCTL, PODMAN};
use ferry_tests::podman::{load, podman};
use ferry_tests::scene::{FLOATING, RUNTIME, traces, wait_for_traces};
use ferry_tests::tally::{COUNTS_ALONE, counted, counted_by, counts_on, end, refused};
use ferry_tests::versions::ensure_layers;
use ferry_tests::{Host, Scene};
use nix::sys::signal::Signal;
use serde_json::Value;

/// What the containers here do before they count: files of the image go, others come, and some are in memory.
const CHANGES: &str =
    "rm /etc/group; mkdir /data; echo kept >/data/file; echo shared >/dev/shm/file";

fn scene() -> Result<Scene> {
    Scene::start_over(&ensure_layers(&[&PODMAN, &CHECKPOINTCTL])?)
}

/// Starts a container of containerd's that counts.
fn start(host: &Host, id: &str) -> Result<()> {
    host.run(&format!(
        "ctr run -d --null-io --runtime {RUNTIME} {BUSYBOX} {id} sh -c '{CHANGES}; {COUNTS_ALONE}'"
    ))?;
    until("it counts", || Ok(counted(host, id).is_ok_and(|lines| lines > 0)))
}

/// Starts a container of podman's that counts.
fn start_podman(host: &Host, id: &str, options: &str) -> Result<()> {
    load(host, BUSYBOX)?;
    podman(
        host,
        &format!(
            "run -d --name {id} {options} {BUSYBOX} sh -c '{CHANGES}; echo out; {COUNTS_ALONE}'"
        ),
    )?;
    until("it counts", || Ok(counted_podman(host, id).is_ok_and(|lines| lines > 0)))
}

/// Lines that a container of podman's has counted.
fn counted_podman(host: &Host, id: &str) -> Result<usize> {
    let pid = podman(host, &format!("inspect -f '{{{{.State.Pid}}}}' {id}"))?.stdout;
    counted_by(host, &pid)
}

fn podman_counts_on(host: &Host, id: &str) -> Result<()> {
    let before = counted_podman(host, id)?;
    until(&format!("{id} counts on"), || Ok(counted_podman(host, id)? > before))
}

/// Fails unless the files below `root` are as [`CHANGES`] left them.
fn has_changes(host: &Host, root: &str) -> Result<()> {
    let found = host.run(&format!(
        "cat {root}/data/file {root}/dev/shm/file; ls -d {root}/etc/group {root}/etc/passwd 2>&1 || true"
    ))?;
    ensure!(found.stdout.starts_with("kept\nshared\n"), "{found}");
    let gone = "group': No such file";
    ensure!(found.stdout.contains(gone) && found.stdout.contains("/etc/passwd\n"), "{found}");
    Ok(())
}

/// Root of a container's task, as its host sees it.
fn root(host: &Host, id: &str) -> Result<String> {
    let pid = host.run(&format!("ctr task ls | awk '$1 == \"{id}\" {{print $2}}'"))?.stdout;
    Ok(format!("/proc/{}/root", pid.trim()))
}

/// Copies `file` to the same place on `to`.
fn copy(from: &Host, to: &Host, file: &str) -> Result<()> {
    let address = to.address();
    from.run(&format!("ssh root@{address} 'cat >{file}' <{file}")).map(drop)
}

#[test]
fn an_archive_is_told_by_checkpointctl_and_by_ferry_and_is_all_that_is_made() -> Result<()> {
    let scene = scene()?;
    let host = scene.host("a");
    start(host, "counter")?;
    let before = traces(host)?;
    host.run("echo old >/var/tmp/zstd; chmod 666 /var/tmp/zstd")?;
    for compress in ["zstd", "gzip", "none"] {
        let file = format!("/var/tmp/{compress}");
        let made = format!("ferry checkpoint counter --export {file} --compress {compress}");
        let made = host.run(&made)?;
        ensure!(made.stdout == format!("{file}\n"), "{made}");
        counts_on(host, "counter")?;
        wait_for_traces(host, &before, "after an export")?;
        let mode = host.run(&format!("stat -c '%a %s' {file}; ls -A /var/tmp"))?.stdout;
        ensure!(mode.starts_with("600 ") && !mode.contains(".ferry"), "{mode}");

        let shown = host.run(&format!("checkpointctl show {file}"))?.stdout;
        let row = shown.lines().find(|line| line.starts_with("counter ")).context("no row")?;
        ensure!(row.contains(BUSYBOX) && row.contains("containerd"), "{shown}");
        ensure!(shown.contains("ROOT FS DIFF SIZE"), "{shown}");
        let tree = host.run(&format!("checkpointctl inspect --all {file}"))?.stdout;
        for part in ["Memory pages size", "Frozen time", "Process tree", "Destination: /dev/shm"] {
            ensure!(tree.contains(part), "no {part}: {tree}");
        }

        let report = host.run(&format!("ferry inspect {file} --json"))?.stdout;
        let report: Value = serde_json::from_str(&report)?;
        assert_eq!((&report["kind"], &report["container"]), (&"archive".into(), &"counter".into()));
        assert_eq!((&report["image"], &report["exit"]), (&BUSYBOX.into(), &false.into()));
        ensure!(report["options"]["file_locks"] == true, "{report}");
        ensure!(report["contents"]["processes"][0]["command"][0] == "sh", "{report}");
    }
    // Both, and the container ends.
    let both = host.run("ferry checkpoint counter snap --export /var/tmp/both --exit --json")?;
    let both: Value = serde_json::from_str(&both.stdout)?;
    ensure!(both["name"] == "snap" && both["file"] == "/var/tmp/both", "{both}");
    ensure!(both["file_bytes"].as_u64() > Some(1000), "{both}");
    host.run("checkpointctl inspect --all /var/tmp/both")?;
    for checkpoint in ["snap", "/var/tmp/both"] {
        wait_for_status(host, "counter", "STOPPED")?;
        host.run(&format!("ferry restore {checkpoint}"))?;
        counts_on(host, "counter").with_context(|| checkpoint.to_owned())?;
        host.run("ctr task kill -s KILL counter")?;
    }
    host.run("ferry discard snap").map(drop)
}

#[test]
fn a_container_goes_on_in_podman_and_comes_back() -> Result<()> {
    let scene = scene()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    load(b, BUSYBOX)?;
    for compress in ["zstd", "none"] {
        start(a, "counter")?;
        a.run(&format!("ferry checkpoint counter -e /var/tmp/there --compress {compress} --exit"))?;
        wait_for_status(a, "counter", "STOPPED")?;
        let left = counted_in_layer(a)?;
        a.run("ctr task rm counter; ctr container rm counter")?;
        copy(a, b, "/var/tmp/there")?;
        podman(b, "container restore --import /var/tmp/there")?;
        podman_counts_on(b, "counter")?;
        ensure!(counted_podman(b, "counter")? > left, "it began anew");
        let pid = podman(b, "inspect -f '{{.State.Pid}}' counter")?.stdout;
        has_changes(b, &format!("/proc/{}/root", pid.trim()))?;

        // And back, from podman's own archive.
        podman(b, &format!("container checkpoint --compress {compress} -e /var/tmp/back counter"))?;
        podman(b, "rm -f counter")?;
        copy(b, a, "/var/tmp/back")?;
        a.run("ferry restore /var/tmp/back")?;
        counts_on(a, "counter")?;
        ensure!(counted(a, "counter")? > left, "it began anew");
        has_changes(a, &root(a, "counter")?)?;
        end(a, "counter")?;
    }
    // Started anew it is as containerd had it.
    podman(b, "container restore --import /var/tmp/there")?;
    podman(b, "restart --time 0 counter")?;
    let mounts = podman(b, "exec counter cat /proc/mounts")?.stdout;
    ensure!(mounts.lines().any(|line| line.starts_with("shm /dev/shm tmpfs")), "{mounts}");
    Ok(())
}

/// Lines that the one stopped container had counted, looked up in its layer.
fn counted_in_layer(host: &Host) -> Result<usize> {
    let found = host.run(
        "cat $(ctr snapshot mounts /x counter | grep -o 'upperdir=[^,]*' | cut -d= -f2)/log | wc -l",
    )?;
    found.stdout.trim().parse().with_context(|| format!("{found}"))
}

#[test]
fn a_container_of_podman_becomes_one_like_any_other() -> Result<()> {
    let scene = scene()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    start_podman(a, "box", "--network none --hostname name")?;
    podman(a, "container checkpoint --export /var/tmp/box box")?;
    podman(a, "rm -f box")?;
    let before = traces(a)?;
    let shown = a.run("ferry inspect /var/tmp/box")?.stdout;
    ensure!(shown.contains("container:   box") && shown.contains(BUSYBOX), "{shown}");
    a.run("ferry restore /var/tmp/box")?;
    counts_on(a, "box")?;
    has_changes(a, &root(a, "box")?)?;
    let files = a.run(&format!(
        "cd {}; cat etc/hosts etc/hostname; stat -c %F run/.containerenv",
        root(a, "box")?
    ))?;
    ensure!(files.stdout.contains("127.0.0.1 name\nname\nregular empty file"), "{files}");
    // Its output goes where that of a moved container goes.
    ensure!(a.run("ls /var/log/ferry/default/box")?.stdout.contains("stdout.log"), "no log");

    // It has nothing of podman's that would keep it here.
    a.run("ferry checkpoint box snap")?;
    counts_on(a, "box").context("after a checkpoint")?;
    a.run("ferry discard snap")?;
    let moved = scene.try_migrate("box", "a", "b", "")?;
    ensure!(moved.status.success(), "{moved}");
    counts_on(b, "box").context("after a move")?;
    has_changes(b, &root(b, "box")?)?;
    end(b, "box")?;
    wait_for_traces(a, &before, "when it has left")?;

    // A second one of the same archive, where the host's network is allowed to it.
    start_podman(a, "open", "--network host")?;
    podman(a, "container checkpoint --export /var/tmp/open open")?;
    let refusal = refused(a, "ferry restore /var/tmp/open")?;
    ensure!(refusal.contains("--allow namespaces"), "{refusal}");
    a.run("ferry restore /var/tmp/open --allow namespaces --id one")?;
    a.run("ferry restore /var/tmp/open --allow namespaces --id two")?;
    counts_on(a, "one")?;
    counts_on(a, "two")?;
    has_changes(a, &root(a, "two")?)?;
    end(a, "one")?;
    end(a, "two")
}

#[test]
fn what_is_refused_changes_nothing() -> Result<()> {
    let scene = scene()?;
    let host = scene.host("a");
    start(host, "counter")?;
    start_podman(host, "volume", "--network none -v data:/kept")?;
    start_podman(host, "bound", "--network none -v /opt:/kept")?;
    start_podman(host, "bridged", "")?;
    for id in ["volume", "bound", "bridged"] {
        podman(host, &format!("container checkpoint --compress none --export /var/tmp/{id} {id}"))?;
        podman(host, &format!("rm -f {id}"))?;
    }
    host.run(
        "set -e; cd /var/tmp; ferry checkpoint counter --compress none --export good; mkdir folder x; \
         seq 1000 >text; head -c 30000 good >cut; tar xf good -C x; ln -s good link; \
         tar cf nothing -C x checkpoint; \
         cp -r x y; sed -i s/busybox:latest/absent:1/ y/config.dump; tar cf found -C y .; \
         sed -i '/rootfsImageID/s/[0-9a-f]*.,$/00\",/' y/config.dump; tar cf absent -C y .; \
         sed -i s/absent:1/busybox:latest/ y/config.dump; tar cf other -C y .; \
         cp -r x z; ln -s /etc/shadow z/checkpoint/evil.img; tar cf links -C z .; \
         tar cf up -P -C x . ../text; \
         sed -i 's/CAP_CHOWN/CAP_SYS_ADMIN/' x/spec.dump; tar cf strong -C x .",
    )?;
    let before = traces(host)?;
    for (command, part) in [
        ("ferry restore /var/tmp/absent.tar", "No such file"),
        ("ferry restore /var/tmp/text", "no tar archive"),
        ("ferry restore /var/tmp/cut --id new", "ends early"),
        ("ferry restore /var/tmp/nothing", "config.dump is missing"),
        ("ferry restore /var/tmp/good", "has a task already"),
        (
            "ferry restore /var/tmp/absent --id new",
            "ctr -n default images pull docker.io/library/absent:1",
        ),
        ("ferry restore /var/tmp/other --id new", "not the one that the container is based on"),
        ("ferry restore /var/tmp/links --id new", "is a link"),
        ("ferry restore /var/tmp/up --id new", "leads out"),
        ("ferry restore /var/tmp/strong --id new", "--allow capabilities"),
        ("ferry restore /var/tmp/volume", "has volumes of podman's"),
        ("ferry restore /var/tmp/bound", "--allow mounts"),
        ("ferry restore /var/tmp/bridged", "--allow namespaces"),
        ("ferry restore /var/tmp/bridged --allow namespaces", "is not here: make it"),
        ("ferry checkpoint counter --export /var/tmp/folder", "is there and no file"),
        ("ferry checkpoint counter --export /var/tmp/link", "is there and no file"),
        ("ferry checkpoint counter --export /nowhere/file", "No such file"),
        ("ferry checkpoint counter --export /proc/file", "write into /proc"),
        ("ferry checkpoint counter --compress gzip", "--export"),
        ("ferry checkpoint nothing --export /var/tmp/new", "there is no container nothing"),
    ] {
        let refusal = refused(host, command)?;
        ensure!(refusal.contains(part), "{command}: {refusal}");
        wait_for_traces(host, &before, command)?;
    }
    ensure!(!host.run("ls -A /var/tmp")?.stdout.contains("new"), "a refused export left a file");
    counts_on(host, "counter")?;
    // The image is known by what it is, whatever it is called.
    host.run("ferry restore /var/tmp/found --id new")?;
    counts_on(host, "new")?;
    end(host, "new")
}

#[test]
fn an_export_that_is_killed_leaves_the_old_file_and_the_container() -> Result<()> {
    let scene = scene()?;
    let host = scene.host("a");
    scene.start_redis("a", 0)?;
    host.run("redis-cli debug populate 400000 key 1000; echo old >/var/tmp/file")?;
    let mut client = Counter::start_at(scene.lab.client(), FLOATING, 6379, "INCR counter")?;
    let before = traces(host)?;
    let killed = host.spawn("exec ferry checkpoint redis --export /var/tmp/file --exit -c none")?;
    host.wait_until("it writes", |host| {
        host.output("find /var/tmp -name '.ferry-export-*' -size +2M")
            .is_ok_and(|o| !o.stdout.is_empty())
    })?;
    killed.signal(Signal::SIGKILL);
    drop(killed);
    client.goes_on().context("after an export that was killed")?;
    ensure!(host.run("cat /var/tmp/file")?.stdout == "old\n", "the old file is gone");
    // The next one clears up, and ends it.
    host.run("ferry checkpoint redis --export /var/tmp/file --exit")?;
    let left = host.run("ls -A /var/tmp")?.stdout;
    ensure!(!left.contains(".ferry"), "left: {left}");
    wait_for_status(host, "redis", "STOPPED")?;
    host.run("ferry restore /var/tmp/file")?;
    client.goes_on().context("after a restore")?;
    client.stop()?;
    // The container has another snapshot now.
    let same = |lines: &[String]| -> Vec<String> {
        lines.iter().filter(|line| !line.starts_with("snapshot redis")).cloned().collect()
    };
    // What ends with it takes a moment.
    let gone = host.wait_until("all else is as before", |host| {
        traces(host).is_ok_and(|now| same(&now) == same(&before))
    });
    let now = traces(host)?;
    gone.with_context(|| format!("{before:#?} became {now:#?}"))
}
