//! What a container uses and may use, through `ctr`: the same steps with ferry and with the reference.

use std::time::Duration;

use anyhow::{Context, Result};
use ferry_tests::ctr::{BUSYBOX, FERRY, IDLE, RUNTIMES, SOON, remove, until};
use ferry_tests::versions::can_checkpoint;
use ferry_tests::{Host, Job, skip, task_lab};
use serde_json::Value;

/// Uses memory until it is killed.
const HOG: &str = "tail /dev/zero";
/// What `ctr` prints of the use of `id`.
fn metrics(host: &Host, id: &str) -> Result<Value> {
    let text = host.run(&format!("ctr task metrics --format json {id}"))?.stdout;
    serde_json::from_str(&text).with_context(|| format!("read {text}"))
}

/// The names of all numbers in `value` that are not 0.
fn counted(value: &Value, name: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields
                .iter()
                .for_each(|(field, value)| counted(value, &format!("{name}.{field}"), found));
        }
        Value::Array(values) => values.iter().for_each(|value| counted(value, name, found)),
        Value::Null => {}
        value if value.as_f64() == Some(0.0) => {}
        _ => found.push(name.to_string()),
    }
}

#[test]
fn statistics_count_all_that_the_reference_counts() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    let mut names = Vec::new();
    for runtime in RUNTIMES {
        let limits = "--memory-limit 67108864 --cpu-quota 20000 --cpu-period 100000";
        // Works, reads and writes a device, and comes to its limit.
        let work = "sh -c 'while :; do dd if=/dev/zero of=/f bs=64k count=16 conv=fsync 2>/dev/null; \
                    cat /f >/dev/null; i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; done'";
        host.run(&format!("ctr run -d --runtime {runtime} {limits} {BUSYBOX} t {work}"))?;
        // Not all numbers are there at once.
        let mut seen = Vec::new();
        until("it has been throttled, in programs and in the kernel", || {
            let now = metrics(host, "t")?;
            let throttled = now.pointer("/cpu/throttling/throttled_periods");
            let throttled = throttled.or(now.pointer("/cpu/nr_throttled")).and_then(Value::as_u64);
            counted(&now, "", &mut seen);
            // Time in programs is sampled by ticks: there may be none for long.
            let user = seen.iter().any(|name| name.starts_with(".cpu.") && name.contains("user"));
            Ok(user && throttled.is_some_and(|count| count > 5))
        })?;
        seen.sort();
        seen.dedup();
        // Counts, highest values and limits: what is used at the moment comes and goes, and what was
        // read once is not read from the device again.
        let lasting = [".cpu.", ".blkio.", ".io.usage", ".pids.", "limit", "fault", ".max"];
        let passing = ["maj", "swap", "psi", "burst", "rbytes", "rios"];
        seen.retain(|name| {
            let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
            has(&lasting) && !has(&passing)
        });
        names.push(seen);

        let used = metrics(host, "t")?;
        let limit = used.pointer("/memory/usage/limit").or(used.pointer("/memory/usage_limit"));
        assert_eq!(limit.and_then(Value::as_u64), Some(67_108_864), "{runtime}: {used}");
        // sh, and what it runs at the moment or has just run.
        let pids = used.pointer("/pids/current").and_then(Value::as_u64);
        assert!(matches!(pids, Some(1..=5)), "{runtime}: {used}");
        let time = |used: &Value| {
            let total = used.pointer("/cpu/usage/total").or(used.pointer("/cpu/usage_usec"));
            total.and_then(Value::as_u64).unwrap_or_default()
        };
        until("it has run on", || Ok(time(&metrics(host, "t")?) > time(&used)))?;
        remove(host, "t")?;
        let gone = host.output("ctr task metrics t")?;
        assert!(gone.stderr.contains("not found"), "{runtime}: {gone}");
    }
    assert_eq!(names[0], names[1]);
    Ok(())
}

#[test]
fn statistics_of_a_paused_and_of_a_stopped_task_can_be_had() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        host.run(&format!("ctr run -d --runtime {runtime} {BUSYBOX} t {IDLE}"))?;
        host.run("ctr task pause t")?;
        assert_eq!(metrics(host, "t")?.pointer("/pids/current"), Some(&1.into()), "{runtime}");
        host.run("ctr task resume t && ctr task kill -s KILL t")?;
        until("it has stopped", || Ok(host.run("ctr task ls")?.stdout.contains("STOPPED")))?;
        assert_eq!(
            metrics(host, "t")?.pointer("/pids/current").and_then(Value::as_u64).unwrap_or(0),
            0,
            "{runtime}"
        );
        remove(host, "t")?;
    }
    Ok(())
}

/// Listens to events, and hears them when it returns.
fn listen(host: &Host) -> Result<Job> {
    let mut job = host.spawn("exec ctr events")?;
    until("events are heard", || {
        host.run("ctr namespaces create heard")?;
        let heard = job.wait_for("/namespaces/create", Duration::from_millis(200));
        host.run("ctr namespaces remove heard")?;
        Ok(heard.is_ok())
    })?;
    Ok(job)
}

