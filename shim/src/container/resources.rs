//! What a container uses, and may use.

use super::Container;
use crate::cgroup::{Cgroup, oom};
use crate::error::{Error, Result};
use crate::state::Op;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use ferry_oci::runc::Update;
use log::{debug, warn};
use std::path::Path;
use std::sync::Arc;

/// The end of the type of what Update is given, as Go's clients write it: JSON as in the OCI spec.
const RESOURCES: &str = "opencontainers/runtime-spec/1/LinuxResources";

impl Container {
    /// The task has a process: from now on its cgroups are known, and the end of its memory is
    /// told. `path` is the `cgroupsPath` of its spec if the process may be in a cgroup inside it.
    pub(super) fn found_init(&self, pid: u32, path: Option<&Path>) {
        let cgroup = match Cgroup::of(pid, path) {
            Ok(cgroup) => cgroup,
            // It may have ended already.
            Err(err) => return warn!("{} has no statistics: {err}", self.id),
        };
        cgroup.enable_controllers();
        let watch = match oom::Watch::start(&self.id, &cgroup, self.events.clone()) {
            Ok(watch) => watch,
            Err(err) => {
                warn!("the end of memory of {} is not told: {err}", self.id);
                None
            }
        };
        if watch.is_none() {
            debug!("the memory of {} is not counted", self.id);
        }
        let mut inner = self.inner();
        inner.cgroup = Some(Arc::new(cgroup));
        inner.oom = watch;
    }

    /// Has containerd told that memory has run out, if it has, before the exit that comes of it.
    pub(super) fn tell_oom(&self) {
        if let Some(watch) = &self.inner().oom {
            watch.look();
        }
    }

    /// What the task uses, until it is deleted; NOT_FOUND where nothing is counted (yet).
    pub(crate) fn stats(&self) -> Result<Any> {
        let cgroup = self.inner().cgroup.clone();
        cgroup.ok_or_else(|| Error::not_found("cgroup does not exist"))?.stats()
    }

    /// Gives the task other limits.
    pub(crate) async fn update(&self, resources: Option<&Any>) -> Result<()> {
        let resources = limits(resources)?;
        let _op = self.op.write().await;
        self.admit(Op::Update)?;
        self.runtime.call_fed(&Update { id: &self.id }, resources).await
    }
}

/// The JSON text in `resources`.
fn limits(resources: Option<&Any>) -> Result<&[u8]> {
    let Some(any) = resources else {
        return Err(Error::invalid_argument("no resources are given"));
    };
    if any.type_url != RESOURCES && !any.type_url.ends_with(&format!("/{RESOURCES}")) {
        let text = format!("resources of type {:?} are not supported: {RESOURCES}", any.type_url);
        return Err(Error::invalid_argument(text));
    }
    match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&any.value) {
        Ok(_) => Ok(&any.value),
        Err(err) => Err(Error::invalid_argument(format!("read the resources: {err}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::protos::ttrpc::Code;

    const TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

    fn any(type_url: &str, value: &str) -> Any {
        Any { type_url: type_url.into(), value: value.into(), ..Default::default() }
    }

    #[test]
    fn limits_are_passed_on_as_they_are() {
        let json = r#"{"memory":{"limit":1048576},"unknown":1}"#;
        assert_eq!(limits(Some(&any(TYPE, json))).unwrap(), json.as_bytes());
        assert!(limits(Some(&any(RESOURCES, json))).is_ok());
    }

    #[test]
    fn what_is_no_limits_is_refused_by_its_type() {
        let refused = |given: Option<Any>| {
            let err = limits(given.as_ref()).unwrap_err();
            assert_eq!(err.code(), Code::INVALID_ARGUMENT);
            err.to_string()
        };
        assert!(refused(Some(any("some.other.Type", "{}"))).contains("some.other.Type"));
        assert!(refused(Some(any("", "{}"))).contains("\"\""));
        assert!(refused(Some(any(TYPE, "{"))).contains("resources"));
        assert!(refused(Some(any(TYPE, "[]"))).contains("resources"));
        refused(None);
    }
}
