//! Checkpoints as images: `ferry checkpoint`, `push`, `restore` and `discard`, and what containerd's own
//! client makes of them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::counter::Counter;
use ferry_tests::ctr::{REFERENCE, until, wait_for_status};
use ferry_tests::scene::{FLOATING, RUNTIME, traces, wait_for_traces};
use ferry_tests::tally::{COUNTS, COUNTS_ALONE, counted, counts_on, end, json, refused};
use ferry_tests::{Host, Scene};
use nix::sys::signal::Signal;

const BUSYBOX: &str = "docker.io/library/busybox:latest";

/// Starts the container that counts.
fn start_counter(host: &Host) -> Result<()> {
    host.run(&format!(
        "ctr run -d --null-io --runtime {RUNTIME} {BUSYBOX} counter sh -c '{COUNTS}'"
    ))?;
    counts_on(host, "counter")
}

/// Bytes of blobs that have come to `host` in part.
fn incoming(host: &Host) -> Result<u64> {
    let folder = "/var/lib/containerd/io.containerd.content.v1.content/ingest";
    let sizes = host.output(&format!("stat -c %s {folder}/*/data"))?.stdout;
    Ok(sizes.lines().filter_map(|size| size.parse::<u64>().ok()).sum())
}

#[test]
fn clients_stay_connected_while_a_redis_of_400_mb_is_an_image_here_and_on_the_way_there()
-> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let empty = traces(b)?;
    scene.start_redis("a", 0)?;
    a.run("redis-cli debug populate 400000 key 1000")?;
    let mut client = Counter::start_at(scene.lab.client(), FLOATING, 6379, "INCR counter")?;

    // A command that is killed in the middle gives it back, and the next one clears up after it.
    let running = traces(a)?;
    let killed = a.spawn("exec ferry checkpoint redis killed --exit")?;
    let frozen = "cat /sys/fs/cgroup/freezer/default/redis/freezer.state";
    a.wait_until("it is frozen", |a| a.output(frozen).is_ok_and(|o| o.stdout.contains("FROZEN")))?;
    killed.signal(Signal::SIGKILL);
    drop(killed);
    client.goes_on().context("after a checkpoint that was killed")?;
    let kept = json(a, "ferry checkpoint redis kept --json")?;
    ensure!(kept["statistics"]["memory_bytes"].as_u64() > Some(400 << 20), "{kept}");
    ensure!(kept["statistics"]["frozen_us"].as_u64() > Some(0), "{kept}");
    client.goes_on().context("after a checkpoint")?;
    a.run("ferry discard kept")?;
    wait_for_traces(a, &running, "after a checkpoint was discarded")?;

    // On the same host.
    a.run("ferry checkpoint redis here --exit")?;
    wait_for_status(a, "redis", "STOPPED")?;
    ensure!(a.run("nft list tables")?.stdout.contains("ferry_checkpoint_"), "nothing is locked");
    a.run("ferry restore here")?;
    client.goes_on().context("after a restore")?;
    ensure!(a.run("nft list tables")?.stdout.is_empty(), "something is locked");
    a.run("ferry discard here")?;

    // To the other.
    a.run("ferry checkpoint redis there --exit")?;
    let push = format!("ferry push there --to ssh://root@{} --json", b.address());
    // One that is killed in the middle is gone on with where it broke off.
    let broken = a.spawn(&format!("exec {push}"))?;
    let mut come = 0;
    b.wait_until("a part of it has come", |b| {
        come = incoming(b).unwrap_or_default();
        come > 32 << 20
    })?;
    broken.signal(Signal::SIGKILL);
    drop(broken);
    let pushed = json(a, &push)?;
    let (sent, bytes) = (pushed["sent"].as_u64(), pushed["bytes"].as_u64());
    let (sent, bytes) = (sent.context("no size")?, bytes.context("no size")?);
    ensure!(bytes > 400 << 20 && sent > 0 && sent <= bytes - come, "{come} had come: {pushed}");
    ensure!(json(a, &push)?["sent"] == 0, "it was sent again");
    let refusal = refused(b, "ferry restore there --allow namespaces")?;
    ensure!(refusal.contains(&format!("--ip {FLOATING}/PREFIX")), "{refusal}");
    let refusal = refused(b, &format!("ferry restore there --ip {FLOATING}/24"))?;
    ensure!(refusal.contains("--allow namespaces"), "{refusal}");
    a.run(&format!("ip addr del {FLOATING}/24 dev eth0"))?;
    b.run(&format!("ferry restore there --ip {FLOATING}/24 --allow namespaces"))?;
    client.goes_on().context("after a restore on the other host")?;
    ensure!(b.run("redis-cli dbsize")?.stdout.trim() == "400001", "keys are missing");
    client.stop()?;
    // The lock has done its work: what is left of the container here goes with the checkpoint.
    a.run("ctr task rm redis; ctr container rm redis; ferry discard there")?;
    ensure!(a.run("nft list tables")?.stdout.is_empty(), "the lock is still there");
    end(b, "redis")?;
    b.run(&format!(
        "ferry discard there; ctr image rm --sync docker.io/library/redis:latest@* 2>/dev/null; \
         ip addr del {FLOATING}/24 dev eth0"
    ))?;
    wait_for_traces(b, &empty, "after all of it").context("on the destination")
}

