//! Connections of a container that ends with its checkpoint. Its kernel would answer their peers with
//! resets: they are silent from the dump until a restore, or for [`HOLD`].

use super::Container;
use super::network::Network;
use crate::error::{Context as _, Error, Result};
use crate::rules::Note;
use crate::state::Status;
use ferry_oci::cgroups;
use ferry_oci::criu::{DumpOptions, DumpRecord, Locked, NetworkLock};
use ferry_oci::freezer::{Freezer, FreezerError};
use ferry_oci::netns::Netns;
use ferry_oci::quarantine::connections::{self, Connection};
use ferry_oci::sockets::{self, Protocol};
use log::warn;
use std::collections::HashSet;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::timeout;

/// How long connections stay silent at most. TCP itself gives up what is not acknowledged after about
/// a quarter of an hour; a peer that has nothing to say waits for longer.
const HOLD: Duration = Duration::from_secs(3600);
/// How long they do at least once a restore has begun.
const RESTORE: Duration = Duration::from_secs(900);
/// How long killed tasks may take to end.
const EXIT: Duration = Duration::from_secs(30);
/// How long the freezer may take.
const FREEZER: Duration = Duration::from_secs(10);

/// A container that stands still with its connections locked.
#[derive(Default)]
pub(crate) struct Silent {
    freezer: Option<Freezer>,
    lock: Option<(Arc<Netns>, String)>,
    /// Should the shim be killed, the lock goes with the container.
    note: Option<Note>,
}

impl Container {
    /// Freezes the container, if it runs, and locks those of its connections that are in a network
    /// which outlives it. Notes in `options` what is locked.
    pub(crate) async fn fall_silent(&self, options: &mut DumpOptions) -> Result<Option<Silent>> {
        if !options.tcp_established {
            return Ok(None);
        }
        let Some(netns) = self.lasting_network()? else { return Ok(None) };
        let mut silent = self.stand_still().await?.unwrap_or_default();
        match self.lock_connections(&netns).await {
            Ok((locked, note)) => {
                silent.note = note;
                silent.lock = locked.as_ref().map(|locked| (netns, locked.id.clone()));
                if locked.is_some() {
                    // It keeps nothing else from passing than CRIU's own would.
                    options.network_lock = NetworkLock::Skip;
                }
                options.locked = locked;
                Ok(Some(silent))
            }
            Err(err) => {
                silent.speak().await;
                Err(err)
            }
        }
    }

    /// The lock that CRIU is to take in a dump after which the container ends, decided before the freeze: ours
    /// is there already, where the network outlives it.
    pub(crate) fn lock_of_an_end(&self, options: &mut DumpOptions) -> Result<()> {
        if options.tcp_established && self.lasting_network()?.is_some() {
            options.network_lock = NetworkLock::Skip;
        }
        Ok(())
    }

    /// Refuses a dump that would never end, of a container that may be frozen already.
    pub(crate) fn refuse_stopped(&self) -> Result<()> {
        let freezer = Freezer::of(self.snapshot().pid).context("find the freezer")?;
        match freezer.stopped() {
            None => Ok(()),
            Some(thread) => {
                Err(Error::failed_precondition(FreezerError::Stopped(thread).to_string()))
            }
        }
    }

    /// Freezes the container, if it runs. CRIU would freeze it too, and wait for ever for a program that it
    /// has caught in the middle of a vfork.
    pub(super) async fn stand_still(&self) -> Result<Option<Silent>> {
        let snapshot = self.snapshot();
        if snapshot.status != Status::Running {
            return Ok(None);
        }
        let freezer = Freezer::of(snapshot.pid).context("find the freezer")?;
        if freezer.is_frozen().context("look at the freezer")? {
            return Ok(None);
        }
        let freeze = freezer.clone();
        blocking(move || freeze.freeze_for_dump(FREEZER)).await?.context("freeze the container")?;
        Ok(Some(Silent { freezer: Some(freezer), ..Silent::default() }))
    }

    /// Ends frozen tasks, which end a moment later. Their sockets are taken out of the protocol first, so that
    /// no peer hears of it and no connection lingers that the same container could come back to. As long as
    /// none has ended, a failure leaves them as they were, for a thaw. Whoever asks keeps others away.
    pub(crate) async fn end_frozen(&self) -> Result<()> {
        let freezer = Freezer::of(self.snapshot().pid).context("find the freezer")?;
        let pids = self.pids().await?;
        let silenced = blocking(move || sockets::silence(&pids)).await?;
        let silenced = silenced.context("silence the connections")?;
        self.kill_all().await?;
        if let Err(err) = blocking(move || freezer.thaw(FREEZER)).await? {
            warn!("thaw of killed tasks: {err}");
        }
        let mut exited = self.exited.subscribe();
        tokio::spawn(async move {
            // They end, if late.
            let _ = timeout(EXIT, exited.wait_for(Option::is_some)).await;
            silenced.leave();
        });
        Ok(())
    }

