//! How a container is set up: runtime options, root file systems, user namespaces, hooks, and what is
//! said when it fails. The same steps with ferry and with the reference.
//!
//! `ctr` sends runc's options to nothing but `io.containerd.runc.v2`. So one host has the reference
//! under that name, and another one ferry, as whoever installs it as a drop-in.

use anyhow::{Context, Result, ensure};
use ferry_tests::ctr::{self, BUSYBOX, FERRY, IDLE, assert_nothing_left};
use ferry_tests::versions::{Containerd, chosen, task_hosts};
use ferry_tests::{Host, Lab};
use serde_json::{Value, json};

/// Hosts with the reference, a, and with ferry in its place, b.
fn hosts() -> Result<Lab> {
    let lab = task_hosts(2, &[])?;
    lab.host("b").run("ln -s containerd-shim-ferry-v2 /usr/local/bin/containerd-shim-runc-v2")?;
    Ok(lab)
}

fn remove(host: &Host, id: &str) -> Result<()> {
    ctr::remove(host, id)?;
    assert_nothing_left(host)
}

/// What `script` says on standard error when it fails.
fn refusal(host: &Host, script: &str) -> Result<String> {
    let refused = host.output(script)?;
    ensure!(!refused.status.success(), "{script} is accepted: {refused}");
    Ok(refused.stderr)
}

/// A runtime that writes its arguments to /tmp/arguments.
const SPY: &str = r#"#!/bin/sh
echo "$@" >>/tmp/arguments
exec runc "$@"
"#;

fn install_spy(host: &Host) -> Result<()> {
    std::fs::write(host.root().join("usr/local/bin/spy"), SPY).context("install the spy")?;
    host.run("chmod 755 /usr/local/bin/spy").map(drop)
}

#[test]
fn runtime_options_reach_the_runtime() -> Result<()> {
    let lab = hosts()?;
    // Options of a task take the place of the container's: what 1.7's ctr asks with --no-pivot.
    let no_pivot = if chosen()?.0 == Containerd::V1_7 { "" } else { "--no-pivot" };
    for host in lab.hosts() {
        install_spy(host)?;
        for binary in ["spy", "/usr/local/bin/spy"] {
            let run =
                format!("ctr run --rm --runc-binary {binary} --runc-root /run/other {no_pivot}");
            let run = format!("rm -f /tmp/arguments; {run} {BUSYBOX} t echo hi");
            assert_eq!(host.run(&run)?.stdout, "hi\n");
            let arguments = host.run("cat /tmp/arguments")?.stdout;
            let lines: Vec<_> = arguments.lines().collect();
            assert!(lines.iter().all(|l| l.contains("--root /run/other/default ")), "{arguments}");
            let of = |verb: &str| lines.iter().find(|line| line.contains(verb));
            assert!(of(" create ").is_some_and(|l| l.contains(no_pivot)), "{arguments}");
            assert!(of(" delete ").is_some(), "{arguments}");
        }
        // There is no systemd here: that it is asked for is all that can be seen.
        let systemd = "--runc-systemd-cgroup --cgroup machine.slice:ferry:t --runc-binary spy";
        host.run("rm -f /tmp/arguments")?;
        host.output(&format!("ctr run --rm {systemd} {BUSYBOX} t true; ctr container rm t"))?;
        let arguments = host.run("cat /tmp/arguments")?.stdout;
        assert!(arguments.contains("--systemd-cgroup create"), "{arguments}");
        assert_nothing_left(host)?;

        for missing in ["no-such-runtime", "/no/such/runtime"] {
            let run = format!("ctr run --rm --runc-binary {missing} {BUSYBOX} t true");
            let said = refusal(host, &run)?;
            assert!(said.contains(missing), "{said}");
            assert_nothing_left(host)?;
        }
    }
    Ok(())
}

#[test]
fn options_for_any_runtime_are_those_of_runc() -> Result<()> {
    let lab = hosts()?;
    let host = lab.host("b");
    install_spy(host)?;
    // Not with the reference: containerd sends these only to runtimes of other names.
    let run = format!("ctr run --rm --runtime {FERRY} --runtime-config-path /tmp/options.toml");
    host.run("echo 'BinaryName = \"spy\"\nNoPivotRoot = true' >/tmp/options.toml")?;
    assert_eq!(host.run(&format!("{run} {BUSYBOX} t echo hi"))?.stdout, "hi\n");
    let arguments = host.run("cat /tmp/arguments")?.stdout;
    assert!(arguments.contains("--no-pivot"), "{arguments}");
    host.run("echo 'SystemdCgroup = 7' >/tmp/options.toml")?;
    let said = refusal(host, &format!("{run} {BUSYBOX} t true"))?;
    assert!(said.contains("SystemdCgroup"), "{said}");
    assert_nothing_left(host)
}