#[test]
fn files_and_memory_of_a_checkpoint_are_of_one_moment_for_us_and_for_containerd_s_client()
-> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    for snapshotter in ["overlayfs", "native"] {
        host.run(&format!(
            "ctr image unpack --snapshotter {snapshotter} {BUSYBOX} >/dev/null; \
             ctr run -d --null-io --runtime {RUNTIME} --snapshotter {snapshotter} {BUSYBOX} counter sh -c '{COUNTS}'"
        ))?;
        counts_on(host, "counter")?;
        host.run("ferry checkpoint counter moment")?;
        counts_on(host, "counter").context("it runs on")?;
        end(host, "counter")?;
        // Not there any more: made anew from the image.
        host.run("ferry restore moment")?;
        counts_on(host, "counter")?;
        host.run("ferry restore moment --id twin")?;
        counts_on(host, "twin").context("a second one beside it")?;
        end(host, "twin")?;
        // There, and ended: restored into its own record, with the files of the checkpoint.
        let later = counted(host, "counter")?;
        host.run("ctr task kill -s KILL counter")?;
        wait_for_status(host, "counter", "STOPPED")?;
        host.run("ferry restore moment")?;
        ensure!(counted(host, "counter")? < later, "its files are not those of the checkpoint");
        counts_on(host, "counter")?;
        end(host, "counter")?;
        host.run("timeout 30 ctr container restore --rw --live theirs moment </dev/null")?;
        counts_on(host, "theirs").context("restored by ctr")?;
        host.run("ctr container checkpoint --image --rw --task theirs by-ctr")?;
        end(host, "theirs")?;
        let refusal = refused(host, "ferry restore by-ctr")?;
        ensure!(refusal.contains("give --id"), "{refusal}");
        host.run("ferry restore by-ctr --id counter")?;
        counts_on(host, "counter").context("a checkpoint of ctr")?;
        end(host, "counter")?;
        host.run("ferry discard moment; ferry discard by-ctr")?;
    }
    Ok(())
}

