//! What must hold whatever was killed or cut in a migration: one container, its client served, and
//! nothing left behind.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::scene::{
    FLOATING, Scene, finish_client, go_on, migrate_command, stop_at, task_state, traces,
    wait_for_traces, wait_for_traces_but_pages,
};
use crate::{Host, Job, Output};

/// How long a migration may take to come to its end, whatever happened in it.
const END: Duration = Duration::from_secs(100);
/// How long a client may have to wait for redis after a fault.
pub const SERVED: Duration = Duration::from_secs(20);

/// Two hosts with redis on one of them, moved once there and back, and a client of it.
pub struct Bed {
    /// The hosts.
    pub scene: Scene,
    /// What a host looks like without the container.
    pub empty: Vec<String>,
    /// And with it.
    pub full: Vec<String>,
    /// Where the container is, and the other host.
    pub here: &'static str,
    /// The other host.
    pub there: &'static str,
    client: Option<Job>,
}

impl Bed {
    /// Starts all of it; redis is on `a`.
    ///
    /// # Errors
    /// When the hosts do not start, or redis cannot be moved.
    pub fn start() -> Result<Self> {
        let scene = Scene::start()?;
        scene.start_redis("a", 1000)?;
        let empty = traces(scene.host("b"))?;
        scene.migrate("redis", "a", "b")?;
        scene.migrate("redis", "b", "a")?;
        let full = traces(scene.host("a"))?;
        wait_for_traces(scene.host("b"), &empty, "before any fault")?;
        let client = Some(scene.start_client(5)?);
        Ok(Self { scene, empty, full, here: "a", there: "b", client })
    }

    /// The host that has the container.
    pub fn source(&self) -> &Host {
        self.scene.host(self.here)
    }

    /// The other one.
    pub fn destination(&self) -> &Host {
        self.scene.host(self.there)
    }

    /// Starts to move redis to the other host, up to fault point `point`.
    ///
    /// # Errors
    /// When it does not come there.
    pub fn stop_at(&self, point: &str, more: &str) -> Result<Job> {
        let more = format!("--ip {FLOATING}/24 {more}");
        stop_at(&self.scene, "redis", point, (self.here, self.there), &more)
    }

    /// Makes redis so large, and starts to move it so slowly, that its memory is being copied for 20 s.
    ///
    /// # Errors
    /// When it does not come there.
    pub fn copy_slowly(&self) -> Result<Job> {
        self.source().run("redis-cli debug populate 200000 more 500")?;
        let more = format!("--ip {FLOATING}/24 --bandwidth 5M");
        let command = migrate_command("redis", self.destination(), &more);
        let mut job = self.source().spawn(&format!("exec {command}"))?;
        job.wait_for("layer", Duration::from_secs(30))?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(job)
    }

    /// Lets the migration go on, and waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn go_on(&self, job: Job) -> Result<Output> {
        go_on(self.source())?;
        job.wait(END)
    }

    /// The same command again, to settle what was decided.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn again(&self) -> Result<Output> {
        self.scene.try_migrate("redis", self.here, self.there, &format!("--ip {FLOATING}/24"))
    }

    /// The container is on the other host now.
    pub fn has_moved(&mut self) {
        std::mem::swap(&mut self.here, &mut self.there);
    }

    /// One container runs, where it is said to be, its client is served, and there is nothing else.
    ///
    /// # Errors
    /// With what is not so.
    pub fn is_whole(&self, when: &str) -> Result<()> {
        is_served(&self.scene, SERVED).with_context(|| when.to_owned())?;
        let state = task_state(self.source(), "redis")?;
        ensure!(state.as_deref() == Some("RUNNING"), "{when}: redis on {}: {state:?}", self.here);
        go_on(self.source())?;
        wait_for_traces_but_pages(self.destination(), &self.empty, when)?;
        wait_for_traces(self.source(), &self.full, when)?;
        let ended = self.client.as_ref().is_some_and(|client| client.pids().is_empty());
        ensure!(!ended, "{when}: the client has ended");
        Ok(())
    }

    /// Ends the client, which must have seen no error; what it saw.
    ///
    /// # Errors
    /// When it lost a connection or got a wrong answer.
    pub fn end_client(&mut self) -> Result<Value> {
        finish_client(self.client.take().context("the client has ended already")?)
    }

    /// Starts another client, after [`Self::end_client`].
    ///
    /// # Errors
    /// When it does not start.
    pub fn new_client(&mut self) -> Result<()> {
        self.client = Some(self.scene.start_client(5)?);
        Ok(())
    }
}

/// Kills `ferry migrate` and `ferry agent` on `host`, at once and both.
///
/// # Errors
/// When there is none.
pub fn kill_ferry(host: &Host) -> Result<()> {
    host.run("pkill -9 -f '^ferry (agent|migrate)'").map(drop)
}

/// Waits until a new connection to redis is served; how long that took.
///
/// # Errors
/// When it is not within `limit`.
pub fn is_served(scene: &Scene, limit: Duration) -> Result<Duration> {
    let (client, start) = (scene.lab.client(), Instant::now());
    let ping = format!("timeout 1 redis-cli -h {FLOATING} ping");
    while !client.output(&ping)?.stdout.contains("PONG") {
        ensure!(start.elapsed() < limit, "redis does not answer within {limit:?}");
    }
    Ok(start.elapsed())
}
