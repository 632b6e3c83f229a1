//! Streams of a process through `ctr`: terminals, log programs, log files and FIFOs. Every test runs
//! the same steps with ferry and with the reference, io.containerd.runc.v2, on the same host.

use std::time::Instant;

use anyhow::{Result, ensure};
use ferry_tests::ctr::{
    BUSYBOX, FERRY, IDLE, RUNTIMES, SOON, assert_prints_nothing, remove, start, status, until,
    wait_for_status,
};
use ferry_tests::versions::can_checkpoint;
use ferry_tests::{Host, Lab, Output, skip, task_lab, times};

/// Runs a command in a terminal of 80x24 and follows steps: `wait` for an output, `type` a text,
/// change the `size`, `kill` the command. Prints the output, ends as the command does.
const TTY: &str = r#"
import fcntl, json, os, pty, select, signal, struct, sys, termios, time
steps, command = json.loads(sys.argv[1]), sys.argv[2:]
pid, master = pty.fork()
if pid == 0:
    os.execvp(command[0], command)
size = lambda columns, rows: fcntl.ioctl(master, termios.TIOCSWINSZ,
                                         struct.pack('HHHH', rows, columns, 0, 0))
size(80, 24)
seen, position, deadline, resized = b'', 0, time.time() + 60, False
def read(patience):
    global seen
    if not select.select([master], [], [], patience)[0]:
        return True
    try:
        got = os.read(master, 65536)
    except OSError:
        got = b''
    seen += got
    return len(got) > 0
def fail(text):
    sys.exit('%s; seen: %r' % (text, seen))
for step, *values in steps:
    if step == 'wait':
        text = values[0].encode()
        while seen.find(text, position) < 0:
            if time.time() > deadline or not read(0.1):
                fail('%r does not come' % text)
            if resized:
                # ctr looks at its size once before it listens for changes.
                os.kill(pid, signal.SIGWINCH)
        position = seen.find(text, position) + len(text)
    elif step == 'type':
        os.write(master, values[0].encode())
    elif step == 'size':
        size(*values)
        resized = True
    elif step == 'kill':
        os.kill(pid, 9)
while read(0.1):
    if time.time() > deadline:
        fail('it does not end')
sys.stdout.buffer.write(seen)
sys.stdout.flush()
status = os.waitpid(pid, 0)[1]
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"#;

/// A log program: copies what it is given to files in the folder of its first argument's value, and
/// says at its end whom it was told of.
const LOGGER: &str = r#"#!/bin/sh
PATH=/usr/bin:/bin
exec 5>&-
cat <&3 >>"$2/$CONTAINER_ID.out" &
cat <&4 >>"$2/$CONTAINER_ID.err" &
wait
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $*" >"$2/$CONTAINER_ID.end"
"#;

/// A host with ferry's programs, and those above.
fn lab() -> Result<Lab> {
    let lab = task_lab()?;
    let root = lab.host("a").root();
    std::fs::write(root.join("tmp/follow.py"), TTY)?;
    std::fs::write(root.join("usr/local/bin/logger"), LOGGER)?;
    lab.host("a").run("chmod +x /usr/local/bin/logger; mkdir /tmp/logs")?;
    Ok(lab)
}

/// Runs a command in a terminal.
fn tty(host: &Host, steps: &str, command: &str) -> Result<Output> {
    host.output(&format!("timeout 100 python3 /tmp/follow.py '{steps}' {command}"))
}

/// Fails if something of a terminal or a log program is left on the host.
fn assert_nothing_left(host: &Host) -> Result<()> {
    assert_prints_nothing(
        host,
        "ls /run/ferry/s 2>/dev/null; ls -d /tmp/pty* 2>/dev/null; \
         pgrep -a containerd-shim; pgrep -af '[l]ocal/bin/logger'",
    )
}

/// Types commands into a shell, which has the size of its terminal, and a changed one.
const SHELL: &str = r##"[
    ["wait", "# "],
    ["type", "until stty size | grep -q \"24 80\"; do usleep 50000; done; echo fir\"\"st\n"],
    ["wait", "first"],
    ["size", 132, 43],
    ["type", "until stty size | grep -q \"43 132\"; do usleep 50000; done; echo re\"\"sized\n"],
    ["wait", "resized"],
    ["type", "exit 7\n"]
]"##;