#[test]
fn what_fails_says_why_in_the_same_words() -> Result<()> {
    let lab = hosts()?;
    for host in lab.hosts() {
        let run = format!("ctr run --rm {BUSYBOX} t");
        let said = refusal(host, &format!("{run} no-such-program"))?;
        assert!(said.contains("OCI runtime create failed: "), "{said}");
        // Each runtime has words of its own for it.
        assert!(said.contains("no-such-program") && said.contains("not found"), "{said}");
        host.output("ctr container rm t")?;
        let said = refusal(host, &format!("ctr run --rm --cwd /etc/passwd {BUSYBOX} t true"))?;
        assert!(said.contains("OCI runtime create failed: "), "{said}");
        host.output("ctr container rm t")?;
        host.run(&format!("ctr run -d {BUSYBOX} t {IDLE}"))?;
        let said = refusal(host, "ctr task exec --exec-id e t no-such-program")?;
        assert!(said.contains("OCI runtime exec failed: "), "{said}");
        // Each runtime has words of its own for it.
        assert!(said.contains("no-such-program") && said.contains("not found"), "{said}");
        // The id is free again.
        host.run("ctr task exec --exec-id e t true")?;
        assert!(refusal(host, "ctr task kill unknown")?.contains("not found"));
        assert!(refusal(host, "ctr task kill --exec-id unknown t")?.contains("not found"));
        remove(host, "t")?;
    }
    Ok(())
}

#[test]
fn user_namespaces_shift_owners() -> Result<()> {
    let lab = hosts()?;
    let maps = "--uidmap 0:100000:65536 --gidmap 0:200000:65536";
    for host in lab.hosts() {
        // Copied layers with other owners, and mounts that shift them.
        for how in ["", "--remap-labels"] {
            let script = "sh -c 'id -u; id -g; stat -c %u:%g /bin/busybox; echo >/new; \
                          echo err >/dev/stderr; cat /proc/self/uid_map'";
            let run = format!("ctr run --rm {maps} {how} {BUSYBOX} t {script}");
            let output = host.run(&run).context(how)?;
            let lines: Vec<_> = output.stdout.lines().collect();
            assert_eq!(lines[..3], ["0", "0", "0:0"], "{how}: {output}");
            let map: Vec<_> = lines[3].split_whitespace().collect();
            assert_eq!(map, ["0", "100000", "65536"], "{how}");
            assert!(output.stderr.contains("err"), "{how}: {output}");
            assert_nothing_left(host)?;
        }
    }
    Ok(())
}

/// The default spec with `change` made, whose root file system is that of busybox.
fn spec(host: &Host, change: impl FnOnce(&mut Value)) -> Result<()> {
    let root = "/var/tmp/rootfs";
    if !host.root().join(&root[1..]).exists() {
        host.run(&format!("mkdir {root} && ctr image mount --rw {BUSYBOX} {root}"))?;
    }
    let mut spec: Value = serde_json::from_str(&host.run("ctr oci spec")?.stdout)?;
    spec["root"] = json!({ "path": root });
    spec["process"]["args"] = json!(["/bin/sh", "-c", "echo runs >>/trace"]);
    change(&mut spec);
    std::fs::write(host.root().join("tmp/config.json"), spec.to_string()).context("write a spec")
}

#[test]
fn hooks_run_in_their_order() -> Result<()> {
    let lab = hosts()?;
    for host in lab.hosts() {
        let hook = |name: &str| {
            let script = format!("echo {name} >>/tmp/trace; cat >/tmp/state");
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
        };
        let names = ["createRuntime", "poststart", "poststop"];
        spec(host, |spec| {
            spec["process"]["args"] = json!(["/bin/true"]);
            spec["hooks"] = names.iter().map(|name| (name.to_string(), hook(name))).collect();
        })?;
        host.run("ctr run --rm --config /tmp/config.json t")?;
        let trace = host.run("cat /tmp/trace")?.stdout;
        assert_eq!(trace.lines().collect::<Vec<_>>(), names);
        let state: Value = serde_json::from_str(&host.run("cat /tmp/state")?.stdout)?;
        assert_eq!((state["id"].as_str(), state["status"].as_str()), (Some("t"), Some("stopped")));

        spec(host, |spec| {
            let fail = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; exit 7"] }]);
            spec["hooks"] = json!({ "createRuntime": fail });
        })?;
        let said = refusal(host, "ctr run --rm --config /tmp/config.json t")?;
        assert!(said.contains("hook") && said.contains('7'), "{said}");
        host.output("ctr container rm t")?;
        assert_nothing_left(host)?;
    }
    Ok(())
}

#[test]
fn a_root_file_system_of_ones_own_is_used_and_stays() -> Result<()> {
    let lab = hosts()?;
    for host in lab.hosts() {
        spec(host, |_| {})?;
        host.run("ctr run --rm --config /tmp/config.json t")?;
        host.run("ctr run --rm --rootfs /var/tmp/rootfs t /bin/sh -c 'echo again >>/trace'")?;
        assert_eq!(host.run("cat /var/tmp/rootfs/trace")?.stdout, "runs\nagain\n");
        assert_nothing_left(host)?;
    }
    Ok(())
}
