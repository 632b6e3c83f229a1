//! A moved IPv6 address: what ARP does for IPv4, neighbour discovery does here.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::scene::{
    FLOATING_6, finish_client, go_on, migrate_command, stop_at, task_state, traces,
    wait_for_traces, wait_for_traces_but_pages,
};
use ferry_tests::{Host, Job, Scene, skip};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

fn ip() -> String {
    format!("--ip {FLOATING_6}/64")
}

/// Two hosts with a redis on `a` that has the IPv6 address; none where the kernel has no IPv6.
fn start(keys: u32, lifetime: &str) -> Result<Option<Scene>> {
    let scene = Scene::start()?;
    if !scene.host("a").output("test -d /proc/sys/net/ipv6")?.status.success() {
        skip("the kernel has no IPv6");
        return Ok(None);
    }
    scene.start_redis_at("a", keys, &format!("{FLOATING_6}/64 dev eth0 nodad {lifetime}"))?;
    Ok(Some(scene))
}

fn migrate(scene: &Scene, from: &str, to: &str) -> Result<Value> {
    let output = scene.try_migrate("redis", from, to, &format!("{} --json", ip()))?;
    let output = output.checked("ferry migrate")?;
    serde_json::from_str(&output.stdout).with_context(|| format!("decode {}", output.stdout))
}

fn start_client(scene: &Scene, connections: u32) -> Result<Job> {
    scene.start_client_at(&format!("[{FLOATING_6}]"), connections)
}

fn mac(host: &Host) -> Result<String> {
    Ok(host.run("cat /sys/class/net/eth0/address")?.stdout.trim().to_owned())
}

/// What the client sees of `filter`, one packet per line, until it is stopped.
fn capture(scene: &Scene, filter: &str) -> Result<Job> {
    let command = format!("exec tcpdump -lnevvi eth0 '{filter}'");
    let mut job = scene.lab.client().spawn(&command)?;
    // Written to its error output, which is waited for too.
    job.wait_for("listening on", SOON)?;
    Ok(job)
}

/// Neighbor Advertisements.
const ADVERTISEMENTS: &str = "icmp6 and ip6[40] == 136";
/// TCP resets over IPv6.
const RESETS: &str = "ip6[6] == 6 and ip6[53] & 4 != 0";

/// Ends a capture of [`RESETS`].
fn no_connection_was_reset(scene: &Scene, mut resets: Job) -> Result<()> {
    // One that is wanted: nobody listens there. The capture sees it, and must see no other.
    let refused = format!("{FLOATING_6}.9 >");
    scene.lab.client().output(&format!("bash -c 'exec 3<>/dev/tcp/{FLOATING_6}/9'"))?;
    resets.wait_for(&refused, SOON)?;
    let seen = resets.stop()?.stdout;
    ensure!(seen.lines().filter(|l| l.contains("Flags [")).all(|l| l.contains(&refused)), "{seen}");
    Ok(())
}

/// Whether `mac` has announced the address to all nodes, as it must be done.
fn announced(seen: &str, mac: &str) -> bool {
    // tcpdump breaks a packet into lines of which only the first begins without a blank.
    let text = seen.replace("\n\t", " ");
    text.lines().any(|line| {
        [mac, "> 33:33:00:00:00:01", "hlim 255", "> ff02::1", "sum ok", "Flags [override]"]
            .into_iter()
            .chain([&*format!("tgt is {FLOATING_6}"), &*format!("(1): {mac}")])
            .all(|part| line.contains(part))
    })
}

