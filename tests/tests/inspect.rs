//! `ferry inspect` of what ferry, containerd and its own shim make of real containers.

use anyhow::{Context, Result, ensure};
use ferry_tests::ctr::{BUSYBOX, FERRY, REFERENCE, wait_for};
use ferry_tests::versions::can_checkpoint;
use ferry_tests::{Host, Lab, skip, task_lab};
use serde_json::Value;

const REDIS: &str = "docker.io/library/redis:latest";
/// A shell with children, a pipe between them, and one that has ended.
const TREE: &str = "cd /tmp; tail -f /dev/null | cat >/dev/null & \
                    (sleep 0.1 & exec tail -f /dev/null) & exec 7>/tmp/out; echo abc >&7; \
                    exec tail -f /dev/null";

/// A host; none where the runtime has no checkpoint.
fn lab() -> Result<Option<Lab>> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(None);
    }
    task_lab().map(Some)
}

/// What `ferry inspect` says of `what`, as JSON; the table has to hold as well.
fn inspect(host: &Host, what: &str) -> Result<Value> {
    let table = host.run(&format!("ferry inspect {what}"))?.stdout;
    println!("{table}");
    let json = host.run(&format!("ferry --json inspect {what}"))?.stdout;
    serde_json::from_str(&json).with_context(|| format!("decode {json}"))
}

/// What `ferry inspect` refuses `what` with.
fn refused(host: &Host, what: &str, why: &str) -> Result<()> {
    let output = host.output(&format!("ferry inspect {what}"))?;
    ensure!(output.status.code() == Some(1), "{what}: {output}");
    ensure!(output.stderr.contains(why), "{what}: no {why:?} in {output}");
    Ok(())
}

fn processes(report: &Value) -> Result<&Vec<Value>> {
    report["contents"]["processes"].as_array().with_context(|| format!("no processes: {report}"))
}

/// Command lines, sorted.
fn commands(report: &Value) -> Result<Vec<String>> {
    let words = |process: &Value| {
        let words = process["command"].as_array().into_iter().flatten();
        words.filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
    };
    let mut all: Vec<_> = processes(report)?.iter().map(words).collect();
    all.sort();
    Ok(all)
}

#[test]
fn a_redis_is_told_with_its_connections_memory_and_options() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    host.run(&format!(
        "ctr run -d --null-io --net-host --runtime {FERRY} {REDIS} store redis-server \
         --protected-mode no --save '' --enable-debug-command yes --unixsocket /tmp/sock"
    ))?;
    wait_for(host, "redis-cli ping", "PONG")?;
    host.run("redis-cli debug populate 100000 key 100")?;
    let client = host.spawn("exec redis-cli subscribe x")?;
    wait_for(host, "redis-cli pubsub channels", "x")?;
    host.run("ctr container checkpoint --task --image --rw store local/store:1")?;
    let report = inspect(host, "local/store:1")?;
    assert_eq!(report["kind"], "image");
    assert_eq!(report["image"], REDIS);
    assert_eq!(report["runtime"], FERRY);
    assert_eq!(report["snapshotter"], "overlayfs");
    assert_eq!(report["command"][0], "redis-server");
    let runc = host.run("runc --version | awk '/^runc/ {print $3}'")?.stdout;
    assert_eq!(report["versions"]["runc"], runc.trim());
    let criu = host.run("criu --version | awk '{print $2}'")?.stdout;
    assert_eq!(report["versions"]["criu"], criu.trim());
    assert_eq!(report["options"]["tcp_established"], true);
    let parts = report["parts"].to_string();
    ensure!(
        parts.contains("criu.checkpoint.criu.tar") && parts.contains("layer.v1.tar"),
        "{parts}"
    );

    let [redis] = processes(&report)?.as_slice() else { anyhow::bail!("one process: {report}") };
    ensure!(commands(&report)?[0].starts_with("redis-server *:6379"), "{report}");
    assert_eq!(redis["pid"], 1);
    assert_eq!(redis["state"], "running");
    ensure!(redis["threads"].as_u64() > Some(3), "{redis}");
    // CRIU writes what is resident and not of a file.
    let pid = host.run("ctr task ls | awk '/^store/ {print $2}'")?.stdout;
    let status = host.run(&format!("awk '/RssAnon/ {{print $2}}' /proc/{}/status", pid.trim()))?;
    let resident: u64 = status.stdout.trim().parse::<u64>()? * 1024;
    let present = redis["memory"]["present"].as_u64().unwrap_or_default();
    ensure!(present.abs_diff(resident) < resident / 4, "{present} in images, {resident} resident");
    ensure!(report["contents"]["pages_bytes"].as_u64() >= Some(present), "{report}");
    let files = redis["files"].as_array().context("no files")?;
    let has = |fits: &dyn Fn(&Value) -> bool| files.iter().any(fits);
    ensure!(
        has(&|f| f["protocol"] == "tcp"
            && f["state"] == "listening"
            && f["local"] == "0.0.0.0:6379"),
        "{files:#?}"
    );
    ensure!(
        has(&|f| f["state"] == "connected"
            && f["remote"].as_str().is_some_and(|a| a.starts_with("127.0.0.1:"))),
        "{files:#?}"
    );
    ensure!(has(&|f| f["kind"] == "unix" && f["path"] == "/tmp/sock"), "{files:#?}");
    ensure!(has(&|f| f["what"] == "epoll"), "{files:#?}");
    let mounts = report["contents"]["mounts"].as_array().context("no mounts")?;
    ensure!(mounts.iter().any(|m| m["target"] == "/proc" && m["kind"] == "proc"), "{mounts:#?}");

    // Without its task there is no process in it, and an image is no checkpoint.
    host.run("ctr container checkpoint --image store local/store:2")?;
    let table = host.run("ferry inspect local/store:2")?.stdout;
    ensure!(table.contains("no processes"), "{table}");
    refused(host, REDIS, "not of a checkpoint")?;
    refused(host, "local/nothing:1", "there is no image")?;
    drop(client);
    Ok(())
}

