//! The containers of this shim, and what they share.

use crate::container::{Container, CreateRequest, Snapshot};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::reaper::Reaper;
use log::{info, warn};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A place in the map: taken from the moment a Create begins.
enum Slot {
    Creating(Creating),
    Ready(Arc<Container>),
}

/// What a client that has given up its Create has asked for before that was over.
#[derive(Default)]
struct Creating {
    /// Nobody will ask for the container again.
    given_up: bool,
    shutdown: bool,
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
    end: Box<dyn Fn() + Send + Sync>,
    map: Mutex<HashMap<String, Slot>>,
}

impl Containers {
    pub(crate) fn new(
        namespace: &str,
        reaper: Arc<Reaper>,
        events: Arc<Events>,
        end: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (end, map) = (Box::new(end), Mutex::default());
        Arc::new(Self { namespace: namespace.to_string(), reaper, events, end, map })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container `id`; NOT_FOUND if there is none.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.lock().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            _ => Err(not_created(id)),
        }
    }

    /// Creates a container; ALREADY_EXISTS if the id is taken. One that its client has given up meanwhile
    /// is removed again.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<Arc<Container>> {
        let id = request.id.clone();
        {
            let mut map = self.lock();
            if map.contains_key(&id) {
                return Err(Error::already_exists(format!("container {id:?} already exists")));
            }
            map.insert(id.clone(), Slot::Creating(Creating::default()));
        }
        let created = match Container::create(self, request).await {
            Ok(container) if self.is_wanted(&id, &container) => return Ok(container),
            Ok(container) => {
                // What stays is left to the `delete` action, which its client has asked for too.
                if let Err(err) = container.delete().await {
                    warn!("remove {id}, which nobody waits for any more: {err}");
                }
                Err(Error::failed_precondition("the client has given up the container"))
            }
            Err(err) => Err(err),
        };
        self.free(&id);
        created
    }

    /// Gives a new container its place, unless its client has given it up.
    fn is_wanted(&self, id: &str, container: &Arc<Container>) -> bool {
        let mut map = self.lock();
        let wanted = !matches!(map.get(id), Some(Slot::Creating(asked)) if asked.given_up);
        if wanted {
            map.insert(id.to_string(), Slot::Ready(container.clone()));
        }
        wanted
    }

    /// A Create is over and there is no container.
    fn free(&self, id: &str) {
        let mut map = self.lock();
        let shutdown = matches!(map.remove(id), Some(Slot::Creating(asked)) if asked.shutdown);
        let last = map.is_empty();
        drop(map);
        if shutdown && last {
            self.end();
        }
    }

    /// Deletes a container. One that is still being created has been given up by its client.
    pub(crate) async fn delete(&self, id: &str) -> Result<Snapshot> {
        let container = match self.lock().get_mut(id) {
            Some(Slot::Ready(container)) => container.clone(),
            Some(Slot::Creating(asked)) => {
                asked.given_up = true;
                return Err(not_created(id));
            }
            None => return Err(not_created(id)),
        };
        let snapshot = container.delete().await?;
        self.lock().remove(id);
        Ok(snapshot)
    }

    /// Ends the shim if it has no container. `id` is the one that its client is done with: if it is still
    /// being created the shim ends after that, should there be no other.
    pub(crate) fn shutdown(&self, id: &str) {
        let mut map = self.lock();
        if let Some(Slot::Creating(asked)) = map.get_mut(id) {
            *asked = Creating { given_up: true, shutdown: true };
        }
        let empty = map.is_empty();
        drop(map);
        if empty {
            self.end();
        }
    }

    fn end(&self) {
        info!("shutdown asked for");
        (self.end)();
    }
}

fn not_created(id: &str) -> Error {
    Error::not_found(format!("container {id:?} not created"))
}

#[cfg(test)]
mod tests {
    use crate::container::fake;
    use containerd_shim::protos::ttrpc::Code;

    /// Gives up the Create of `t`, whose runc then ends as `outcome` says, and asks for a shutdown if
    /// `shutdown`; whether the shim ends.
    async fn give_up(fake: &fake::Fake, outcome: &str, shutdown: bool) -> bool {
        fake.stop_at("create");
        let (containers, request) = (fake.containers.clone(), fake.request("t"));
        let create = tokio::spawn(async move { containers.create(request).await });
        fake.until_stopped("create").await;
        let err = fake.containers.delete("t").await.unwrap_err();
        assert_eq!(err.code(), Code::NOT_FOUND);
        if shutdown {
            fake.containers.shutdown("t");
        }
        assert!(!fake.has_ended(), "in the middle of a create");
        fake.go_on("create", outcome);
        assert!(create.await.unwrap().is_err());
        assert!(!fake.runs("t"), "the container of a client that has gone is left");
        fake.has_ended()
    }

    #[test]
    fn a_create_that_is_given_up_leaves_neither_container_nor_shim() {
        for outcome in ["fail", "succeed"] {
            fake::with(|fake| async move {
                assert!(give_up(&fake, outcome, true).await, "{outcome}");
            });
            fake::with(|fake| async move {
                assert!(!give_up(&fake, outcome, false).await, "{outcome}");
                // Its id is free again.
                fake.containers.create(fake.request("t")).await.unwrap();
            });
        }
    }

    #[test]
    fn a_create_that_is_given_up_does_not_end_the_others_of_its_group() {
        fake::with(|fake| async move {
            fake.containers.create(fake.request("other")).await.unwrap();
            assert!(!give_up(&fake, "succeed", true).await);
            assert!(fake.runs("other"));
            assert!(!give_up(&fake, "fail", true).await);
            fake.containers.delete("other").await.unwrap();
            fake.containers.shutdown("other");
            assert!(fake.has_ended());
        });
    }

    #[test]
    fn the_end_of_one_container_does_not_disturb_the_create_of_another() {
        fake::with(|fake| async move {
            fake.stop_at("create");
            let (containers, request) = (fake.containers.clone(), fake.request("t"));
            let create = tokio::spawn(async move { containers.create(request).await });
            fake.until_stopped("create").await;
            fake.containers.shutdown("other");
            fake.go_on("create", "succeed");
            create.await.unwrap().unwrap();
            assert!(fake.runs("t") && !fake.has_ended());
            fake.containers.delete("t").await.unwrap();
        });
    }
}
