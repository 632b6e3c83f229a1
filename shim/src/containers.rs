//! The containers of this shim, and what they share.

use crate::container::{Container, CreateRequest};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::reaper::Reaper;
use containerd_shim::ExitSignal;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A place in the map: taken from the moment a Create begins.
enum Slot {
    Creating,
    Ready(Arc<Container>),
}

/// All containers by id. The map's lock is never held across a runc call.
pub(crate) struct Containers {
    /// containerd namespace.
    pub(crate) namespace: String,
    /// Where children are waited for.
    pub(crate) reaper: Arc<Reaper>,
    /// Events to containerd.
    pub(crate) events: Arc<Events>,
    /// Ends the shim.
    pub(crate) exit: Arc<ExitSignal>,
    map: Mutex<HashMap<String, Slot>>,
}

impl Containers {
    pub(crate) fn new(
        namespace: &str,
        reaper: Arc<Reaper>,
        events: Arc<Events>,
        exit: Arc<ExitSignal>,
    ) -> Arc<Self> {
        let map = Mutex::default();
        Arc::new(Self { namespace: namespace.to_string(), reaper, events, exit, map })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container `id`; NOT_FOUND if there is none.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.lock().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            _ => Err(Error::not_found(format!("container {id:?} not created"))),
        }
    }

    /// Whether no container is there or being made.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Creates a container; ALREADY_EXISTS if the id is taken.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<Arc<Container>> {
        let id = request.id.clone();
        {
            let mut map = self.lock();
            if map.contains_key(&id) {
                return Err(Error::already_exists(format!("container {id:?} already exists")));
            }
            map.insert(id.clone(), Slot::Creating);
        }
        let created = Container::create(self, request).await;
        let mut map = self.lock();
        match &created {
            Ok(container) => map.insert(id, Slot::Ready(container.clone())),
            Err(_) => map.remove(&id),
        };
        created
    }

    /// Forgets a deleted container.
    pub(crate) fn remove(&self, id: &str) {
        self.lock().remove(id);
    }
}