#[test]
fn redis_crosses_there_and_back_by_its_ipv6_address_under_load() -> Result<()> {
    let Some(scene) = start(50_000, "")? else { return Ok(()) };
    let with_redis = traces(scene.host("a"))?;
    let without = traces(scene.host("b"))?;
    let advertised = capture(&scene, ADVERTISEMENTS)?;
    let resets = capture(&scene, RESETS)?;
    let client = start_client(&scene, 20)?;
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b"), ("b", "a")] {
        let report = migrate(&scene, from, to)?;
        ensure!(report["warnings"].as_array().is_some_and(Vec::is_empty), "{report}");
        ensure!(report["happened"]["packets_queued"] == true, "{report}");
        assert_eq!(task_state(scene.host(to), "redis")?.as_deref(), Some("RUNNING"));
        let address = scene.host(to).run("ip -6 addr show dev eth0")?.stdout;
        let line = address.lines().find(|l| l.contains(FLOATING_6)).context("no address")?;
        ensure!(!line.contains("tentative") && !line.contains("deprecated"), "{address}");
        std::thread::sleep(Duration::from_millis(300));
    }
    let report = finish_client(client)?;
    ensure!(report["connections"] == 20, "{report}");
    no_connection_was_reset(&scene, resets)?;
    let seen = advertised.stop()?.stdout;
    for name in ["a", "b"] {
        let mac = mac(scene.host(name))?;
        ensure!(announced(&seen, &mac), "{name} ({mac}) has not announced itself in:\n{seen}");
    }
    wait_for_traces(scene.host("a"), &with_redis, "there and back twice")?;
    wait_for_traces(scene.host("b"), &without, "there and back twice")
}

#[test]
fn a_rollback_after_the_announcement_leads_the_clients_back() -> Result<()> {
    let Some(scene) = start(1000, "preferred_lft 0")? else { return Ok(()) };
    let (a, b) = (scene.host("a"), scene.host("b"));
    let empty = traces(b)?;
    migrate(&scene, "a", "b")?;
    migrate(&scene, "b", "a")?;
    let full = traces(a)?;
    let resets = capture(&scene, RESETS)?;
    let client = start_client(&scene, 10)?;
    for (phase, victim) in [("dump", a), ("commit", b)] {
        let when = format!("ferry on {} killed at {phase}", victim.name());
        let advertised = capture(&scene, ADVERTISEMENTS)?;
        let job = stop_at(&scene, "redis", phase, ("a", "b"), &ip())?;
        let way = scene.lab.client().run(&format!("ip -6 neigh show {FLOATING_6}"))?.stdout;
        ensure!(way.contains(&mac(b)?), "{when}: the clients were not led away: {way}");
        let rules = a.run("nft list ruleset")?.stdout;
        for rule in ["nd-neighbor-solicit", "nd-neighbor-advert", "ip6 daddr fd77::100 drop"] {
            ensure!(rules.contains(rule), "{when}: no {rule} in {rules}");
        }
        victim.run("pkill -9 -f '^ferry (agent|migrate)'")?;
        go_on(a)?;
        ensure!(!job.wait(SOON)?.status.success(), "{when}: it went through");
        let way = || scene.lab.client().run(&format!("ip -6 neigh show {FLOATING_6}"));
        a.wait_until("the clients are led back", |host| {
            way().is_ok_and(|seen| mac(host).is_ok_and(|mac| seen.stdout.contains(&mac)))
        })?;
        wait_for_traces(a, &full, &when)?;
        wait_for_traces_but_pages(b, &empty, &when)?;
        assert_eq!(task_state(a, "redis")?.as_deref(), Some("RUNNING"), "{when}");
        let seen = advertised.stop()?.stdout;
        for host in [a, b] {
            ensure!(announced(&seen, &mac(host)?), "{when}: no {} in:\n{seen}", host.name());
        }
    }
    finish_client(client)?;
    no_connection_was_reset(&scene, resets)?;
    // And then it goes.
    migrate(&scene, "a", "b")?;
    Ok(())
}

