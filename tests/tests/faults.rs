//! Whatever is killed, and whenever: one container, its client served, nothing left behind.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_cli::phase::Phase;
use ferry_tests::faults::{Bed, is_served, kill_ferry};
use ferry_tests::scene::{
    FLOATING, Scene, finish_client, go_on, stop_at, task_state, traces, wait_for_traces,
    wait_for_traces_but_pages,
};

/// How long clients may wait for a container that is brought back.
const SOON: Duration = Duration::from_secs(10);

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Driver,
    Agent,
}

/// Where the container is afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// On the source, by itself.
    OnSource,
    /// On the destination, by itself.
    OnDestination,
    /// In doubt; the same command again brings it back to the source.
    SettledOnSource,
    /// On the destination; the same command again removes what is left on the source.
    SettledOnDestination,
}

/// What must come of killing `victim` at the start of `phase`. A phase that is added has to be
/// added here, or this does not build.
fn expected(phase: Phase, victim: Victim) -> Option<Ends> {
    Some(match (phase, victim) {
        // There is no agent yet.
        (Phase::Connect, Victim::Agent) => return None,
        (
            Phase::Connect
            | Phase::Plan
            | Phase::Image
            | Phase::Container
            | Phase::Layer
            | Phase::Precopy
            | Phase::Address
            | Phase::Hold
            | Phase::Freeze
            | Phase::Dump
            | Phase::Transfer
            | Phase::Restore
            | Phase::Commit,
            _,
        ) => Ends::OnSource,
        // Decided on the source, never heard of on the destination.
        (Phase::Release, Victim::Driver) => Ends::SettledOnSource,
        (Phase::Release, Victim::Agent) => Ends::OnSource,
        (Phase::Retire | Phase::Finish, Victim::Driver) => Ends::SettledOnDestination,
        (Phase::Retire | Phase::Finish, Victim::Agent) => Ends::OnDestination,
    })
}

fn kill_everywhere(victim: Victim) -> Result<()> {
    let mut bed = Bed::start()?;
    let points = Phase::ALL.map(|phase| (phase, phase.name()));
    // And between two phases: the clients have been led away, and it still runs.
    for (phase, point) in points.into_iter().chain([(Phase::Freeze, "announced")]) {
        let Some(ends) = expected(phase, victim) else { continue };
        let when = format!("{victim:?} killed at {point}");
        let job = bed.stop_at(point, "").with_context(|| when.clone())?;
        let killed = Instant::now();
        let output = match victim {
            Victim::Driver => {
                kill_ferry(bed.source())?;
                job.wait(Duration::from_secs(60))
            }
            Victim::Agent => {
                kill_ferry(bed.destination())?;
                bed.go_on(job)
            }
        };
        let output = output.with_context(|| when.clone())?;
        if matches!(ends, Ends::OnSource) {
            // Whoever asks during it is answered: what waited was dropped, and comes again.
            is_served(&bed.scene, SOON).with_context(|| when.clone())?;
            ensure!(killed.elapsed() < SOON, "{when}: served after {:?}", killed.elapsed());
        }
        if victim == Victim::Agent {
            assert_eq!(output.status.success(), ends == Ends::OnDestination, "{when}: {output}");
        }
        if matches!(ends, Ends::SettledOnSource | Ends::SettledOnDestination) {
            let again = bed.again()?;
            let moved = ends == Ends::SettledOnDestination;
            assert_eq!(again.status.success(), moved, "{when}: {again}");
        }
        if matches!(ends, Ends::OnDestination | Ends::SettledOnDestination) {
            bed.has_moved();
        }
        bed.is_whole(&when)?;
    }
    bed.end_client()?;
    Ok(())
}

#[test]
fn a_driver_killed_in_any_phase_leaves_one_container_and_nothing_else() -> Result<()> {
    kill_everywhere(Victim::Driver)
}

#[test]
fn an_agent_killed_in_any_phase_leaves_one_container_and_nothing_else() -> Result<()> {
    kill_everywhere(Victim::Agent)
}

#[test]
fn a_driver_killed_again_while_it_settles_changes_nothing_of_the_decision() -> Result<()> {
    let mut bed = Bed::start()?;
    // Released there, and nothing done about it here; then killed twice more on the way.
    for phase in [Phase::Retire, Phase::Retire, Phase::Finish] {
        let job = bed.stop_at(phase.name(), "")?;
        kill_ferry(bed.source())?;
        job.wait(Duration::from_secs(20))?;
        go_on(bed.source())?;
        is_served(&bed.scene, SOON)?;
        assert_eq!(task_state(bed.destination(), "redis")?.as_deref(), Some("RUNNING"));
    }
    // It may go home before anybody has settled: what is left of the earlier move is none of it.
    bed.scene.migrate("redis", bed.there, bed.here)?;
    bed.again()?.checked("settle")?;
    bed.is_whole("settled late")?;
    bed.end_client().map(drop)
}

