//! What people do with nerdctl, the same with ferry and with the reference, io.containerd.runc.v2.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use ferry_tests::counter::Counter;
use ferry_tests::ctr::{BUSYBOX, FERRY, RUNTIMES, SOON, assert_prints_nothing, wait_for};
use ferry_tests::layers::{CNI, NERDCTL};
use ferry_tests::versions::task_lab_over;
use ferry_tests::{Host, Lab, skip};

const REDIS: &str = "docker.io/library/redis:latest";
/// Ends with 3 when it is told to.
const OBEDIENT: &str = "sh -c 'trap \"exit 3\" TERM; echo ready; while :; do usleep 50000; done'";

/// A host with nerdctl; none where it cannot be built.
fn lab() -> Result<Option<Lab>> {
    if let Some(missing) = NERDCTL.missing() {
        skip(&missing);
        return Ok(None);
    }
    task_lab_over(&[&NERDCTL, &CNI]).map(Some)
}

/// Standard output of `nerdctl COMMAND`, which must succeed.
fn nerdctl(host: &Host, command: &str) -> Result<String> {
    Ok(host.run(&format!("nerdctl {command}"))?.stdout)
}

/// Fails if a container has left something: shims, loggers, their sockets, folders.
fn assert_nothing_left(host: &Host) -> Result<()> {
    assert_prints_nothing(
        host,
        "pgrep -a 'containerd-shim|nerdctl'; ls /run/containerd/s /run/containerd/runc/default \
         /run/containerd/io.containerd.runtime.v2.task/default 2>/dev/null | grep -v :",
    )
}

#[test]
fn a_detached_container_keeps_its_log_for_later_and_for_followers() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    for runtime in RUNTIMES {
        let counts = "sh -c 'i=0; while [ ! -e /end ]; do i=$((i+1)); echo line $i; usleep 50000; done; \
                      echo error >&2; echo last; usleep 500000'";
        nerdctl(host, &format!("run -d --runtime {runtime} --name counter {BUSYBOX} {counts}"))?;
        let mut follower = host.spawn("exec nerdctl logs -f counter")?;
        follower.wait_for("line 5\n", SOON)?;
        nerdctl(host, "exec counter touch /end")?;
        follower.wait_for("last\n", SOON)?;
        assert_eq!(nerdctl(host, "wait counter")?, "0\n", "{runtime}");
        wait_for(host, "nerdctl logs counter", "last\n")?;
        let log = host.output("nerdctl logs counter")?;
        assert!(log.stdout.starts_with("line 1\nline 2\n"), "{runtime}: {log}");
        assert_eq!(log.stderr, "error\n", "{runtime}");
        follower.stop()?;
        nerdctl(host, "rm counter")?;

        // All of it, while it runs: nerdctl's logger may stop at the end of a container before it has
        // read the last of its output.
        let many = "sh -c 'for i in $(seq 20000); do echo line $i; done; exec tail -f /dev/null'";
        nerdctl(host, &format!("run -d --runtime {runtime} --name many {BUSYBOX} {many}"))?;
        wait_for(host, "nerdctl logs many | tail -n 1", "line 20000\n")?;
        assert_eq!(nerdctl(host, "logs many | wc -l")?, "20000\n", "{runtime}");
        nerdctl(host, "rm -f many")?;
        assert_nothing_left(host).context(runtime)?;
    }
    Ok(())
}