#[test]
fn a_terminal_is_typed_into_and_resized() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        let run = tty(host, SHELL, &format!("ctr run --rm -t --runtime {runtime} {BUSYBOX} t sh"))?;
        assert_eq!(run.status.code(), Some(7), "{runtime}: {run}");

        start(host, runtime, "", "t", IDLE)?;
        let exec = tty(host, SHELL, "ctr task exec -t --exec-id e t sh")?;
        assert_eq!(exec.status.code(), Some(7), "{runtime}: {exec}");
        // Interrupted by what is typed, not by a signal to its client.
        let steps = r#"[["wait", "ready"], ["type", "\u0003"]]"#;
        let exec =
            tty(host, steps, "ctr task exec -t --exec-id e t sh -c \"echo ready; sleep 99\"")?;
        assert_eq!(exec.status.code(), Some(130), "{runtime}: {exec}");
        remove(host, "t")?;
        assert_nothing_left(host)?;
    }
    Ok(())
}

#[test]
fn a_terminal_that_cannot_be_made_is_refused_and_leaves_nothing() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        let run = format!("ctr run --rm -t --runtime {runtime} {BUSYBOX} t no-such-program");
        let missing = tty(host, "[]", &run)?;
        ensure!(!missing.status.success(), "{runtime}: {missing}");
        assert!(missing.stdout.contains("not found"), "{runtime}: {missing}");
        host.output("ctr task rm -f t; ctr container rm t")?;
        start(host, runtime, "", "t", IDLE)?;
        let missing = tty(host, "[]", "ctr task exec -t --exec-id e t no-such-program")?;
        ensure!(!missing.status.success(), "{runtime}: {missing}");
        remove(host, "t")?;
        assert_nothing_left(host)?;
    }
    Ok(())
}

#[test]
fn a_terminal_whose_client_has_gone_does_not_hold_up_its_task() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        let run = format!("ctr run -t --runtime {runtime} {BUSYBOX} t sh -c \"echo ready; yes\"");
        tty(host, r#"[["wait", "ready"], ["kill"]]"#, &run)?;
        assert_eq!(status(host, "t")?, "RUNNING", "{runtime}");
        let begin = Instant::now();
        host.run("timeout 60 ctr task kill -s KILL t")?;
        wait_for_status(host, "t", "STOPPED")?;
        remove(host, "t")?;
        ensure!(begin.elapsed() < SOON, "{runtime}: {:?}", begin.elapsed());
        assert_nothing_left(host)?;
    }
    Ok(())
}

/// What an init writes that closes its streams and opens its terminal again.
#[test]
fn a_terminal_lives_as_long_as_its_process() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    let script = "exec </dev/null >/dev/null 2>&1; sleep 1; echo again >/dev/console; sleep 1; \
                  echo last >/dev/console";
    for runtime in RUNTIMES {
        let run = format!("ctr run --rm -t --runtime {runtime} {BUSYBOX} t sh -c \"{script}\"");
        let output = tty(host, r#"[["wait", "again"], ["wait", "last"]]"#, &run)?;
        ensure!(output.status.success(), "{runtime}: {output}");
    }
    Ok(())
}

/// How many of [`execs`] short execs have written all of their output: lines of 16 characters, more
/// than a pipe holds.
fn complete(host: &Host, exec: &str, count: &str) -> Result<usize> {
    let execs = execs();
    let counts = host.run(&format!(
        "for i in $(seq {execs}); do {exec} t sh -c 'yes 0123456789abcdef | head -n 6000' {count}; done"
    ))?;
    Ok(counts.stdout.lines().filter(|count| count.trim() == "6000").count())
}

fn execs() -> usize {
    times(100)
}