    async fn lock_connections(&self, netns: &Arc<Netns>) -> Result<(Option<Locked>, Option<Note>)> {
        let (init, netns) = (self.snapshot().pid, netns.clone());
        let bundle = self.bundle.clone();
        let lock = move || {
            // Not by runc: it would take as long as the dump.
            let pids = cgroups::pids(init).context("list the processes")?;
            let connections = of(&pids)?;
            if connections.is_empty() {
                return Ok((None, None));
            }
            let id = new_id().context("choose an id for the lock")?;
            let note = Note::of_lock(&bundle, &id)?;
            lock(&netns, &id, &connections, HOLD)?;
            let until = now() + HOLD.as_secs();
            Ok((Some(Locked { id, until, connections }), Some(note)))
        };
        blocking(lock).await?
    }

    /// Sees to it that the connections in `images` are silent while they are restored, whatever is left
    /// of the time of their lock. What has to be unlocked afterwards.
    pub(super) async fn stay_silent(&self, images: &Path) -> Result<Option<Silent>> {
        let record = DumpRecord::read(images).context("read the images")?;
        let Some(locked) = record.and_then(|record| record.options.locked) else {
            return Ok(None);
        };
        if !Locked::is_id(&locked.id) {
            return Err(Error::invalid_argument("the record of the dump has a bad lock"));
        }
        let Some(netns) = self.lasting_network()? else { return Ok(None) };
        let left = Duration::from_secs(locked.until.saturating_sub(now())).min(HOLD);
        let (id, inside) = (locked.id.clone(), netns.clone());
        let relock = move || {
            let missing = missing(&inside, locked.connections)?;
            lock(&inside, &id, &missing, left.max(RESTORE))
        };
        blocking(relock).await??;
        Ok(Some(Silent { lock: Some((netns, locked.id)), ..Silent::default() }))
    }

    /// The network that its connections are in, if that outlives it.
    fn lasting_network(&self) -> Result<Option<Arc<Netns>>> {
        let netns = match Network::of(&self.bundle)? {
            Network::Private => None,
            Network::Host => {
                Some(Netns::of(std::process::id()).context("open the host's network")?)
            }
            Network::Path(_) => self.given_netns()?,
        };
        Ok(netns.map(Arc::new))
    }
}

impl Silent {
    /// The connections stay locked, whatever becomes of the shim.
    pub(crate) fn keep(mut self) {
        self.note = None;
    }

    /// Unlocks the connections, and lets the container run if it did.
    pub(crate) async fn speak(self) {
        let undo = move || {
            if let Some((netns, id)) = self.lock {
                match netns.run(|| connections::unlock(&id)) {
                    Ok(Ok(())) => {}
                    Ok(Err(err)) => warn!("{err}"),
                    Err(err) => warn!("enter the network namespace: {err}"),
                }
            }
            if let Some(freezer) = self.freezer
                && let Err(err) = freezer.thaw(FREEZER)
            {
                warn!("thaw: {err}");
            }
        };
        if let Err(err) = blocking(undo).await {
            warn!("unlock the connections: {err}");
        }
    }
}

/// TCP connections of the processes.
fn of(pids: &[u32]) -> Result<Vec<Connection>> {
    let all = sockets::of_processes(pids).context("list the connections")?;
    let tcp = all.into_iter().filter(|s| s.protocol == Protocol::Tcp && s.connected);
    Ok(tcp.map(|s| Connection { local: s.local, remote: s.remote }).collect())
}

/// Those that nobody has in the network. Images are not to be trusted: they must not silence a
/// connection of this host, or of another container.
fn missing(netns: &Netns, mut connections: Vec<Connection>) -> Result<Vec<Connection>> {
    let there = netns.run(|| sockets::in_netns_of(nix::unistd::gettid().as_raw().cast_unsigned()));
    let there = there.context("enter the network namespace")?.context("list the connections")?;
    let there: HashSet<_> = there.iter().map(|s| (s.local, s.remote)).collect();
    connections.retain(|c| !there.contains(&(c.local, c.remote)));
    Ok(connections)
}

fn lock(netns: &Netns, id: &str, connections: &[Connection], time: Duration) -> Result<()> {
    let locked = netns.run(|| connections::lock(id, connections, time));
    locked.context("enter the network namespace")?.context("lock the connections")
}

/// [`Silent::speak`], if there is something to undo.
pub(super) async fn speak(silent: Option<Silent>) {
    if let Some(silent) = silent {
        silent.speak().await;
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context("wait for a thread")
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Random, since checkpoints of several hosts may come to one.
fn new_id() -> std::io::Result<String> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_somebody_has_is_not_silenced() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let stream = std::net::TcpStream::connect(local).unwrap();
        let there = Connection { local, remote: stream.local_addr().unwrap() };
        let gone = Connection { local, remote: "127.0.0.1:1".parse().unwrap() };
        let own = Netns::of(std::process::id()).unwrap();
        assert_eq!(missing(&own, vec![there, gone]).unwrap(), [gone]);
    }

    #[test]
    fn an_id_is_one_that_a_restore_takes() {
        assert!(Locked::is_id(&new_id().unwrap()));
        assert!(!Locked::is_id("../../../../etc/"));
    }
}