#[test]
fn a_terminal_of_a_container_or_of_an_exec_is_one_of_the_right_size() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    const SIZE: (u16, u16) = (33, 77);
    for runtime in RUNTIMES {
        let run = format!("nerdctl run -it --runtime {runtime} --name shell {BUSYBOX}");
        let exec = "nerdctl exec -it shell sh".to_owned();
        let mut run = host.spawn_at_terminal(&run, SIZE)?;
        let mut input = run.stdin().context("a job without input")?;
        // What is typed is echoed, so the answers are no part of it.
        input.write_all(b"tty; echo is$((1+1))here\n")?;
        run.wait_for("is2here", SOON)?;
        wait_for(host, "nerdctl exec shell sh -c 'stty size <$(readlink /proc/1/fd/0)'", "33 77")?;

        let mut exec = host.spawn_at_terminal(&exec, SIZE)?;
        let mut typed = exec.stdin().context("a job without input")?;
        typed.write_all(
            b"tty; until [ \"$(stty size)\" = '33 77' ]; do :; done; echo si$((33+44))ze\n",
        )?;
        exec.wait_for("si77ze", SOON)?;
        typed.write_all(b"exit 5\n")?;
        let exec = exec.wait(SOON)?;
        assert!(exec.stdout.contains("exit code 5"), "{runtime}: {exec}");

        input.write_all(b"exit 4\n")?;
        let run = run.wait(SOON)?;
        assert_eq!(run.status.code(), Some(4), "{runtime}: {run}");
        for shown in [&run.stdout, &exec.stdout] {
            assert!(shown.contains("/dev/pts/"), "{runtime}: {shown}");
        }
        nerdctl(host, "rm shell")?;
        // A terminal whose container is ended from elsewhere.
        let run = format!("nerdctl run -it --rm --runtime {runtime} --name shell {BUSYBOX}");
        let run = host.spawn_at_terminal(&run, SIZE)?;
        wait_for(host, "nerdctl ps", "shell")?;
        nerdctl(host, "kill shell")?;
        assert_eq!(run.wait(SOON)?.status.code(), Some(137), "{runtime}");
        assert_nothing_left(host).context(runtime)?;
    }
    Ok(())
}

#[test]
fn input_of_a_container_and_of_an_exec_ends() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    for runtime in RUNTIMES {
        let run = format!("nerdctl run -i --rm --runtime {runtime} {BUSYBOX} cat");
        assert_eq!(host.run(&format!("echo one | timeout 60 {run}"))?.stdout, "one\n", "{runtime}");
        nerdctl(host, &format!("run -d --runtime {runtime} --name idle {BUSYBOX} {OBEDIENT}"))?;
        let exec = "seq 100000 | timeout 60 nerdctl exec -i idle sh -c 'wc -l; exit 6'";
        let exec = host.output(exec)?;
        assert_eq!(exec.stdout, "100000\n", "{runtime}: {exec}");
        // nerdctl's own code is 1.
        assert!(exec.stderr.contains("exit code 6"), "{runtime}: {exec}");
        nerdctl(host, "rm -f idle")?;
        assert_nothing_left(host).context(runtime)?;
    }
    Ok(())
}

#[test]
fn a_container_is_stopped_started_and_restarted() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    let ready = |times: usize| -> Result<()> {
        wait_for(host, "nerdctl logs server", &"ready\n".repeat(times)).map(drop)
    };
    let code = || nerdctl(host, "inspect -f '{{.State.Status}} {{.State.ExitCode}}' server");
    let pid = || nerdctl(host, "inspect -f '{{.State.Pid}}' server");
    for runtime in RUNTIMES {
        nerdctl(host, &format!("run -d --runtime {runtime} --name server {BUSYBOX} {OBEDIENT}"))?;
        ready(1)?;
        nerdctl(host, "stop -t 30 server")?;
        assert_eq!(code()?, "exited 3\n", "{runtime}");
        nerdctl(host, "start server")?;
        ready(2)?;
        let first = pid()?;
        nerdctl(host, "restart -t 30 server")?;
        ready(3)?;
        assert_ne!(pid()?, first, "{runtime}");
        assert_eq!(code()?.split(' ').next(), Some("running"), "{runtime}");
        // One that does not obey.
        nerdctl(host, "exec server sh -c 'kill -STOP 1; true'")?;
        nerdctl(host, "rm -f server")?;
        nerdctl(
            host,
            &format!("run -d --runtime {runtime} --name server {BUSYBOX} tail -f /dev/null"),
        )?;
        nerdctl(host, "stop -t 1 server")?;
        assert_eq!(code()?, "exited 137\n", "{runtime}");
        nerdctl(host, "rm server")?;
        assert_nothing_left(host).context(runtime)?;
    }
    Ok(())
}

