//! `ferry agent --stdio`: the destination's end of a migration, started by ssh or by [`listen`].
//!
//! Answers one request after the other on its standard output. Its input is the lease: when that
//! ends before the commit, everything the migration made here is undone.

pub(crate) mod cleanup;
mod destination;
mod incoming;
pub(crate) mod listen;
mod memory;
mod push;
mod settle;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use ferry_oci::{cgroups, sockets};
use tokio::io::{AsyncWriteExt, BufReader, BufWriter};

use crate::containerd::Containerd;
use crate::describe::host::HostFacts;
use crate::describe::room::RoomFacts;
use crate::transport::{Input, own};
use crate::wire::codec::{self, Frame, MAX_DATA};
use crate::wire::messages::{ContainerdAddress, Reply, Request};
use destination::Destination;
use incoming::Incoming;
use push::Push;

/// How long the driver's host may be silent. ssh there gives up after 15 s.
const DRIVER: Duration = Duration::from_secs(20);

/// What the agent knows once the driver has said hello.
struct Agent {
    address: ContainerdAddress,
    containerd: Containerd,
    migration: Option<Destination>,
    push: Option<Push>,
    /// What goes out as a stream before the next reply.
    outgoing: Option<Vec<u8>>,
}

/// Serves one driver until its input ends.
///
/// # Errors
/// When the driver speaks another protocol or the streams break. What was not committed has been
/// undone then.
pub(crate) async fn serve() -> Result<()> {
    notice_lost_driver();
    let mut input = Incoming::new(BufReader::with_capacity(1 << 16, own::input()));
    let mut output = BufWriter::new(own::output());
    let mut agent: Option<Agent> = None;
    let result = converse(&mut input, &mut output, &mut agent).await;
    if let Some(migration) = agent.and_then(|a| a.migration) {
        migration.lease_ended().await;
    }
    result
}

/// A driver whose host or link is gone says nothing, and sshd by itself waits for hours. The lease
/// must end sooner.
fn notice_lost_driver() {
    let mut ancestor = cgroups::parent(std::process::id());
    while let Some(pid) = ancestor.filter(|pid| *pid > 1) {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.starts_with("sshd") {
            match sockets::end_when_silent(pid, DRIVER) {
                Ok(0) => {}
                Ok(_) => return,
                Err(error) => log::debug!("the connection of the driver: {error}"),
            }
        }
        ancestor = cgroups::parent(pid);
    }
}

async fn converse(
    input: &mut Incoming,
    output: &mut BufWriter<Input>,
    agent: &mut Option<Agent>,
) -> Result<()> {
    while let Some(request) = input.request().await? {
        let reply = match answer(agent, input, request).await {
            Ok(reply) => reply,
            Err(error) => Reply::Refused { error: format!("{error:#}") },
        };
        // A refused request may leave its stream unread.
        input.skip_stream().await?;
        if let Some(bytes) = agent.as_mut().and_then(|agent| agent.outgoing.take()) {
            for piece in bytes.chunks(MAX_DATA as usize) {
                let frame = Frame::Data(piece.to_vec());
                codec::write(output, &frame).await.context("answer the driver")?;
            }
            codec::write(output, &Frame::End).await.context("answer the driver")?;
        }
        let bytes = serde_json::to_vec(&reply).context("encode a reply")?;
        codec::write(output, &Frame::Message(bytes)).await.context("answer the driver")?;
        output.flush().await.context("answer the driver")?;
    }
    Ok(())
}

async fn answer(
    agent: &mut Option<Agent>,
    input: &mut Incoming,
    request: Request,
) -> Result<Reply> {
    if let Request::Hello { protocol, ferry: _, containerd } = request {
        // The driver judges the versions; an agent of another protocol only says which it is.
        if protocol == ferry_oci::PROTOCOL {
            let client = Containerd::connect(&containerd.socket, &containerd.namespace).await?;
            *agent = Some(Agent {
                address: containerd,
                containerd: client,
                migration: None,
                push: None,
                outgoing: None,
            });
        }
        let ferry = env!("CARGO_PKG_VERSION").to_owned();
        return Ok(Reply::Hello { protocol: ferry_oci::PROTOCOL, ferry });
    }
    let agent = agent.as_mut().context("the driver has not said hello")?;
    agent.answer(input, request).await
}

impl Agent {
    async fn answer(&mut self, input: &mut Incoming, request: Request) -> Result<Reply> {
        match request {
            Request::DescribeHost => {
                let version = self.containerd.version().await?;
                let facts = tokio::task::spawn_blocking(|| HostFacts::gather(version)).await?;
                Ok(Reply::Host(Box::new(facts)))
            }
            Request::DescribeRoom(request) => {
                let taken = self.containerd.container(&request.id).await?.is_some();
                Ok(Reply::Room(RoomFacts::gather(&request, taken)?))
            }
            Request::Begin { migration, container } => {
                if self.migration.is_some() {
                    bail!("this agent serves a migration already");
                }
                let address = self.address.clone();
                let begun =
                    Destination::begin(&self.containerd, address, migration, container).await?;
                self.migration = Some(begun);
                Ok(Reply::Begun { epoch: settle::epoch()? })
            }
            Request::BeginPush { push } => {
                if self.push.is_some() || self.migration.is_some() {
                    bail!("this agent serves something already");
                }
                self.push = Some(Push::begin(&self.containerd, &push).await?);
                Ok(Reply::Done)
            }
            Request::Settle { migration, container, ip, epoch } => {
                let question = settle::Question { migration, container, ip, epoch };
                let outcome = settle::settle(&self.containerd, &self.address, &question).await?;
                Ok(Reply::Settled(outcome))
            }
            Request::Abort => {
                if let Some(migration) = self.migration.take() {
                    migration.abort().await?;
                }
                Ok(Reply::Done)
            }
            Request::Finish { migration } if self.push.is_some() => {
                let push = self.push.take().filter(|push| push.is(&migration));
                push.with_context(|| format!("{migration} has not begun here"))?.finish().await?;
                Ok(Reply::Done)
            }
            Request::Finish { migration } => {
                match self.migration.take() {
                    Some(own) if own.is(&migration) => own.finish().await?,
                    _ => settle::finish(&self.containerd, &migration).await?,
                }
                Ok(Reply::Done)
            }
            Request::PageHashes => {
                let migration = self.migration.as_mut().context("no migration has begun")?;
                self.outgoing = Some(migration.page_hashes()?);
                Ok(Reply::Done)
            }
            other if self.push.is_some() => {
                let push = self.push.as_mut().context("no push has begun")?;
                push.answer(input, other).await
            }
            other => {
                let migration = self.migration.as_mut().context("no migration has begun")?;
                migration.answer(input, other).await
            }
        }
    }
}