#[test]
fn the_last_bytes_arrive_through_a_terminal_a_file_and_a_log_program() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    let lines = "| grep -c 0123456789abcdef";
    let mut through_terminals = Vec::new();
    for runtime in RUNTIMES {
        start(host, runtime, "", "t", IDLE)?;
        let terminal = complete(
            host,
            "timeout 100 python3 /tmp/follow.py '[]' ctr task exec -t --exec-id e$i",
            lines,
        )?;
        let uri = |uri: &str| format!("ctr task exec --log-uri {uri} --exec-id e$i");
        let file = complete(
            host,
            &uri("file:///tmp/logs/file$i"),
            "; grep -c 0123456789abcdef /tmp/logs/file$i",
        )?;
        let program = complete(
            host,
            &uri("\"binary:///usr/local/bin/logger?dir=/tmp/logs\""),
            "; grep -c 0123456789abcdef /tmp/logs/e$i.out",
        )?;
        // The reference tells of an exit before the output has been copied, and ends a log program
        // when the process is deleted.
        if runtime == FERRY {
            assert_eq!((file, program), (execs(), execs()));
        }
        through_terminals.push((runtime, terminal));
        remove(host, "t")?;
        host.run("rm -r /tmp/logs; mkdir /tmp/logs")?;
        assert_nothing_left(host)?;
    }
    // At the exit ctr leaves what it has not read of a FIFO, if its own terminal is slow: of either shim.
    let count = |wanted: &str| {
        through_terminals.iter().find(|(runtime, _)| *runtime == wanted).map_or(0, |found| found.1)
    };
    let least = RUNTIMES.map(count).into_iter().max().unwrap_or_default().min(execs() * 8 / 10);
    ensure!(count(FERRY) + 1 >= least, "{through_terminals:?} of {}", execs());
    Ok(())
}

#[test]
fn a_log_program_is_given_both_streams_and_told_whose_they_are() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    let lines = "sh -c 'for i in $(seq 5000); do echo line $i; done; echo error >&2'";
    let uri = "--log-uri binary:///usr/local/bin/logger?dir=/tmp/logs";
    let read =
        |name: &str| Ok::<_, anyhow::Error>(host.run(&format!("cat /tmp/logs/{name}"))?.stdout);
    for runtime in RUNTIMES {
        start(host, runtime, uri, "t", lines)?;
        wait_for_status(host, "t", "STOPPED")?;
        remove(host, "t")?;
        until("the log is complete", || Ok(read("t.out")?.lines().count() == 5000))?;
        assert_eq!(read("t.err")?, "error\n", "{runtime}");
        // The reference ends it by a signal.
        if runtime == FERRY {
            assert_eq!(read("t.end")?, "default t dir /tmp/logs\n");
        }
        host.run("rm /tmp/logs/*")?;
        assert_nothing_left(host)?;

        let missing = host.output(&format!(
            "ctr run -d --runtime {runtime} --log-uri binary:///no/logger {BUSYBOX} m {IDLE}"
        ))?;
        ensure!(!missing.status.success(), "{runtime}: runs without its logger");
        assert!(missing.stderr.contains("/no/logger"), "{runtime}: {missing}");
        host.run("ctr container rm m")?;
        assert_nothing_left(host)?;
    }
    // The reference starts the container, whose first output ends it.
    let early = "#!/bin/sh\necho no disk >&2\nexit 3\n";
    std::fs::write(host.root().join("usr/local/bin/early"), early)?;
    let failed = host.output(&format!(
        "chmod +x /usr/local/bin/early; ctr run -d --runtime {FERRY} \
         --log-uri binary:///usr/local/bin/early {BUSYBOX} m {IDLE}"
    ))?;
    ensure!(!failed.status.success(), "runs with a logger that has ended");
    assert!(failed.stderr.contains("no disk"), "{failed}");
    host.run("ctr container rm m")?;
    assert_nothing_left(host)
}

#[test]
fn a_log_program_that_never_ends_does_not_hold_up_a_delete_for_long() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    let stubborn = "#!/bin/sh\ntrap '' TERM\nexec 5>&-\nwhile :; do /bin/sleep 1; done\n";
    std::fs::write(host.root().join("usr/local/bin/logger"), stubborn)?;
    for runtime in RUNTIMES {
        let uri = "--log-uri binary:///usr/local/bin/logger";
        start(host, runtime, uri, "t", "sh -c 'echo line; exit 3'")?;
        wait_for_status(host, "t", "STOPPED")?;
        remove(host, "t")?;
        assert_nothing_left(host)?;
    }
    Ok(())
}