/// Topics of container `id`, in order, without what is told of execs but their exits.
fn topics(events: &str, id: &str) -> Vec<String> {
    let of_id = format!("\"container_id\":\"{id}\"");
    let topic = |line: &str| {
        let topic = line.split_whitespace().find_map(|word| word.strip_prefix("/tasks/"))?;
        let exec = line.contains("\"id\":\"e\"");
        let topic = if exec { format!("{topic} e") } else { topic.to_string() };
        (!topic.starts_with("exec-")).then_some(topic)
    };
    let mut topics: Vec<_> =
        events.lines().filter(|line| line.contains(&of_id)).filter_map(topic).collect();
    // The kernel may tell of one end of memory more than once.
    topics.dedup();
    topics
}

#[test]
fn the_end_of_memory_is_told_before_the_exit_it_causes() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    let limit = "--memory-limit 16777216";
    for runtime in RUNTIMES {
        let mut job = listen(host)?;
        let run = format!("ctr run --rm --runtime {runtime} {limit} {BUSYBOX}");
        for i in 0..3 {
            let killed = host.output(&format!("{run} init{i} {HOG}"))?;
            assert_eq!(killed.status.code(), Some(137), "{runtime}: {killed}");
        }
        host.run(&format!("ctr run -d --runtime {runtime} {limit} {BUSYBOX} t {IDLE}"))?;
        let killed = host.output(&format!("ctr task exec --exec-id e t {HOG}"))?;
        assert_eq!(killed.status.code(), Some(137), "{runtime}: {killed}");
        remove(host, "t")?;
        // One that ends by itself.
        host.run(&format!("{run} good true"))?;
        job.wait_for("/containers/delete {\"id\":\"good\"}", SOON)?;
        let events = job.stop()?.stdout;
        let init = ["create", "start", "oom", "exit", "delete"];
        let exec = ["create", "start", "oom", "exit e", "exit", "delete"];
        if runtime == FERRY {
            for i in 0..3 {
                assert_eq!(topics(&events, &format!("init{i}")), init, "{events}");
            }
            assert_eq!(topics(&events, "t"), exec, "{events}");
        } else {
            // The reference sends this one event past the others, and may end before its last ones.
            assert!(events.lines().any(|line| line.contains("/tasks/oom")), "{events}");
        }
        assert!(!topics(&events, "good").contains(&"oom".to_string()), "{runtime}: {events}");
    }
    Ok(())
}

#[test]
fn nothing_of_the_watch_outlives_its_container() -> Result<()> {
    let lab = task_lab()?;
    let host = lab.host("a");
    // One shim for all, as a pod has.
    host.run(&format!("ctr run -d --runtime {FERRY} {BUSYBOX} first {IDLE}"))?;
    let open = |host: &Host| -> Result<u32> {
        let text = host.run("ls /proc/$(pgrep -x containerd-shim)/fd | wc -l")?.stdout;
        text.trim().parse().context("count descriptors")
    };
    let run = |i: u32| host.output(&format!("ctr task exec --exec-id e{i} first true")).map(drop);
    run(0)?;
    let before = open(host)?;
    (1..10).try_for_each(run)?;
    until("all descriptors are closed", || Ok(open(host)? <= before))?;
    host.run("ctr task kill -s KILL first")?;
    until("it has stopped", || Ok(host.run("ctr task ls")?.stdout.contains("STOPPED")))?;
    let watches = "ls -l /proc/$(pgrep -x containerd-shim)/fd | grep -c 'inotify' || true";
    assert_eq!(host.run(watches)?.stdout.trim(), "0");
    remove(host, "first").map(drop)
}

#[test]
fn a_restored_container_is_counted_and_watched() -> Result<()> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(());
    }
    let lab = task_lab()?;
    let host = lab.host("a");
    // Not with the reference: it finds the cgroups at Create only, when a restored task has none.
    let wait = "sh -c 'while ! test -e /go; do usleep 100000; done; exec tail /dev/zero'";
    host.run(&format!("ctr run -d --runtime {FERRY} --memory-limit 33554432 {BUSYBOX} t {wait}"))?;
    host.run("ctr container checkpoint --task --rw --image t image")?;
    remove(host, "t")?;
    let mut job = listen(host)?;
    host.run("ctr container restore --live --rw t image")?;
    let used = metrics(host, "t")?;
    assert!(used.pointer("/pids/current").and_then(Value::as_u64) >= Some(1), "{used}");
    host.run("ctr task exec --exec-id go t touch /go")?;
    job.wait_for("/tasks/exit {\"container_id\":\"t\",\"id\":\"t\"", SOON)?;
    let events = job.stop()?.stdout;
    let topics = topics(&events, "t");
    let (oom, exit) =
        (topics.iter().position(|t| t == "oom"), topics.iter().rposition(|t| t == "exit"));
    assert!(oom.is_some() && oom < exit, "{events}");
    remove(host, "t").map(drop)
}