#[test]
fn checkpoints_that_ferry_has_not_made_are_restored() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    // So far that one which began anew would be seen.
    let counts_far = |id: &str| until("it has counted far", || Ok(counted(host, id)? > 300));
    let goes_on = |id: &str| -> Result<()> {
        ensure!(counted(host, id)? > 300, "{id} has begun anew");
        counts_on(host, id)
    };

    // By containerd's own client and its own shim, which knows nothing of programs in a vfork.
    host.run(&format!(
        "ctr run -d --null-io --runtime {REFERENCE} {BUSYBOX} theirs sh -c '{COUNTS_ALONE}'"
    ))?;
    counts_far("theirs")?;
    host.run("ctr container checkpoint --image --rw --task theirs by-others")?;
    end(host, "theirs")?;
    let inside = json(host, "ferry inspect by-others --json")?;
    ensure!(inside["versions"]["record"].is_null(), "{inside}");
    let refusal = refused(host, "ferry restore by-others")?;
    ensure!(refusal.contains("give --id"), "{refusal}");
    host.run("ferry restore by-others --id ours")?;
    goes_on("ours").context("from containerd's own shim")?;
    let info = host.run("ctr container info ours")?.stdout;
    ensure!(info.contains(RUNTIME), "{info}");
    end(host, "ours")?;

    // By ctr of a task alone.
    host.run(&format!(
        "ctr run -d --null-io --runtime {RUNTIME} {BUSYBOX} counter sh -c '{COUNTS_ALONE}'"
    ))?;
    counts_far("counter")?;
    let name = host.run("ctr task checkpoint counter")?.stdout;
    let name = name.trim();
    counts_on(host, "counter").context("it runs on")?;
    host.run(&format!("ferry restore {name} --id elsewhere"))?;
    goes_on("elsewhere").context("from ctr task checkpoint, beside the first one")?;
    end(host, "elsewhere")?;
    host.run("ctr task kill -s KILL counter")?;
    wait_for_status(host, "counter", "STOPPED")?;
    host.run(&format!("ferry restore {name} --id counter"))?;
    goes_on("counter").context("from ctr task checkpoint")?;
    end(host, "counter")?;
    host.run(&format!("ferry discard by-others; ferry discard {name}")).map(drop)
}

#[test]
fn what_is_refused_or_fails_changes_nothing() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    let run = format!("ctr run -d --null-io --runtime {RUNTIME}");
    host.run(&format!(
        "mkdir -p /srv/data; {run} {BUSYBOX} counter sh -c '{COUNTS}'; \
         {run} --mount type=bind,src=/srv/data,dst=/data,options=rbind:ro {BUSYBOX} bound sh -c '{COUNTS}'; \
         {run} {BUSYBOX} stopped true; {run} {BUSYBOX} paused sleep 1000; ctr task pause paused; \
         ctr run -d --null-io --runtime io.containerd.runc.v2 {BUSYBOX} other sleep 1000; \
         ferry checkpoint counter taken"
    ))?;
    wait_for_status(host, "stopped", "STOPPED")?;
    let before = traces(host)?;
    for (command, part) in [
        ("ferry checkpoint nobody", "there is no container nobody"),
        ("ferry checkpoint counter taken", "give another name"),
        ("ferry checkpoint paused", "resume it"),
        ("ferry checkpoint stopped", "start it"),
        ("ferry checkpoint other", "--runtime io.containerd.ferry.v2"),
        ("ferry restore nothing", "there is no checkpoint nothing"),
        ("ferry restore docker.io/library/busybox:latest", "is no checkpoint"),
        ("ferry restore taken", "has a task already"),
        ("ferry restore taken --id ../x", "no id of a container"),
        ("ferry restore taken --id new --ip 192.0.2.1/24", "no interface"),
        ("ferry discard nothing", "there is no checkpoint nothing"),
        ("ferry discard docker.io/library/busybox:latest", "is no checkpoint"),
        ("ferry discard 0123456789abcdef", "there is no lock"),
        ("ferry push nothing --to ssh://root@10.77.0.2", "there is no image nothing"),
        ("ferry push taken --to ssh://root@10.77.0.99", "10.77.0.99"),
    ] {
        let refusal = refused(host, command)?;
        ensure!(refusal.contains(part), "{command}: {refusal}");
        wait_for_traces(host, &before, command)?;
    }
    counts_on(host, "counter")?;

    // An image may not name what is the host's; a record that is here may.
    host.run("ferry checkpoint bound named --exit")?;
    wait_for_status(host, "bound", "STOPPED")?;
    let refusal = refused(host, "ferry restore named --id elsewhere")?;
    ensure!(refusal.contains("/srv/data") && refusal.contains("--allow mounts"), "{refusal}");
    host.run("ferry restore named --id elsewhere --allow mounts")?;
    counts_on(host, "elsewhere")?;
    host.run("ferry restore named")?;
    counts_on(host, "bound")?;

    // Nor may its processes have what their container has not.
    host.run(&format!(
        "{run} --cap-add CAP_NET_ADMIN {BUSYBOX} strong sh -c '{COUNTS}'; \
         ferry checkpoint strong power --exit; ctr task kill -s KILL counter"
    ))?;
    wait_for_status(host, "counter", "STOPPED")?;
    for id in ["counter", "unknown"] {
        let refusal = refused(host, &format!("ferry restore power --id {id}"))?;
        ensure!(
            refusal.contains("CAP_NET_ADMIN") && refusal.contains("--allow capabilities"),
            "{refusal}"
        );
    }
    // What has ended is there as before, task and all.
    wait_for_status(host, "counter", "STOPPED")?;
    host.run("ferry restore power")?;
    counts_on(host, "strong")
}