#[test]
fn a_process_tree_is_told_the_same_from_image_folder_and_archive() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    host.run(&format!("ctr run -d --null-io --runtime {REFERENCE} {BUSYBOX} tree sh -c '{TREE}'"))?;
    wait_for(host, "ctr task exec --exec-id look tree sh -c 'cat /tmp/out; ps'", "abc")?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let made = host.run(
        "ctr task checkpoint --image-path /var/tmp/i tree || \
         tail -n 30 /run/containerd/io.containerd.runtime.v2.task/default/tree/criu-dump.log; \
         ls /var/tmp/i",
    )?;
    ensure!(made.stdout.contains("inventory.img"), "{made}");
    let name = host.run("ctr task checkpoint tree")?.stdout;

    let folder = inspect(host, "/var/tmp/i")?;
    let wanted = ["", "cat", "tail -f /dev/null", "tail -f /dev/null", "tail -f /dev/null"];
    assert_eq!(commands(&folder)?, wanted);
    let one = |fits: &dyn Fn(&Value) -> bool| {
        let found = processes(&folder)?.iter().find(|process| fits(process));
        found.with_context(|| format!("not there: {folder:#}"))
    };
    let first = one(&|p| p["pid"] == 1)?;
    assert_eq!((&first["uid"], &first["gid"]), (&0.into(), &0.into()));
    ensure!(first["exe"].as_str().is_some_and(|exe| exe.ends_with("busybox")), "{first}");
    let files = first["files"].as_array().context("no files")?;
    let out = files.iter().find(|f| f["path"] == "/tmp/out").context("no open file")?;
    assert_eq!((&out["fd"], &out["access"], &out["position"]), (&7.into(), &"w".into(), &4.into()));
    assert_eq!(one(&|p| p["state"] == "zombie")?["name"], "sleep");
    // The pipe's two ends are in two processes.
    let pipe = |process: &Value, fd: u32| {
        let files = process["files"].as_array().into_iter().flatten();
        let mut ends = files.filter(|f| f["fd"] == fd && f["kind"] == "pipe");
        ends.next().map(|end| end["pipe"].clone())
    };
    let read = pipe(one(&|p| p["command"][0] == "cat")?, 0);
    ensure!(read.is_some() && one(&|p| pipe(p, 1) == read)?["command"][0] == "tail", "{folder:#}");

    // The same from all others. Memory and numbers of pipes differ from dump to dump.
    let image = inspect(host, name.trim())?;
    assert_eq!(commands(&image)?, wanted);
    assert_eq!(image["command"][0], "sh");
    host.run(
        "cd /var/tmp; tar cf plain.tar -C i .; mkdir p; cp -r i p/checkpoint; \
         echo '{\"name\":\"tree\",\"rootfsImageName\":\"busybox\"}' >p/config.dump; \
         tar czf podman.tar.gz -C p .",
    )?;
    for archive in ["/var/tmp/plain.tar", "/var/tmp/podman.tar.gz", "/var/tmp/p"] {
        let report = inspect(host, archive)?;
        assert_eq!(report["contents"], folder["contents"], "{archive}");
    }
    assert_eq!(inspect(host, "/var/tmp/podman.tar.gz")?["container"], "tree");

    // What is not as it should be is an error that says so.
    host.run(
        "cd /var/tmp; head -c 30000 plain.tar >cut.tar; head -c 3000 podman.tar.gz >cut.tar.gz; \
         cp -r i bad; head -c 30 i/pstree.img >bad/pstree.img; \
         mkdir l; ln -s /etc/shadow l/inventory.img; tar cf link.tar -C l inventory.img; \
         tar cf up.tar -P ../../var/tmp/i/inventory.img; mkdir empty; mkfifo fifo",
    )?;
    refused(host, "/var/tmp/cut.tar", "ends early")?;
    refused(host, "/var/tmp/cut.tar.gz", "/var/tmp/cut.tar.gz: ")?;
    refused(host, "/var/tmp/bad", "pstree.img")?;
    refused(host, "/var/tmp/link.tar", "is a link, which is refused")?;
    refused(host, "/var/tmp/l", "inventory.img is missing")?;
    refused(host, "/var/tmp/up.tar", "leads out of the archive")?;
    refused(host, "/var/tmp/empty", "inventory.img is missing")?;
    refused(host, "/etc/passwd", "no tar archive")?;
    refused(host, "/var/tmp/fifo", "neither a file nor a folder")?;
    refused(host, "/var/tmp/nothing", "No such file")
}
