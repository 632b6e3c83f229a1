//! What is moved.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ferry_tests::scene::FLOATING;
use ferry_tests::{Host, Job, Scene};

use crate::client::{self, Ask, Client};
use crate::offer;

/// Where redis answers.
pub(crate) const REDIS: &str = "10.77.0.100:6379";
/// What a value of [`offer::VALUE`] bytes takes in redis with its key and all, bytes.
const KEY_BYTES: u64 = 1133;
/// Resident memory of an empty redis, MB.
const EMPTY_REDIS: u64 = 7;
/// Working set of the writer, MB.
const WORKING_SET: u64 = 64;
/// Connections of the load, which asks without pause.
const LOAD: u32 = 4;

/// Answers every line with the same line.
const PYTHON: &str = r#"
import selectors, socket
ready = selectors.DefaultSelector()
listener = socket.create_server(("0.0.0.0", 7779), backlog=512)
ready.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        if key.fileobj is listener:
            ready.register(listener.accept()[0], selectors.EVENT_READ)
            continue
        data = key.fileobj.recv(4096)
        if data:
            key.fileobj.sendall(data)
        else:
            ready.unregister(key.fileobj)
            key.fileobj.close()
"#;

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    /// One process that waits.
    Idle,
    /// Redis with so much resident memory and no writes.
    Redis { megabytes: u64 },
    /// The same, with content that cannot be compressed.
    RedisRandom { megabytes: u64 },
    /// Redis that is asked and written without pause.
    RedisLoad { megabytes: u64 },
    /// Writes MB/s of random content all over a working set.
    Writer { rate: u64 },
    /// A shell and its children.
    Tree { children: u32 },
    /// Python with that many connections.
    Python { connections: usize },
}

impl Workload {
    /// Name of its image.
    pub(crate) fn image(self) -> &'static str {
        match self {
            Self::Idle | Self::Tree { .. } => "docker.io/library/busybox:latest",
            Self::Redis { .. } | Self::RedisRandom { .. } | Self::RedisLoad { .. } => {
                "docker.io/library/redis:latest"
            }
            Self::Writer { .. } => "docker.io/library/memory:latest",
            Self::Python { .. } => "docker.io/library/python:latest",
        }
    }

    /// Its command line, as words of a shell.
    pub(crate) fn command(self) -> String {
        match self {
            Self::Idle => "tail -f /dev/null".into(),
            Self::Redis { .. } | Self::RedisRandom { .. } | Self::RedisLoad { .. } => {
                "redis-server --protected-mode no --save '' --enable-debug-command yes".into()
            }
            Self::Writer { rate } => {
                format!("ferry-memory writer --port 7778 --megabytes {WORKING_SET} --rate {rate}")
            }
            // Not sleep: it ends early when it is dumped.
            Self::Tree { children } => {
                format!("sh -c 'for n in $(seq {children}); do tail -f /dev/null & done; wait'")
            }
            Self::Python { .. } => format!("python3 -c '{PYTHON}'"),
        }
    }

    /// What its client asks, if it has one.
    pub(crate) fn ask(self) -> Option<Ask> {
        let (port, say, idle) = match self {
            Self::Idle | Self::Tree { .. } => return None,
            Self::Redis { .. } | Self::RedisRandom { .. } | Self::RedisLoad { .. } => {
                (6379, "PING", 0)
            }
            Self::Writer { .. } => (7778, "stats", 0),
            Self::Python { connections } => (7779, "ping", connections.saturating_sub(1)),
        };
        Some(Ask { address: format!("{FLOATING}:{port}"), say: say.into(), idle })
    }

    /// Resident memory to expect, MB.
    pub(crate) fn megabytes(self) -> u64 {
        match self {
            Self::Redis { megabytes }
            | Self::RedisRandom { megabytes }
            | Self::RedisLoad { megabytes } => megabytes,
            Self::Writer { .. } => WORKING_SET,
            Self::Idle | Self::Tree { .. } | Self::Python { .. } => 50,
        }
    }

    /// Keys that redis has.
    pub(crate) fn keys(self) -> u64 {
        match self {
            Self::Redis { .. } | Self::RedisRandom { .. } | Self::RedisLoad { .. } => {
                self.megabytes().saturating_sub(EMPTY_REDIS) * 1_000_000 / KEY_BYTES
            }
            _ => 0,
        }
    }

    /// Waits until it answers, and fills it.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) fn prepare(self, scene: &Scene, host: &Host) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Some(ask) = self.ask() {
            match client::start(scene.lab.client(), &ask).and_then(Client::finish) {
                Ok(_) => break,
                Err(e) if Instant::now() > deadline => return Err(e).context("it does not answer"),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
        let (keys, size) = (self.keys(), offer::VALUE);
        match self {
            Self::Redis { .. } | Self::RedisLoad { .. } => {
                host.run(&format!("redis-cli debug populate {keys} key {size}"))?;
            }
            Self::RedisRandom { .. } => {
                let fill = format!("ferry-bench offer {REDIS} --keys {keys} --rate 0");
                scene.lab.client().run(&fill)?;
            }
            _ => {}
        }
        // Children are started, caches of the start are written.
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }

    /// Starts what else asks during a move.
    ///
    /// # Errors
    /// When it does not connect.
    pub(crate) fn load(self, scene: &Scene) -> Result<Option<Job>> {
        if !matches!(self, Self::RedisLoad { .. }) {
            return Ok(None);
        }
        let mut job = scene.lab.client().spawn(&format!(
            "exec ferry-echo redis {FLOATING}:6379 --connections {LOAD} --interval-us 0"
        ))?;
        job.wait_for("ready", Duration::from_secs(20))?;
        Ok(Some(job))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_is_asked_where_its_address_is() {
        let ask = Workload::Redis { megabytes: 40 }.ask().unwrap();
        assert_eq!(ask.address, REDIS);
    }
}