#[test]
fn a_dump_or_a_restore_that_fails_leaves_everything_as_it_was() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    start_counter(host)?;
    let before = traces(host)?;
    // A CRIU that cannot.
    let (broken, mended) = (
        "mv /usr/sbin/criu /usr/sbin/criu.real; printf '#!/bin/sh\\ncase \"$1\" in --version) exec /usr/sbin/criu.real --version;; esac\\nexit 1\\n' > /usr/sbin/criu; chmod +x /usr/sbin/criu",
        "mv -f /usr/sbin/criu.real /usr/sbin/criu",
    );
    host.run(broken)?;
    for exit in ["", "--exit"] {
        let refusal = refused(host, &format!("ferry checkpoint counter failed {exit}"))?;
        ensure!(refusal.contains("counter runs as before"), "{refusal}");
        counts_on(host, "counter")?;
        wait_for_traces(host, &before, "after a failed dump")?;
    }
    host.run(mended)?;
    host.run("ferry checkpoint counter good --exit")?;
    wait_for_status(host, "counter", "STOPPED")?;
    let before = traces(host)?;
    host.run(broken)?;
    let refusal = refused(host, "ferry restore good --id new")?;
    ensure!(refusal.contains("new was not restored"), "{refusal}");
    wait_for_traces(host, &before, "after a failed restore")?;
    refused(host, "ferry restore good")?;
    host.run(mended)?;
    // Its task was removed; the container and its files are there for another attempt.
    std::thread::sleep(Duration::from_millis(100));
    host.run("ferry restore good")?;
    counts_on(host, "counter")
}

#[test]
fn images_that_ask_for_more_than_the_container_has_are_refused_and_change_nothing() -> Result<()> {
    /// What is changed in CRIU's images, of the same length, and part of the refusal.
    const CHANGES: [(&str, &str, &str, &str); 5] = [
        // A mount where the container has none.
        ("/sys/firmware", "/sys/firmwarx", "at /sys/firmwarx", "mounts"),
        // One that can be written: the flags come before root and target.
        (
            r"\x28\x8f\x80\x80\x01\x32\x04/sys",
            r"\x28\x8e\x80\x80\x01\x32\x04/sys",
            "at /proc/sys",
            "mounts",
        ),
        // A bind of the host's root.
        (
            r"\x28\x8e\x80\x80\x01\x32\x01/\x3a\x05/proc",
            r"\x28\x8e\xa0\x80\x01\x32\x01/\x3a\x05/proc",
            "no mount's own",
            "mounts",
        ),
        // The host's processes: CRIU's own namespace is number 1.
        (r"\x28\x09\x30", r"\x28\x01\x30", "the host's pid namespace", "namespaces"),
        // The limits and devices of another container.
        (
            r"pids\x12\x10/default/counter",
            r"pids\x12\x10/default/another",
            "/default/another",
            "namespaces",
        ),
    ];
    let scene = Scene::start()?;
    let host = scene.host("a");
    start_counter(host)?;
    host.run("ferry checkpoint counter taken")?;
    end(host, "counter")?;
    host.run("ferry restore taken")?;
    counts_on(host, "counter").context("as it was dumped")?;
    end(host, "counter")?;
    let blobs = "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256";
    let find = format!(
        "for f in {blobs}/*; do tar -tf $f inventory.img >/dev/null 2>&1 && echo $f; done; true"
    );
    let images = host.run(&find)?.stdout.trim().to_owned();
    ensure!(images.lines().count() == 1, "CRIU's images: {images:?}");
    host.run(&format!("cp {images} /root/whole"))?;
    let before = traces(host)?;
    for (from, to, part, kind) in CHANGES {
        host.run(&format!("LC_ALL=C sed 's|{from}|{to}|g' /root/whole > {images}"))?;
        ensure!(
            !host.output(&format!("cmp -s /root/whole {images}"))?.status.success(),
            "{part}: nothing is changed"
        );
        let refusal = refused(host, "ferry restore taken")?;
        ensure!(refusal.contains(part), "{part}: {refusal}");
        ensure!(refusal.contains(&format!("--allow {kind}")), "{part}: {refusal}");
        wait_for_traces(host, &before, part)?;
    }
    host.run(&format!("cp /root/whole {images}; ferry restore taken"))?;
    counts_on(host, "counter")
}