#[test]
fn a_running_container_is_watched_paused_updated_and_copied_to() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    let limit = "exec server sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || \
                 cat /sys/fs/cgroup/memory.max'";
    for runtime in RUNTIMES {
        nerdctl(host, &format!("run -d --runtime {runtime} --name server {BUSYBOX} {OBEDIENT}"))?;
        let top = nerdctl(host, "top server")?;
        assert!(top.contains("CMD") && top.contains("trap"), "{runtime}: {top}");

        let stats =
            nerdctl(host, "stats --no-stream --format '{{.Name}} {{.MemUsage}} {{.PIDs}}' server")?;
        let words: Vec<_> = stats.split_whitespace().collect();
        assert!(words.len() == 5 && words[0] == "server", "{runtime}: {stats}");
        assert!(words[1].ends_with("iB") && words[1] != "0B", "{runtime}: {stats}");
        assert!(words[4].parse::<u32>().is_ok_and(|pids| pids >= 1), "{runtime}: {stats}");

        nerdctl(host, "update --memory 64m --cpus 0.5 server")?;
        assert_eq!(nerdctl(host, limit)?, "67108864\n", "{runtime}");

        nerdctl(host, "pause server")?;
        wait_for(host, "nerdctl ps -a", "Paused")?;
        ensure!(!host.output("nerdctl exec server true")?.status.success(), "{runtime}");
        nerdctl(host, "unpause server")?;
        nerdctl(host, "exec server true")?;

        host.run("echo data >/tmp/there && nerdctl cp /tmp/there server:/file")?;
        assert_eq!(nerdctl(host, "exec server cat /file")?, "data\n", "{runtime}");
        host.run("nerdctl cp server:/file /tmp/back && cmp /tmp/there /tmp/back")?;
        nerdctl(host, "rm -f server")?;
        assert_nothing_left(host).context(runtime)?;
    }
    Ok(())
}

#[test]
fn services_of_a_compose_file_come_up_and_go_down() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    for runtime in RUNTIMES {
        let file = format!(
            "services:
  store:
    image: {REDIS}
    runtime: {runtime}
  client:
    image: {REDIS}
    runtime: {runtime}
    depends_on: [store]
    command: sh -c 'trap \"exit 0\" TERM; while :; do redis-cli -h store ping; usleep 100000; done'
"
        );
        std::fs::write(host.root().join("root/compose.yaml"), file)?;
        nerdctl(host, "compose up -d")?;
        wait_for(host, "nerdctl compose logs client", "PONG")?;
        let using = "ps -q | xargs nerdctl inspect --mode native -f '{{.Runtime.Name}}'";
        assert_eq!(nerdctl(host, using)?, format!("{runtime}\n{runtime}\n"));
        let client = "compose exec -T client redis-cli -h store";
        assert_eq!(nerdctl(host, &format!("{client} set key value"))?.trim(), "OK", "{runtime}");
        assert_eq!(nerdctl(host, &format!("{client} get key"))?.trim(), "value", "{runtime}");
        // With what it depends on.
        nerdctl(host, "compose restart client")?;
        wait_for(host, &format!("nerdctl {client} ping"), "PONG")?;
        nerdctl(host, "compose down")?;
        assert_eq!(nerdctl(host, "ps -aq")?, "", "{runtime}");
        assert_nothing_left(host).context(runtime)?;
    }
    Ok(())
}