/// The numbers in lines; the first and the last line may be cut, and are left out.
fn numbers(text: &str) -> Vec<u64> {
    let lines: Vec<_> = text.split('\n').collect();
    let whole = lines.get(1..lines.len().saturating_sub(1)).unwrap_or_default();
    whole.iter().filter_map(|line| line.trim().parse().ok()).collect()
}

#[test]
fn output_goes_on_while_containerd_restarts() -> Result<()> {
    let lab = lab()?;
    let host = lab.host("a");
    let count = "sh -c 'n=0; while :; do n=$((n+1)); echo $n; usleep 5000; done'";
    let pid = |host: &Host| Ok::<_, anyhow::Error>(host.output("pgrep -x containerd")?.stdout);
    for runtime in RUNTIMES {
        start(host, runtime, "--log-uri file:///tmp/logs/f", "f", count)?;
        start(host, runtime, "--log-uri binary:///usr/local/bin/logger?d=/tmp/logs", "b", count)?;
        start(host, runtime, "", "p", count)?;
        // Its client has gone: a reader of our own takes its place.
        host.run("ls /run/containerd/fifo/*/p-stdout")?;
        let reader = host.spawn("exec cat /run/containerd/fifo/*/p-stdout")?;
        let before = pid(host)?;
        host.run(&format!("kill -9 {before}"))?;
        until("containerd is back", || {
            let now = pid(host)?;
            Ok(!now.is_empty() && now != before && host.output("ctr version")?.status.success())
        })?;
        let read = |path: &str| Ok::<_, anyhow::Error>(host.run(&format!("cat {path}"))?.stdout);
        let lines = || -> Result<[usize; 3]> {
            let texts = [read("/tmp/logs/f")?, read("/tmp/logs/b.out")?, reader.stdout()];
            let all = texts.map(|text| numbers(&text));
            for (of, seen) in ["file", "log program", "FIFO"].iter().zip(&all) {
                let gap = seen.windows(2).find(|pair| pair[1] != pair[0] + 1);
                ensure!(gap.is_none(), "{runtime}: {of}: {gap:?}");
            }
            Ok(all.map(|seen| seen.len()))
        };
        let first = lines()?;
        until("all output goes on", || {
            let now = lines()?;
            Ok(now.iter().zip(first).all(|(now, first)| *now > first + 100))
        })?;
        for id in ["f", "b", "p"] {
            assert_eq!(status(host, id)?, "RUNNING", "{runtime}");
            remove(host, id)?;
        }
        drop(reader);
        host.run("rm -r /tmp/logs /run/containerd/fifo/*; mkdir /tmp/logs")?;
        assert_nothing_left(host)?;
    }
    Ok(())
}

#[test]
fn a_container_with_a_terminal_is_restored_into_a_new_one() -> Result<()> {
    if !can_checkpoint()? {
        skip("this crun has no checkpoint");
        return Ok(());
    }
    let lab = lab()?;
    let host = lab.host("a");
    for runtime in RUNTIMES {
        let run = format!("ctr run -t --runtime {runtime} {BUSYBOX} t sh");
        let set = r##"[["wait", "# "], ["type", "word=ke\"\"pt; echo re\"\"ady\n"], ["wait", "ready"],
                      ["kill"]]"##;
        tty(host, set, &run)?;
        host.run("ctr container checkpoint --task --rw --image t image")?;
        remove(host, "t")?;
        let ask = r#"[["type", "echo $word; exit 5\n"], ["wait", "kept"]]"#;
        let restored = tty(host, ask, "ctr container restore --live --rw t image")?;
        assert_eq!(restored.status.code(), Some(5), "{runtime}: {restored}");
        host.output("ctr task rm -f t; ctr container rm t")?;
        host.run("ctr image rm --sync image")?;
        assert_nothing_left(host)?;
    }
    Ok(())
}