#[test]
fn a_restore_that_is_killed_before_it_opens_the_address_leaves_that_to_the_shim() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    let empty = traces(host)?;
    scene.start_redis("a", 0)?;
    let mut client = Counter::start_at(scene.lab.client(), FLOATING, 6379, "INCR counter")?;
    client.goes_on()?;
    host.run(&format!(
        "ferry checkpoint redis kept --exit && ip addr del {FLOATING}/24 dev eth0; rm -f /tmp/fault"
    ))?;
    let killed = host.spawn(&format!(
        "FERRY_FAULT=restored:/tmp/fault exec ferry restore kept --ip {FLOATING}/24"
    ))?;
    host.wait_until("it has started the container", |host| {
        host.output("test -e /tmp/fault").is_ok_and(|output| output.status.success())
    })?;
    killed.signal(Signal::SIGKILL);
    drop(killed);
    let silent = || -> Result<bool> { Ok(host.run("nft list tables")?.stdout.contains("ferry-")) };
    ensure!(silent()?, "the address is open already");
    let start = std::time::Instant::now();
    until("the shim opens the address", || Ok(!silent()?))?;
    ensure!(start.elapsed() < Duration::from_secs(7), "only after {:?}", start.elapsed());
    client.goes_on().context("after a restore that was killed")?;
    client.stop()?;
    // The next command keeps it.
    host.run("ferry checkpoint redis again --exit; ferry discard again; ferry discard kept")?;
    wait_for_status(host, "redis", "STOPPED")?;
    host.run(&format!(
        "ctr task rm redis; ctr container rm redis; rm -f /tmp/fault; ip addr del {FLOATING}/24 dev eth0"
    ))?;
    wait_for_traces(host, &empty, "after all of it")
}

#[test]
fn a_container_with_a_stopped_process_is_refused_at_once_where_it_cannot_be_dumped() -> Result<()> {
    let scene = Scene::start()?;
    let (host, b) = (scene.host("a"), scene.host("b"));
    if !host.output("grep -q :freezer: /proc/self/cgroup")?.status.success() {
        ferry_tests::skip("the freezer is not one of cgroup v1");
        return Ok(());
    }
    host.run(&format!(
        "ctr run -d --null-io --runtime {RUNTIME} {BUSYBOX} counter sh -c 'sleep 9999 & {COUNTS}'"
    ))?;
    counts_on(host, "counter")?;
    let child = "$(pgrep -fx 'sleep 9999')";
    host.run(&format!("kill -STOP {child}"))?;
    let before = traces(host)?;
    let migrate = format!("ferry migrate counter --to ssh://root@{}", b.address());
    for (command, part) in [
        ("ferry checkpoint counter taken", "kill -CONT"),
        ("ferry checkpoint counter taken --exit", "kill -CONT"),
        ("ctr task checkpoint --image-path /root/images counter", "kill -CONT"),
        ("ctr task checkpoint --exit --image-path /root/images counter", "kill -CONT"),
        (&migrate, "runs on a as before: stopped"),
    ] {
        let refusal = refused(host, &format!("timeout 30 {command}"))?;
        ensure!(refusal.contains(part), "{command}: {refusal}");
        counts_on(host, "counter").context(command.to_owned())?;
        host.run(&format!("rm -rf /root/images; grep -q 'State:.T' /proc/{child}/status"))?;
        wait_for_traces(host, &before, command)?;
    }
    // Pausing is another matter.
    host.run("ctr task pause counter; ctr task resume counter")?;
    counts_on(host, "counter")?;
    host.run(&format!("kill -CONT {child}; ferry checkpoint counter taken"))?;
    counts_on(host, "counter")
}