/// With ferry in place of the reference, which nerdctl asks for more than another runtime. The reference
/// itself cannot restore a connection.
#[test]
fn a_container_is_started_from_its_checkpoint_and_its_client_goes_on() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    host.run("ln -s containerd-shim-ferry-v2 /usr/local/bin/containerd-shim-runc-v2")?;
    nerdctl(
        host,
        &format!("run -d --name store --net host {REDIS} redis-server --protected-mode no"),
    )?;
    wait_for(host, "nerdctl exec store redis-cli ping", "PONG")?;
    let mut client = Counter::start(lab.client(), host, 6379, "INCR count")?;
    // It stays, and so do its connections.
    nerdctl(host, "checkpoint create --leave-running store running")?;
    client.goes_on()?;
    nerdctl(host, "checkpoint create store ended")?;
    wait_for(host, "nerdctl ps -a", "Exited (137)")?;
    let listed = nerdctl(host, "checkpoint ls store")?;
    ensure!(listed.contains("running") && listed.contains("ended"), "{listed}");
    let images = host.run("find /var/lib -name inventory.img -path '*ended*'")?.stdout;
    let folder = images.trim().strip_suffix("/inventory.img").context("no images")?;
    let told = host.run(&format!("ferry inspect {folder}"))?.stdout;
    ensure!(told.contains("redis-server *:6379") && told.contains("connections locked"), "{told}");
    nerdctl(host, "start --checkpoint ended store")?;
    client.goes_on()?;
    let counted = nerdctl(host, "exec store redis-cli get count")?;
    ensure!(counted.trim().parse::<usize>()? > 40, "{counted}");
    let tables = host.run("nft list tables")?.stdout;
    ensure!(tables.trim().is_empty(), "{tables}");
    nerdctl(host, "checkpoint rm store ended")?;
    ensure!(!nerdctl(host, "checkpoint ls store")?.contains("ended"), "it is listed still");
    client.stop()?;
    nerdctl(host, "rm -f store")?;
    assert_nothing_left(host)
}

/// Under ferry's own name nerdctl sends no options.
#[test]
fn under_its_own_name_a_container_runs_on_and_is_started_from_its_checkpoint_later() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let host = lab.host("a");
    let run = format!("run -d --runtime {FERRY} --name store --net host {REDIS}");
    nerdctl(host, &format!("{run} redis-server --protected-mode no --save ''"))?;
    wait_for(host, "nerdctl exec store redis-cli ping", "PONG")?;
    let key = |command: &str| nerdctl(host, &format!("exec store redis-cli {command}"));
    let mut client = Counter::start(lab.client(), host, 6379, "INCR count")?;
    nerdctl(host, "checkpoint create store first")?;
    client.goes_on().context("it runs on")?;
    client.stop()?;
    key("set key then")?;
    nerdctl(host, "checkpoint create store second")?;
    key("set key later").context("it runs on")?;
    let listed = nerdctl(host, "checkpoint ls store")?;
    ensure!(listed.contains("first") && listed.contains("second"), "{listed}");
    // nerdctl gives its containers hooks.
    let told = host.output("ferry --json doctor $(nerdctl ps --quiet --no-trunc)")?;
    ensure!(told.stdout.contains("\"hook\""), "{told}");

    nerdctl(host, "stop -t 30 store")?;
    nerdctl(host, "start --checkpoint second store")?;
    wait_for(host, "nerdctl exec store redis-cli ping", "PONG")?;
    ensure!(key("get key")?.trim() == "then", "it is not as it was: {}", key("get key")?);
    ensure!(key("get count")?.trim().parse::<usize>()? > 20, "the count is lost");
    let tables = host.run("nft list tables")?.stdout;
    ensure!(tables.trim().is_empty(), "{tables}");
    nerdctl(host, "checkpoint rm store first")?;
    nerdctl(host, "checkpoint rm store second")?;
    let listed = nerdctl(host, "checkpoint ls store")?;
    ensure!(!listed.contains("first") && !listed.contains("second"), "{listed}");
    nerdctl(host, "rm -f store")?;
    assert_nothing_left(host)
}