#[test]
fn an_operator_can_decide_for_a_destination_that_cannot_be_asked() -> Result<()> {
    let scene = Scene::start()?;
    let a = scene.host("a");
    scene.start_redis("a", 0)?;
    let empty = traces(scene.host("b"))?;
    let ip = format!("--ip {FLOATING}/24");
    for (decision, state) in [("--thaw", Some("RUNNING")), ("--end", None)] {
        // Committed here, never heard of there.
        let job = stop_at(&scene, "redis", Phase::Release.name(), ("a", "b"), &ip)?;
        kill_ferry(a)?;
        job.wait(Duration::from_secs(20))?;
        go_on(a)?;
        ensure!(a.run("ferry status")?.stdout.contains("default/redis"));
        a.run(&format!("ferry recover redis {decision}"))?;
        assert_eq!(task_state(a, "redis")?.as_deref(), state, "{decision}");
        assert_eq!(a.run("ferry status; nft list ruleset")?.stdout, "", "{decision}");
        wait_for_traces_but_pages(scene.host("b"), &empty, decision)?;
    }
    ensure!(!a.output("ferry recover redis --thaw")?.status.success(), "nothing is frozen");
    Ok(())
}

#[test]
fn a_container_is_served_whose_agent_died_before_it_opened_the_address() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 1000)?;
    let (a, b) = (scene.host("a"), scene.host("b"));
    let client = scene.start_client(5)?;
    let ip = format!("--ip {FLOATING}/24");
    let job = stop_at(&scene, "redis", Phase::Release.name(), ("a", "b"), &ip)?;
    ensure!(b.run("nft list ruleset")?.stdout.contains("ferry-"), "nothing keeps it silent");
    // The release takes until CRIU goes on; meanwhile the agent is lost, and the driver, so that
    // nobody asks another one.
    b.run("pkill -STOP -x criu")?;
    go_on(a)?;
    b.wait_until("it was decided", |h| {
        h.output("ls /run/ferry/records/*.decided").is_ok_and(|o| o.status.success())
    })?;
    kill_ferry(a)?;
    kill_ferry(b)?;
    b.run("pkill -CONT -x criu")?;
    job.wait(Duration::from_secs(20))?;
    is_served(&scene, SOON)?;
    assert_eq!(task_state(b, "redis")?.as_deref(), Some("RUNNING"));
    assert_eq!(b.run("nft list ruleset")?.stdout, "");
    finish_client(client)?;
    scene.try_migrate("redis", "a", "b", &ip)?.checked("settle")?;
    is_served(&scene, SOON).map(drop)
}

/// A migration that a broken destination makes fail; the container must not notice.
fn fails_cleanly(
    scene: &Scene,
    breaks: &str,
    more: &str,
    expected: &[&str],
    mends: &str,
) -> Result<()> {
    let (a, b) = (scene.host("a"), scene.host("b"));
    let before = traces(a)?;
    b.run(breaks)?;
    let broken = traces(b)?;
    let client = scene.start_client(5)?;
    let output = scene.try_migrate("redis", "a", "b", more)?;
    ensure!(!output.status.success(), "the migration went through: {output}");
    for text in expected {
        ensure!(output.stderr.contains(text), "no {text:?} in: {output}");
    }
    finish_client(client).with_context(|| breaks.to_owned())?;
    wait_for_traces(a, &before, breaks)?;
    wait_for_traces_but_pages(b, &broken, breaks)?;
    b.run(mends)?;
    Ok(())
}

#[test]
fn a_destination_that_refuses_leaves_the_container_where_it_was() -> Result<()> {
    let scene = Scene::start()?;
    scene.start_redis("a", 1000)?;
    let ip = format!("--ip {FLOATING}/24");
    let runs = "redis runs on a";
    let content = "/var/lib/containerd/io.containerd.content.v1.content/ingest";
    // Its image is not there, and there is no room for it.
    fails_cleanly(
        &scene,
        &format!(
            "ctr images rm --sync docker.io/library/redis:latest >/dev/null; mkdir -p {content}; \
             mount -t tmpfs -o size=256k tmpfs {content}"
        ),
        &ip,
        &["image:", "no space left", runs],
        &format!("umount {content}"),
    )?;
    // criu says its version and fails to restore.
    fails_cleanly(
        &scene,
        "mv /usr/sbin/criu /usr/sbin/criu.real; printf '#!/bin/sh\\ncase \"$1\" in \
         --version) exec /usr/sbin/criu.real --version;; esac\\nexit 1\\n' >/usr/sbin/criu; \
         chmod +x /usr/sbin/criu",
        &ip,
        &["restore failed:", runs],
        "mv -f /usr/sbin/criu.real /usr/sbin/criu",
    )?;
    // It has the address already.
    fails_cleanly(
        &scene,
        &format!("ip addr add {FLOATING}/32 dev lo"),
        &ip,
        &["address-taken"],
        &format!("ip addr del {FLOATING}/32 dev lo"),
    )?;
    // And with everything mended it goes.
    scene.migrate("redis", "a", "b")?;
    Ok(())
}