#[test]
fn an_address_whose_agent_was_lost_is_chosen_again_as_at_the_source() -> Result<()> {
    let Some(scene) = start(1000, "")? else { return Ok(()) };
    let (a, b) = (scene.host("a"), scene.host("b"));
    let job = stop_at(&scene, "redis", "release", ("a", "b"), &ip())?;
    let deprecated = |host: &Host| {
        let shown = host.output(&format!("ip -6 -o addr show to {FLOATING_6} deprecated"));
        shown.is_ok_and(|shown| !shown.stdout.is_empty())
    };
    ensure!(deprecated(b), "{} chooses it while it is silent", b.name());
    // The release takes until CRIU goes on; meanwhile the agent is lost, and another one is asked.
    b.run("pkill -STOP -x criu")?;
    go_on(a)?;
    b.wait_until("it was decided", |h| {
        h.output("ls /run/ferry/records/*.decided").is_ok_and(|o| o.status.success())
    })?;
    b.run("pkill -9 -f '^ferry agent'")?;
    b.run("pkill -CONT -x criu")?;
    job.wait(SOON)?.checked("ferry migrate")?;
    assert_eq!(task_state(b, "redis")?.as_deref(), Some("RUNNING"));
    ensure!(!deprecated(b), "{} does not choose it", b.name());
    Ok(())
}

#[test]
fn at_most_one_host_answers_neighbour_solicitations_at_any_time() -> Result<()> {
    let Some(scene) = start(0, "preferred_lft 0")? else { return Ok(()) };
    let (a, b) = (mac(scene.host("a"))?, mac(scene.host("b"))?);
    // Both have the address. In the pause, nobody must answer.
    for (phase, owner) in [("freeze", Some(&a)), ("restore", None), ("retire", Some(&b))] {
        let job = stop_at(&scene, "redis", phase, ("a", "b"), &ip())?;
        let seen = capture(&scene, ADVERTISEMENTS)?;
        scene.lab.client().output(&format!(
            "ip -6 neigh del {FLOATING_6} dev eth0; ping -6 -c 2 -W 1 {FLOATING_6}"
        ))?;
        let seen = seen.stop()?.stdout;
        for mac in [&a, &b] {
            // Only the first line of a packet names its sender.
            let answers =
                seen.lines().any(|l| l.contains(&format!("{mac} > ")) && l.contains(FLOATING_6));
            assert_eq!(answers, owner == Some(mac), "{phase}: {mac} in {seen}");
        }
        go_on(scene.host("a"))?;
        job.wait(SOON)?.checked("ferry migrate")?;
        if phase != "retire" {
            migrate(&scene, "b", "a")?;
        }
    }
    Ok(())
}

#[test]
fn an_address_that_cannot_move_is_refused_by_name() -> Result<()> {
    let Some(scene) = start(0, "")? else { return Ok(()) };
    let (a, b) = (scene.host("a"), scene.host("b"));
    let before = (traces(a)?, traces(b)?);
    let refused = |to: &str, more: &str, name: &str| -> Result<()> {
        let output = a.output(&format!("ferry migrate redis --to ssh://root@{to} {more}"))?;
        let told = format!("{}{}", output.stdout, output.stderr);
        ensure!(!output.status.success() && told.contains(name), "no {name:?} in {output}");
        assert_eq!((traces(a)?, traces(b)?), before, "{name}: something has changed");
        Ok(())
    };
    let v4 = b.address().to_string();
    refused(&v4, "--ip fe80::1/64", "link-local")?;
    refused(&v4, "--ip fe80::1%eth0/64", "without a zone")?;
    refused(&v4, "--ip ::ffff:10.77.0.100/120", "write 10.77.0.100")?;
    refused(&v4, &format!("--ip {FLOATING_6}"), "/64")?;
    refused(&v4, "--ip fd77::55/64", "address-missing")?;
    // Nobody there is in a network of this family.
    b.run("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1")?;
    refused(&v4, &ip(), "address-network")?;
    b.run("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0; ip addr add fd77::2/64 dev eth0 nodad")?;
    // Newest of a's addresses, it is what a's own connections come from.
    refused("[fd77::2]", &ip(), "address-own")?;
    a.run(&format!("ip addr change {FLOATING_6}/64 dev eth0 preferred_lft 0"))?;
    a.run(&migrate_command("redis", b, &ip()).replace(&v4, "[fd77::2]"))?;
    let answer = scene.lab.client().run(&format!("redis-cli -h {FLOATING_6} ping"))?.stdout;
    assert_eq!(answer.trim(), "PONG");
    Ok(())
}
