//! Events to containerd, in the order in which they were sent.
//!
//! One task forwards them one after the other: an event is not overtaken by a later one, also when
//! containerd is away and it has to be tried again (the crate's own publisher requeues a failed
//! event behind its successors).

use containerd_shim::event::Event;
use containerd_shim::protos::protobuf::MessageDyn;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim::events::ForwardRequest;
use containerd_shim::protos::shim_async::{Client, EventsClient};
use containerd_shim::protos::ttrpc::{self, context};
use containerd_shim::util::{convert_to_any, timestamp};
use log::{debug, warn};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Pauses between attempts; after the last one the event is dropped. containerd asks for the
/// state of every task when it comes back, so a dropped event does no lasting harm.
const PAUSES: [u64; 6] = [0, 1, 2, 4, 8, 15];

enum Item {
    Event(Box<Envelope>, Heard),
    Flushed(oneshot::Sender<()>),
}

/// Whether containerd has been told of an event.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<AtomicBool>);

impl Heard {
    /// Whether it has, by now.
    pub(crate) fn yet(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Sends events. Cheap to share.
pub(crate) struct Events {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

impl Events {
    /// Starts the forwarding to containerd's ttrpc `address`.
    pub(crate) fn start(address: &str, namespace: &str) -> Self {
        let address = match address.contains("://") {
            true => address.to_string(),
            false => format!("unix://{address}"),
        };
        let (queue, items) = mpsc::unbounded_channel();
        tokio::spawn(forward(address, items));
        Self { namespace: namespace.to_string(), queue }
    }

    /// Queues an event; never waits.
    pub(crate) fn send(&self, event: impl Event + 'static) -> Heard {
        let topic = event.topic();
        let heard = Heard::default();
        match self.envelope(&topic, Box::new(event)) {
            Ok(envelope) => {
                // The receiver lives as long as the runtime.
                let _ = self.queue.send(Item::Event(Box::new(envelope), heard.clone()));
            }
            Err(err) => warn!("event {topic}: {err}"),
        }
        heard
    }

    fn envelope(
        &self,
        topic: &str,
        event: Box<dyn MessageDyn>,
    ) -> containerd_shim::Result<Envelope> {
        let mut envelope = Envelope::new();
        envelope.set_topic(topic.to_string());
        envelope.set_namespace(self.namespace.clone());
        envelope.set_timestamp(timestamp()?);
        envelope.set_event(convert_to_any(event)?);
        Ok(envelope)
    }

    /// Waits until everything queued so far has been handed over, or `limit` has passed.
    pub(crate) async fn flush(&self, limit: Duration) {
        let (sender, receiver) = oneshot::channel();
        if self.queue.send(Item::Flushed(sender)).is_ok() {
            let _ = timeout(limit, receiver).await;
        }
    }
}

async fn forward(address: String, mut items: mpsc::UnboundedReceiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Flushed(sender) => drop(sender.send(())),
            Item::Event(envelope, heard) => {
                let told = deliver(&address, &mut client, *envelope).await;
                heard.0.store(told, Ordering::Release);
            }
        }
    }
}

async fn deliver(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) -> bool {
    let topic = envelope.topic().to_string();
    let mut request = ForwardRequest::new();
    request.set_envelope(envelope);
    for pause in PAUSES {
        sleep(Duration::from_secs(pause)).await;
        match attempt(address, client, &request).await {
            Ok(()) => {
                debug!("sent {topic}");
                return true;
            }
            Err(err) => {
                warn!("event {topic}: {err}");
                *client = None;
            }
        }
    }
    warn!("event {topic} is dropped, containerd does not take it");
    false
}

async fn attempt(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let limit = context::with_duration(ATTEMPT);
    connected.forward(limit, request).await.map(drop)
}
