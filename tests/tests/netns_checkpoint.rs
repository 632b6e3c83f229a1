//! Checkpoints of a container in a network namespace that is given by path, whose clients are outside: its
//! addresses, and the lock on its connections, are in there and not on the host.

use anyhow::{Context, Result, ensure};
use ferry_tests::counter::Counter;
use ferry_tests::ctr::{FERRY, IDLE, start, until, wait_for_status};
use ferry_tests::scene::{FLOATING, RUNTIME, task_state, traces, wait_for_traces};
use ferry_tests::tally::{end, refused};
use ferry_tests::{Host, Scene};

/// The address of the container, in the namespace alone.
const ADDRESS: &str = "10.99.0.5";

/// Makes the namespace `x`, to which the host has a way.
fn make(host: &Host) -> Result<()> {
    host.run(&format!(
        "ip netns add x; ip -n x link set lo up; ip link add v0 type veth peer name v1 netns x; \
         ip addr add 10.99.0.1/24 dev v0; ip link set v0 up; \
         ip -n x link set v1 up; ip -n x addr add {ADDRESS}/24 dev v1"
    ))?;
    Ok(())
}

/// Starts redis in there.
fn start_redis(host: &Host) -> Result<()> {
    host.run(&format!(
        "ctr run -d --null-io --with-ns network:/run/netns/x --runtime {RUNTIME} \
         docker.io/library/redis:latest redis redis-server --protected-mode no --save ''"
    ))?;
    host.wait_until("redis answers", |h| {
        h.output(&format!("redis-cli -h {ADDRESS} ping")).is_ok_and(|o| o.stdout.contains("PONG"))
    })
}

/// The id of the lock in the namespace `x`, if there is one.
fn lock(host: &Host) -> Result<Option<String>> {
    let tables = host.run("ip netns exec x nft list tables")?.stdout;
    let mut ids =
        tables.lines().filter_map(|line| line.strip_prefix("table inet ferry_checkpoint_"));
    Ok(ids.next().map(|id| id.trim().to_owned()))
}

/// What `ferry doctor` says; whether there are warnings is no matter.
fn doctor(host: &Host, container: &str) -> Result<String> {
    Ok(host.run(&format!("ferry doctor {container} || true"))?.stdout)
}

/// Ends redis with the checkpoint `name`, and removes what is left of the container.
fn checkpoint(host: &Host, name: &str) -> Result<String> {
    host.run(&format!("ferry checkpoint redis {name} --exit"))?;
    wait_for_status(host, "redis", "STOPPED")?;
    host.run("ctr task rm redis; ctr container rm redis")?;
    ensure!(host.run("nft list tables")?.stdout.is_empty(), "the host's network is locked");
    let id = lock(host)?.context("nothing is locked in the namespace")?;
    let told = doctor(host, "")?;
    let wanted = format!("1 connections of checkpoint {id} in the network namespace /run/netns/x");
    ensure!(told.contains(&wanted), "no {wanted:?}: {told}");
    Ok(id)
}

#[test]
fn a_container_comes_back_into_its_namespace_with_its_clients_after_its_record_is_gone()
-> Result<()> {
    let scene = Scene::start()?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    make(a)?;
    start_redis(a)?;
    let mut client = Counter::start_at(a, ADDRESS, 6379, "INCR counter")?;
    let id = checkpoint(a, "snap")?;

    // What would bring the address to the host, or restore without it, changes nothing.
    let before = traces(a)?;
    let with_ip = format!("ferry restore snap --allow namespaces --ip {FLOATING}/24");
    let refusal = refused(a, &with_ip)?;
    ensure!(refusal.contains("leave --ip out"), "{refusal}");
    wait_for_traces(a, &before, "--ip was refused")?;
    a.run(&format!("ip -n x addr del {ADDRESS}/24 dev v1"))?;
    let refusal = refused(a, "ferry restore snap --allow namespaces")?;
    let cure = format!("nsenter --net=/run/netns/x ip addr add {ADDRESS}/PREFIX");
    ensure!(refusal.contains(&cure), "{refusal}");
    wait_for_traces(a, &before, "a restore without the address was refused")?;
    ensure!(lock(a)?.as_ref() == Some(&id), "the lock has changed");
    a.run(&format!("ip -n x addr add {ADDRESS}/24 dev v1"))?;

    a.run("ferry restore snap --allow namespaces")?;
    client.goes_on().context("after a restore")?;
    ensure!(lock(a)?.is_none(), "something is locked");

    // Another host has to have the same.
    a.run(&format!("ferry push snap --to ssh://root@{}", b.address()))?;
    let refusal = refused(b, "ferry restore snap")?;
    ensure!(refusal.contains("--allow namespaces"), "{refusal}");
    let refusal = refused(b, "ferry restore snap --allow namespaces")?;
    ensure!(refusal.contains("/run/netns/x is not here: make it"), "{refusal}");
    b.run(
        "ip netns add x; ip -n x link set lo up; ip -n x link add v0 type veth peer name v1; \
         ip -n x link set v0 up; ip -n x link set v1 up",
    )?;
    let refusal = refused(b, "ferry restore snap --allow namespaces")?;
    ensure!(refusal.contains(&cure), "{refusal}");
    b.run(&format!("ip -n x addr add {ADDRESS}/24 dev v0"))?;
    b.run("ferry restore snap --allow namespaces")?;
    ensure!(task_state(b, "redis")?.as_deref() == Some("RUNNING"), "it does not run on b");
    let connections = b.run("ip netns exec x ss -Htn state established")?.stdout;
    ensure!(connections.contains(&format!("{ADDRESS}:6379")), "{connections}");
    end(b, "redis")?;

    a.run("ferry discard snap")?;
    client.goes_on().context("after the checkpoint was discarded")?;
    client.stop()
}

#[test]
fn a_lock_in_a_namespace_is_found_by_its_id_and_given_up() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    make(host)?;
    start_redis(host)?;
    let mut client = Counter::start_at(host, ADDRESS, 6379, "INCR counter")?;
    // What cannot be entered is in nobody's way.
    host.run("touch /run/netns/left")?;
    let id = checkpoint(host, "snap")?;
    ensure!(!client.has_ended()?, "the client was not kept: {}", client.stderr());
    host.run(&format!("ferry discard {id}"))?;
    ensure!(lock(host)?.is_none(), "it is still locked");
    // Now the kernel answers for a connection that nobody has.
    until("the client has ended", || client.has_ended())?;
    ensure!(!doctor(host, "")?.contains(&id), "it is still told");
    let refusal = refused(host, &format!("ferry discard {id}"))?;
    ensure!(refusal.contains("there is no lock"), "{refusal}");
    // By the checkpoint's name as well, whose lock has gone already.
    host.run("ferry discard snap").map(drop)
}

#[test]
fn a_lock_in_a_namespace_without_a_name_is_told_with_the_container_that_is_in_it() -> Result<()> {
    let scene = Scene::start()?;
    let host = scene.host("a");
    // The same namespace under a path where names are not looked for.
    make(host)?;
    host.run(
        "touch /root/x; mount --bind /run/netns/x /root/x; umount /run/netns/x; rm /run/netns/x; \
         nsenter --net=/root/x nft add table inet ferry_checkpoint_0123456789abcdef",
    )?;
    start(host, FERRY, "--null-io --with-ns network:/root/x", "t", IDLE)?;
    let id = "0123456789abcdef";
    ensure!(!doctor(host, "")?.contains(id), "a namespace without a name was looked into");
    let told = doctor(host, "t")?;
    let wanted = format!("the lock of checkpoint {id} in the network namespace /proc/");
    ensure!(told.contains(&wanted), "no {wanted:?}: {told}");
    end(host, "t")
}
